"""What a quantizer did, to parameters and along an inner loop."""

import re

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maml.quantization.grids import wide
from maml.quantization.quantizer import Quantizer, decode
from maml.types import Adapt, Adapted, Params, Trace, initial, leaf_name


def code_flips(before: Params, after: Params, quantizer: Quantizer, where: str = "") -> Float[Array, ""]:
    """The share of integer codes that differ, over the parameters whose path (`layers/0/kernel`) the pattern `where` finds.

    A quantized inner loop whose steps flip no code predicts what it predicted before, whatever its parameters did.

    Raises:
      ValueError: for a pattern that finds nothing, with the paths.
    """
    pairs = zip(selected(before, where).values(), selected(after, where).values(), strict=True)
    flips = [quantizer.encode(a).codes != quantizer.encode(b).codes for a, b in pairs]
    return _share(flips)


def clipped_fraction(params: Params, quantizer: Quantizer, where: str = "") -> Float[Array, ""]:
    """The share of values that lie outside of the grid: further than half a step from their point."""

    def outside(x):
        encoded = quantizer.encode(x)
        return jnp.abs(x - decode(encoded)) > 0.5001 * encoded.scale  # 1e-4 of a step for roundings

    return _share([outside(x) for x in selected(params, where).values()])


def sqnr(params: Params, quantizer: Quantizer, where: str = "") -> Float[Array, ""]:
    """Signal to quantization noise in dB: 10 log₁₀ Σx² / Σ(x - Q(x))²; finite also without noise or signal."""
    found = [wide(x) for x in selected(params, where).values()]
    noise = [x - decode(quantizer.encode(x)) for x in found]
    signal, noise = (sum(jnp.sum(jnp.square(x)) for x in xs) for xs in (found, noise))
    return 10 * (_log10(signal) - _log10(noise))


def with_code_metrics(adapt: Adapt, quantizer: Quantizer, where: str = "kernel") -> Adapt:
    """The same inner loop, whose trace has metrics of the codes too: objectives report those of the first step as `support/...`.

    `code_flips`: share of codes that each step changes; `clipped` and `sqnr` (dB): of the parameters before each step. The
    quantizer is only for looking, and rounds to nearest.
    """

    def watched(loss, params, support, key) -> Adapted:
        adapted, trace = adapt(loss, params, support, key)
        path = lax.stop_gradient(trace.params)
        before, after = jax.tree.map(lambda x: x[:-1], path), jax.tree.map(lambda x: x[1:], path)

        def metrics(before, after):
            flips = code_flips(before, after, quantizer, where)
            of_before = {"clipped": clipped_fraction(before, quantizer, where), "sqnr": sqnr(before, quantizer, where)}
            return {"code_flips": flips} | of_before

        return Adapted(adapted, Trace(trace.params, dict(trace.metrics) | jax.vmap(metrics)(before, after)))

    watched.init = lambda params, key: initial(adapt, params, key)
    return watched


def selected(params: Params, where: str) -> dict[str, Array]:
    """The arrays by path, of those paths that the pattern finds."""
    named = {leaf_name(path): x for path, x in jax.tree.flatten_with_path(params)[0]}
    found = {name: x for name, x in named.items() if re.search(where, name)}
    if not found:
        raise ValueError(f"where={where!r}: finds no parameter; the paths are {', '.join(named)}")
    return found


def _share(flags: list[Array]) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(x) for x in flags])) / sum(x.size for x in flags)


def _log10(x):
    return jnp.log10(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
