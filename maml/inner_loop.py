"""How the parameters move: the inner loop, for one task."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from maml.derivatives import Derivative, reverse
from maml.types import Adapt, Adapted, Loss, Params, Trace

_TINY = 1e-15
"""Small against any gradient that matters; its square is still a normal float32 number."""


def unroll(optimizer: optax.GradientTransformation, steps: int, derivative: Derivative = reverse) -> Adapt:
    """An inner loop of `steps` updates of any optax optimizer, under one `lax.scan`.

    θₜ₊₁ = θₜ + update(∇L(θₜ; support)), t = 0..steps-1; with `optax.sgd(α)` this is MAML's inner loop (arXiv 1703.03400,
    Eq. 1). The optimizer's state starts afresh for each task. Zero steps give the parameters back.

    Raises:
      ValueError: at the call of this factory, for a negative or fractional number of steps.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, 0 or more")

    def adapt(loss: Loss, params, support, key) -> Adapted:
        gradient = derivative(loss)

        def step(carry, key):
            params, state = carry
            grads, metrics = gradient(params, support, key)
            updates, state = _update(optimizer, grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), Trace(params, metrics)

        carry, keys = (params, optimizer.init(params)), jax.random.split(key, steps)
        if steps == 0:
            return Adapted(params, lax.scan(step, carry, keys)[1])
        # The first step stands outside: there all tasks share the parameters, and a map over tasks keeps them shared.
        carry, first = step(carry, keys[0])
        trace = jax.tree.map(lambda x: x[None], first)
        if steps > 1:
            carry, rest = lax.scan(step, carry, keys[1:])
            trace = jax.tree.map(lambda *x: jnp.concatenate(x), trace, rest)
        return Adapted(carry[0], trace)

    return adapt


def _update(optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    """The optimizer's update and state: their values at the gradient, their derivatives 1e-15 beside it where it is zero.

    Adam and its kin take the root of a running mean of squares, and norms the root of a sum: at zero the derivative of the
    root is infinite, and the chain rule gives inf · 0 = NaN in the meta-gradient (optax #882), although the map from gradient to
    update has a derivative there. The values are optax's own to the bit.
    """
    values = optimizer.update(*jax.tree.map(lax.stop_gradient, (grads, state, params)))
    beside = jax.tree.map(lambda g: g + lax.stop_gradient(jnp.where(g == 0, _TINY, 0).astype(g.dtype)), grads)
    moved = optimizer.update(beside, state, params)

    def join(value, moved):
        return value + (moved - lax.stop_gradient(moved)) if jnp.issubdtype(moved.dtype, jnp.inexact) else value

    return jax.tree.map(join, values, moved)


def only(where: Any, adapt: Adapt) -> Adapt:
    """Run `adapt` on the parameters that `where` selects; the others stay, and are still differentiated by the outer loop.

    `where` is an NNX filter: a predicate (path, value) -> bool, `nnx.PathContains("head")`, `nnx.Not(...)`; the paths of a
    pytree that is no `nnx.State` are its dict keys, indices and field names.

    Raises:
      ValueError: when the adapted loop starts, if the filter selects nothing.
    """
    selects = nnx.filterlib.to_predicate(where)

    def partial_adapt(loss: Loss, params, support, key) -> Adapted:
        leaves, structure = jax.tree.flatten_with_path(params)
        paths = [tuple(map(_name, path)) for path, _ in leaves]
        moving = {i: x for i, (_, x) in enumerate(leaves) if selects(paths[i], x)}
        if not moving:
            raise ValueError(f"where={where!r} selects no parameter; the paths are {paths}")

        def join(moving) -> Params:
            return structure.unflatten([moving.get(i, x) for i, (_, x) in enumerate(leaves)])

        adapted = adapt(lambda m, batch, k: loss(join(m), batch, k), moving, support, key)
        trace = Trace(jax.vmap(join)(adapted.trace.params), adapted.trace.metrics)
        return Adapted(join(adapted.params), trace)

    return partial_adapt


def _name(key) -> Any:
    """The dict key, index or field name in an entry of a key path."""
    return next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a))
