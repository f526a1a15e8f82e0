"""Products of Hessian, Gauss-Newton and Fisher matrices with vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maml.curvature.matrices import Function
from maml.types import Batch, Key, Loss, Params, holds_semi_gradient

Matvec = Callable[[Params], Params]


def of_loss(loss: Loss, batch: Batch, key: Key) -> Function:
    """The loss on one batch as a function of the parameters alone.

    Raises:
      ValueError: for a semi-gradient, which is no gradient: its Jacobian is not symmetric, and has no Hessian; when traced, for
        a loss that is made of one.
    """
    if not getattr(loss, "is_gradient", True):
        raise ValueError(_NO_GRADIENT)

    def value(params):
        if holds_semi_gradient(jax.make_jaxpr(loss)(params, batch, key).jaxpr):
            raise ValueError(_NO_GRADIENT)
        return loss(params, batch, key)[0]

    return value


_NO_GRADIENT = (
    "curvature of a semi-gradient: its Jacobian is not symmetric, so Lanczos and 2/λmax do not apply; take jax.jacfwd of "
    "derivatives.reverse(loss), and the spectral radius of I - αJ"
)


def over_batches(loss: Loss, batches: Batch, key: Key, weights: Float[Array, " batches"] | None = None) -> Function:
    """The mean loss over batches [batches, ...] as a function of the parameters, one batch at a time in memory.

    weights: the examples in each batch where they differ; the mean is over examples then, and not over batches.
    """
    shares = _shares(batches, weights)

    def mean(params):
        @jax.checkpoint
        def add(total, one):
            batch, share = one
            return total + share * of_loss(loss, batch, key)(params), None

        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
        return lax.scan(add, zero, (batches, shares.astype(zero.dtype)))[0]

    of_loss(loss, batches, key)
    return mean


def matvec_over_batches(
    product: Callable[[Batch], Matvec], batches: Batch, weights: Float[Array, " batches"] | None = None
) -> Matvec:
    """v -> the mean over batches [batches, ...] of their products with v, one batch at a time: of GGN and Fisher matrices too.

    `product(batch)` is the product of one batch, such as `ggnvp(lambda p: apply(p, batch[0]), ..., params)`; weights as in
    `over_batches`.
    """
    shares = _shares(batches, weights)

    def mean(v):
        def add(total, one):
            batch, share = one
            return jax.tree.map(lambda t, x: t + share.astype(x.dtype) * x, total, product(batch)(v)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, v), (batches, shares))[0]

    return mean


def _shares(batches: Batch, weights: Array | None) -> Array:
    count = len(jax.tree.leaves(batches)[0])
    return jnp.full(count, 1 / count) if weights is None else weights / jnp.sum(weights)


def hvp(f: Function, params: Params, mode: str = "fwd_over_rev") -> Matvec:
    """v -> H v, the Hessian of f at `params` times a vector like them.

    mode: "fwd_over_rev" (one linearization that all products share, the default), "rev_over_rev" (for an f with no forward mode,
      such as one that holds `derivatives.mixed`), "rev_over_fwd".

    Raises:
      ValueError: for another mode.
    """
    if mode == "fwd_over_rev":
        return jax.linearize(jax.grad(f), params)[1]
    if mode == "rev_over_rev":
        pull = jax.vjp(jax.grad(f), params)[1]
        return lambda v: pull(v)[0]
    if mode == "rev_over_fwd":
        return lambda v: jax.grad(lambda p: jax.jvp(f, (p,), (v,))[1])(params)
    raise ValueError(f"mode={mode!r}: give fwd_over_rev, rev_over_rev or rev_over_fwd")


def ggnvp(outputs: Callable[[Params], Any], loss: Callable[[Any], Float[Array, ""]], params: Params) -> Matvec:
    """v -> Jᵀ H J v, the generalised Gauss-Newton matrix of loss(outputs(params)): Schraudolph 2002.

    J is the Jacobian of the outputs, H the Hessian of the loss in the outputs: positive semi-definite for a convex loss.
    """
    at, push = jax.linearize(outputs, params)
    pull, product = jax.linear_transpose(push, params), hvp(loss, at)
    return lambda v: pull(product(push(v)))[0]


def efvp(losses: Callable[[Params], Float[Array, " examples"]], params: Params) -> Matvec:
    """v -> mean over examples of g (g · v), the empirical Fisher matrix of per-example gradients g; never all there."""
    at, push = jax.linearize(losses, params)
    pull = jax.linear_transpose(push, params)
    return lambda v: jax.tree.map(lambda x: x / len(at), pull(push(v))[0])
