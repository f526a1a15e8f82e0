"""The unrolled inner loop: steps of any optax optimizer, for one task."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maml.derivatives import Derivative, Truncated, in_bfloat16, pieces, reverse
from maml.types import Adapt, Adapted, Indexed, Loss, Params, Trace, equations, numbers, whole

_GRADIENT = "inner_gradient"
"""The name under which rematerialisation finds what it keeps."""

_TINY = 1e-15
"""Small against any gradient that matters; its square is still a normal float32 number."""


_SMOOTH = frozenset(
    ("add", "sub", "mul", "neg", "convert_element_type", "broadcast_in_dim", "stop_gradient", "jit", "pjit")
)
"""Operations whose derivatives are finite everywhere."""

_SMALL = 10_000
"""Parameters below which the overhead of a loop weighs more than its steps."""


def unroll(
    optimizer: optax.GradientTransformation,
    steps: int,
    derivative: Derivative | Truncated = reverse,
    remat: int | None = None,
    precision: str = "float32",
) -> Adapt:
    """An inner loop of `steps` updates of any optax optimizer, under `lax.scan`.

    θₜ₊₁ = θₜ + update(∇L(θₜ; support)), t = 0..steps-1; with `optax.sgd(α)` this is MAML's inner loop (arXiv 1703.03400,
    Eq. 1). The optimizer's state starts afresh for each task. Zero steps give the parameters back.

    Args:
      derivative: how the outer derivative passes through a step: `derivatives.reverse`, `mixed`, `first_order`, `truncated(k)`.
      remat: rematerialise blocks of so many steps: the backward pass keeps the parameters (and the optimizer's state) between
        blocks alone, and computes each block again; inner gradients are kept where the optimizer needs them, as in MixFlow-MG
        (arXiv 2505.00793). Memory is steps/remat · |θ| and what `remat` steps take. None: everything is kept.
      precision: "bfloat16": inner losses and their gradients are computed in it (`derivatives.in_bfloat16`), the parameters and
        all that the outer loop sees stay in float32.

    Raises:
      ValueError: at the call of this factory, for a negative or fractional number of steps, a block of none, another precision.
    """
    if not whole(steps, 0):
        raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, 0 or more")
    if remat is not None and not whole(remat, 1):
        raise ValueError(f"remat={remat!r}: give the steps of a block, 1 or more, or None to keep everything")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision={precision!r}: give float32 or bfloat16")

    def adapt(loss: Loss, params, support, key) -> Adapted:
        indexed = getattr(loss, "indexed", False)

        def run(of: Derivative):
            gradient = (in_bfloat16(of) if precision == "bfloat16" else of)(loss)

            def step(carry, of_step):
                params, state = carry
                key_step, batch = (of_step[0], Indexed(support, of_step[1], key)) if indexed else (of_step, support)
                grads, metrics = gradient(params, batch, key_step)
                grads = checkpoint_name(grads, _GRADIENT)
                updates, state = _update(optimizer, grads, state, params)
                params = optax.apply_updates(params, updates)
                return (params, state), Trace(params, numbers(metrics))

            return step

        carry, traces, done = (params, optimizer.init(params)), [], 0
        keys, counted = jax.random.split(key, steps), jnp.arange(steps)
        for count, of in pieces(derivative, steps):
            here = slice(done, done + count)
            each = (keys[here], counted[here]) if indexed else keys[here]
            carry, trace = _repeat(run(of), carry, each, count, remat)
            traces, done = [*traces, trace], done + count
        trace = _joined(traces)
        path = jax.tree.map(lambda x, xs: jnp.concatenate([jnp.asarray(x)[None], xs]), params, trace.params)
        return Adapted(carry[0], Trace(path, trace.metrics))

    return adapt


def _repeat(step, carry, each, steps: int, remat: int | None):
    """`lax.scan` of a step over what each step is given, in rematerialised blocks.

    The first step stands outside of the scan: there all tasks share the parameters, and a map over tasks keeps them shared. A few
    steps of a small network are written out, which takes half the time.
    """
    if steps == 0:
        return lax.scan(step, carry, each)

    def part(start, stop=None):
        return jax.tree.map(lambda x: x[start:stop], each)

    def block(carry, each):
        return lax.scan(step, carry, each) if len(jax.tree.leaves(each)[0]) > 1 else _single(step, carry, each)

    if remat is None:
        carry, first = _single(step, carry, each)
        size = sum(x.size for x in jax.tree.leaves(carry[0]))
        carry, rest = lax.scan(step, carry, part(1), unroll=size <= _SMALL and steps <= 10)
        return carry, _joined([first, rest])
    size = min(remat, steps)
    count = (steps - 1) // size  # whole blocks after the first, which takes what is left over
    left = steps - count * size
    carry, first = _rematerialised(block, prevent_cse=True)(carry, part(0, left))
    blocks = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), part(left))
    carry, rest = lax.scan(_rematerialised(block), carry, blocks)
    return carry, _joined([first, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rest)])


def _rematerialised(block, *, prevent_cse: bool = False):
    policy = jax.checkpoint_policies.save_only_these_names(_GRADIENT)
    return jax.checkpoint(block, policy=policy, prevent_cse=prevent_cse)


def _single(step, carry, each):
    carry, trace = step(carry, jax.tree.map(lambda x: x[0], each))
    return carry, jax.tree.map(lambda x: x[None], trace)


def _joined(traces: Sequence[Trace]) -> Trace:
    """Traces end to end."""
    return traces[0] if len(traces) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *traces)


def _update(optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    """The optimizer's update and state: their values at the gradient, their derivatives 1e-15 beside it where it is zero.

    Adam and its kin take the root of a running mean of squares, and norms the root of a sum: at zero the derivative of the
    root is infinite, and the chain rule gives inf · 0 = NaN in the meta-gradient (optax #882), although the map from gradient to
    update has a derivative there. The values are optax's own to the bit. An optimizer that only adds and multiplies, as SGD and
    momentum do, needs no second update. Parameters stay where they are: beside zero trust ratios (LARS, LAMB) are others.
    """
    made = jax.make_jaxpr(optimizer.update)(grads, state, params)
    if all(eqn.primitive.name in _SMOOTH for eqn, _ in equations(made.jaxpr)):
        return optimizer.update(grads, state, params)
    values = optimizer.update(*jax.tree.map(lax.stop_gradient, (grads, state, params)))
    beside = jax.tree.map(lambda g: g + lax.stop_gradient(jnp.where(g == 0, _TINY, 0).astype(g.dtype)), grads)
    moved = optimizer.update(beside, state, params)

    def join(value, moved):
        # `value` may still depend on what the optimizer closes over (learned step sizes): their derivative is that of `moved`.
        real = jnp.issubdtype(moved.dtype, jnp.inexact)
        return lax.stop_gradient(value) + (moved - lax.stop_gradient(moved)) if real else value

    return jax.tree.map(join, values, moved)
