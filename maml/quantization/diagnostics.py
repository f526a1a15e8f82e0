"""What a quantizer did, to parameters and along an inner loop."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maml.quantization.grids import wide
from maml.quantization.learned import Learned
from maml.quantization.quantizer import Codes, Quantizer, decode
from maml.types import Adapt, Adapted, Params, Trace, initial, leaf_name

Where = str | Callable[[str], Any]
"""Which parameters are meant: a regular expression that is searched in their paths, or a predicate of them."""


def encoded(params: Params, quantizer: Quantizer | Learned, where: Where = "") -> dict[str, Codes]:
    """The codes by path (`layers/0/kernel`), of the parameters whose path the pattern `where` finds.

    The step of a `learned` quantizer is the parameter beside it, as `models.quantize` makes it: `layers/0/dot_general/scale`.

    Raises:
      ValueError: for a pattern that finds nothing, with the paths, and for a learned quantizer where there is no step.
    """
    found = selected(params, where)
    if isinstance(quantizer, Learned):
        return {name: quantizer.encode(x, _step_of(name, params)) for name, x in found.items()}
    return {name: quantizer.encode(x) for name, x in found.items()}


def _step_of(name: str, params: Params) -> Array:
    layer = name.removesuffix(name.rpartition("/")[2])
    steps = [x for other, x in selected(params, "").items() if re.fullmatch(rf"{re.escape(layer)}\w+/scale", other)]
    if len(steps) != 1:
        raise ValueError(
            f"{name}: {len(steps)} parameters {layer}.../scale; a learned quantizer has one, made by quantize"
        )
    return steps[0]


def code_flips(before: Params, after: Params, quantizer: Quantizer | Learned, where: Where = "") -> Float[Array, ""]:
    """The share of integer codes that differ, over the parameters whose path (`layers/0/kernel`) the pattern `where` finds.

    A quantized inner loop whose steps flip no code predicts what it predicted before, whatever its parameters did.

    Raises:
      ValueError: for a pattern that finds nothing, with the paths.
    """
    pairs = zip(*(encoded(params, quantizer, where).values() for params in (before, after)), strict=True)
    return _share([a.codes != b.codes for a, b in pairs])


def clipped_fraction(params: Params, quantizer: Quantizer | Learned, where: Where = "") -> Float[Array, ""]:
    """The share of values that lie outside of the grid: more than half a step beyond its ends."""
    low, high = quantizer.within

    def outside(x, codes):
        at = wide(x) / codes.scale + codes.zero_point
        return (at < low - 1e-4) | (at > high + 1e-4)  # 1e-4 of a step for roundings

    return _share(list(map(outside, selected(params, where).values(), encoded(params, quantizer, where).values())))


def sqnr(params: Params, quantizer: Quantizer | Learned, where: Where = "") -> Float[Array, ""]:
    """Signal to quantization noise in dB: 10 log₁₀ Σx² / Σ(x - Q(x))²; finite also without noise or signal."""
    found = [wide(x) for x in selected(params, where).values()]
    noise = [x - decode(codes) for x, codes in zip(found, encoded(params, quantizer, where).values(), strict=True)]
    signal, noise = (sum(jnp.sum(jnp.square(x)) for x in xs) for xs in (found, noise))
    return 10 * (_log10(signal) - _log10(noise))


def code_metrics(
    path: Params, quantizer: Quantizer | Learned, where: Where = "kernel"
) -> dict[str, Float[Array, " steps"]]:
    """What the codes do along an inner loop, of the parameters before and after its steps (`trace.params`, [steps + 1, ...]).

    `code_flips`: share of codes that each step changes; `clipped` and `sqnr` (dB): of the parameters before each step. The
    quantizer is only for looking, and rounds to nearest.
    """
    before, after = jax.tree.map(lambda x: x[:-1], path), jax.tree.map(lambda x: x[1:], path)

    def of_step(before, after):
        flips = code_flips(before, after, quantizer, where)
        return {
            "code_flips": flips,
            "clipped": clipped_fraction(before, quantizer, where),
            "sqnr": sqnr(before, quantizer, where),
        }

    return jax.vmap(of_step)(before, after)


def with_code_metrics(adapt: Adapt, quantizer: Quantizer | Learned, where: Where = "kernel") -> Adapt:
    """The same inner loop, whose trace has the `code_metrics` too: objectives report those of the first step as `support/...`."""

    def watched(loss, params, support, key) -> Adapted:
        adapted, trace = adapt(loss, params, support, key)
        metrics = code_metrics(lax.stop_gradient(trace.params), quantizer, where)
        return Adapted(adapted, Trace(trace.params, dict(trace.metrics) | metrics))

    watched.init = lambda params, key: initial(adapt, params, key)
    return watched


def selected(params: Params, where: Where) -> dict[str, Array]:
    """The arrays by path, of those paths that the pattern finds, or that are said to be meant.

    Raises:
      ValueError: where there are none, with the paths.
    """
    named = {leaf_name(path): x for path, x in jax.tree.flatten_with_path(params)[0]}
    meant = where if callable(where) else re.compile(where).search
    found = {name: x for name, x in named.items() if meant(name)}
    if not found:
        raise ValueError(f"where={where!r}: finds no parameter; the paths are {', '.join(named)}")
    return found


def _share(flags: list[Array]) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(x) for x in flags])) / sum(x.size for x in flags)


def _log10(x):
    return jnp.log10(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
