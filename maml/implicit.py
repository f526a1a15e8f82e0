"""Adaptation to the optimum of a proximal problem, differentiated by the implicit function theorem."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.sparse.linalg import cg

from maml.types import Adapt, Adapted, Loss, Params, Trace, holds_semi_gradient, whole


def implicit(search: Adapt, strength: float | jax.Array = 1.0, *, cg_steps: int = 5, damping: float = 0.0) -> Adapt:
    """iMAML: φ* = argmin L(φ) + λ/2 |φ - θ|², which `search` finds from θ (Rajeswaran et al., arXiv 1909.04630).

    The outer derivative solves (∇²L(φ) + λI) w = v by conjugate gradients and takes λw for θ (Eq. 6 and Algorithm 2: w/λ is
    their (I + ∇²L/λ)⁻¹v): memory does not grow with the steps of the search. It is that of the exact optimum. Derivatives with
    respect to the support set, and to what the loss closes over, come from the same solve. Only the last parameters of the
    trace have one.

    A metric beside the loss's own: `stationarity`, |∇L(φ) + λ(φ - θ)| / |∇L(θ)| at the end, 0 at the optimum (the same for all
    steps). `residual` reports how far the conjugate gradients come. It can be differentiated once: a second time, where
    the stopped search would give zeros, is refused.

    Args:
      search: an inner loop, such as `unroll(optax.sgd(0.1), 16)`; it is given the proximal loss, and is not differentiated. It
        moves all parameters from θ: what moves a part of them stands outside, `only(where, implicit(...))`.
      strength: λ, above 0, or a traced scalar (a meta-parameter: `inner_loop.learned`).
      cg_steps: products with the Hessian in a solve.
      damping: added to the Hessian in the solve alone, where it is not positive definite.

    Departures of the authors' code, not taken over: it leaves the proximal term out of the inner steps, moves back to θ once
    after them, and solves with another matrix.

    Raises:
      ValueError: for a strength that is not positive, negative damping, cg_steps below 1, and a search that has parameters of
        its own or moves a part; when traced, for a semi-gradient and a loss that is another at each step.
    """
    if isinstance(strength, int | float) and not strength > 0:
        raise ValueError(
            f"strength={strength}: give λ above 0; at 0 there is nothing that pulls to the meta-parameters"
        )
    if damping < 0 or not whole(cg_steps, 1):
        raise ValueError(f"cg_steps={cg_steps!r}, damping={damping}: give 1 step or more, and a damping of 0 or more")
    if hasattr(search, "init"):
        raise ValueError(
            "implicit: the search ends at no optimum of all parameters where it moves a part of them, starts elsewhere, sees "
            "minibatches or has parameters of its own; give unroll(...), and put only(...) and the like outside"
        )

    def adapt(loss: Loss, params, support, key) -> Adapted:
        jaxpr = jax.make_jaxpr(loss)(*lax.stop_gradient((params, support)), key).jaxpr
        if not getattr(loss, "is_gradient", True) or holds_semi_gradient(jaxpr):
            raise ValueError("implicit: a semi-gradient is the gradient of no loss, so there is no optimum to adapt to")
        if getattr(loss, "indexed", False):
            raise ValueError(
                "implicit: the optimum is that of one loss; take no minibatches and no parameters per step"
            )
        fixed, pull = lax.stop_gradient((params, strength))

        def proximal(phi, batch, key):
            value, metrics = loss(phi, batch, key)
            distance = sum(jnp.sum((p - q) ** 2) for p, q in zip(*map(jax.tree.leaves, (phi, fixed)), strict=True))
            return value + pull / 2 * distance, metrics

        found, (path, metrics) = lax.stop_gradient(search(proximal, fixed, support, key))

        def slope(phi):
            """∇L(φ) + λ(φ - θ), which is zero at the optimum."""
            grads = jax.grad(loss, has_aux=True)(phi, support, key)[0]
            return jax.tree.map(lambda g, p, q: g + strength * (p - q), grads, phi, params)

        end, product = jax.linearize(slope, found)
        optimum = _at_root((cg_steps, damping), found, end, lax.stop_gradient(product))
        start = optax.tree.norm(slope(fixed))
        left = lax.stop_gradient(optax.tree.norm(end) / jnp.where(start > 0, start, 1))
        steps = len(jax.tree.leaves(path)[0]) - 1
        path = jax.tree.map(lambda x, last: jnp.concatenate([x[:-1], last[None]]), path, optimum)
        return Adapted(optimum, Trace(path, dict(metrics) | {"stationarity": jnp.full(steps, left)}))

    return adapt


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_root(how: tuple[int, float], found: Params, slope: Params, product: Callable) -> Params:
    """`found`, with the derivative of a root: F(φ, z) = 0 gives dφ = -(∂F/∂φ)⁻¹ ∂F/∂z dz, where F is `slope`."""
    del how, slope, product
    return found


@jax.custom_jvp
def _differentiated_once(found: Params, slope: Params) -> Params:
    del slope
    return found


@_differentiated_once.defjvp
def _refuse(primals, tangents):
    del primals, tangents
    raise ValueError(
        "implicit: iMAML's meta-gradient is that of a root, and has no derivative of its own (a Hessian of the meta-objective): "
        "take an unrolled loop, algorithm=maml"
    )


def _at_root_forward(how, found, slope, product):
    del how
    return _differentiated_once(found, slope), product


def _at_root_backward(how, product, v):
    cg_steps, damping = how
    w = _cg(lambda u: jax.tree.map(lambda h, x: h + damping * x, product(u), u), v, cg_steps)
    return None, jax.tree.map(jnp.negative, w), None


_at_root.defvjp(_at_root_forward, _at_root_backward)


def _cg(matvec, v, steps: int):
    """At most so many steps on A w = v, for v of any size: past the last bit of the residual its square would underflow."""
    v, size = _scaled(v)
    w = cg(matvec, v, tol=float(jnp.finfo(size.dtype).eps), maxiter=steps)[0]
    return jax.tree.map(lambda x: x * size, w)


def _scaled(v):
    """The vector with 1 as its largest number, and the number that it had there; 0 as it is."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(v)]))
    size = jnp.where(largest > 0, largest, 1)
    return jax.tree.map(lambda x: x / size, v), size


def residual(product: Callable[[Params], Params], vector: Params, cg_steps: int) -> jax.Array:
    """|A w - v| / |v| after 0, 1, ..., cg_steps conjugate-gradient steps on A w = v, [cg_steps + 1]; 0 where v is.

    What the outer derivative solves: u -> A u is `product`, (∇²L(φ) + λI) u at the adapted φ, and v, `vector`, the gradient of
    the query loss there.
    """

    vector, _ = _scaled(vector)
    length = optax.tree.norm(vector)

    def after(steps: int):
        w = _cg(product, vector, steps) if steps else jax.tree.map(jnp.zeros_like, vector)
        return optax.tree.norm(jax.tree.map(jnp.subtract, product(w), vector)) / jnp.where(length > 0, length, 1)

    return jnp.stack([after(i) for i in range(cg_steps + 1)])
