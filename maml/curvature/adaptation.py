"""The curvature that an inner loop meets, and what it makes of the parameters: for one task; more are a `vmap`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from maml.curvature.matrices import Function
from maml.curvature.products import Matvec, hvp, of_loss
from maml.curvature.spectra import Spectrum, dot, lanczos
from maml.types import Adapt, Batch, Key, Loss, MetaParams, Params, Task


class Path(NamedTuple):
    """What each inner step s = θₜ₊₁ - θₜ met, leaves [steps].

    Attributes:
      loss, gradient_norm: on the support set before the step.
      step_norm: |s|.
      curvature: κ = sᵀHs / |s|², along the step; for SGD along the gradient. 0 where the step is.
      predicted: decrease that a quadratic promises, -gᵀs - ½ sᵀHs; for SGD of step size α it is α|g|²(1 - ακ/2).
      actual: decrease of the loss.
    """

    loss: Float[Array, " steps"]
    gradient_norm: Float[Array, " steps"]
    step_norm: Float[Array, " steps"]
    curvature: Float[Array, " steps"]
    predicted: Float[Array, " steps"]
    actual: Float[Array, " steps"]


def adaptation_path(adapt: Adapt, loss: Loss, params: Params, support: Batch, key: Key) -> Path:
    """The path of an inner loop of any optimizer: one Hessian-vector product for each step, at the key of that step.

    Parameters with a row for each step (`inner_loop.per_step`) are those of the step; it does not move them.

    Raises:
      ValueError: for a semi-gradient, whose field has no Hessian.
    """
    of_loss(loss, support, key)
    path = adapt(loss, params, support, key).trace.params
    after = jax.tree.map(lambda x: x[1:], path)
    start = params.params if isinstance(params, MetaParams) else params
    before = jax.tree.map(lambda x, of: x[:-1] if x.shape[1:] == jnp.shape(of) else x[1:], path, start)
    count = len(jax.tree.leaves(after)[0])

    def one(each):
        here, there, key = each
        f = of_loss(loss, support, key)
        step = jax.tree.map(jnp.subtract, there, here)
        value, gradient = jax.value_and_grad(f)(here)
        length, bend = dot(step, step), dot(step, hvp(f, here)(step))
        curvature = jnp.where(length > 0, bend / jnp.where(length > 0, length, 1), 0)
        return Path(
            loss=value,
            gradient_norm=optax.tree.norm(gradient),
            step_norm=jnp.sqrt(length),
            curvature=curvature,
            predicted=-dot(gradient, step) - bend / 2,
            actual=value - f(there),
        )

    return lax.map(one, (before, after, jax.random.split(key, count)))


class StableStep(NamedTuple):
    """The largest step size at which gradient descent does not diverge on the quadratic at hand, and its bounds.

    `low` and `high` come from the residual of λmax. Infinite where nothing curves upwards.
    """

    step_size: Array
    low: Array
    high: Array


def stable_step_size(matvec: Matvec, like: Params, k: int, key: Key, momentum: float = 0.0) -> StableStep:
    """2 (1 + β) / λmax of a Hessian known by its products: for SGD with heavy-ball momentum β (Polyak 1964).

    λmax is the largest eigenvalue and not the largest in magnitude. For the step size of one layer give the product of that
    layer: `hvp(*restricted(f, params, "layers/0"))`.

    Raises:
      ValueError: for a momentum that is not in [0, 1), and a k that is not among 1 ... parameters.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: give 0 or more, and less than 1")
    spectrum = lanczos(matvec, like, k, key)
    largest, residual = spectrum.values[-1], spectrum.residuals[-1]

    def of(value):
        return jnp.where(value > 0, 2 * (1 + momentum) / jnp.where(value > 0, value, 1), jnp.inf)

    return StableStep(of(largest), of(largest + residual), of(largest - residual))


def spectra(adapt: Adapt, loss: Loss, params: Params, task: Task, key: Key, k: int) -> dict[str, Spectrum]:
    """Spectra of the Hessian: "support/before", "support/after" adaptation, and "query/..."."""
    key_adapt, key_loss, key_start = jax.random.split(key, 3)
    adapted, (path, _) = adapt(loss, params, task.support, key_adapt)
    start = jax.tree.map(lambda x: x[0], path)
    return {
        f"{side}/{when}": lanczos(hvp(of_loss(loss, batch, key_loss), at), at, k, key_start)
        for side, batch in task._asdict().items()
        for when, at in (("before", start), ("after", adapted))
    }


def update_singular_values(
    adapt: Adapt, loss: Loss, params: Params, support: Batch, key: Key, *, limit: float = 2e9
) -> Float[Array, " parameters"]:
    """Singular values of ∂θ_K/∂θ₀, in descending order: of Π (I - αH_k) for SGD. Far above 1 the meta-gradient explodes.

    Raises:
      ValueError: where the Jacobian would take more than `limit` bytes.
    """
    adapt, params = _of_model(adapt, params)
    flat, unravel = ravel_pytree(params)
    if (needed := flat.size**2 * flat.dtype.itemsize) > limit:
        raise ValueError(
            f"update_singular_values: the Jacobian of {flat.size} parameters takes {needed / 1e9:.3g} GB, over "
            f"limit={limit / 1e9:.3g} GB; use largest_update_singular_values"
        )

    def update(x):
        return ravel_pytree(adapt(loss, unravel(x), support, key).params)[0]

    return jnp.linalg.svd(jax.jacrev(update)(flat), compute_uv=False)


def largest_update_singular_values(
    adapt: Adapt, loss: Loss, params: Params, support: Batch, key: Key, k: int, key_start: Key
) -> Float[Array, " k"]:
    """The same from k Lanczos steps on JᵀJ, in descending order: the first are those of J."""
    adapt, params = _of_model(adapt, params)
    at, pull = jax.vjp(lambda p: adapt(loss, p, support, key).params, params)
    push = jax.vjp(lambda u: pull(u)[0], at)[
        1
    ]  # J v without forward mode, which `derivatives.mixed` and iMAML have not
    spectrum = lanczos(lambda v: pull(push(v)[0])[0], params, k, key_start)
    return jnp.sqrt(jnp.maximum(spectrum.values[::-1], 0))


def _of_model(adapt: Adapt, params: Params) -> tuple[Adapt, Params]:
    """The inner loop as a function of the model's parameters alone, those of its own as they are; and these parameters."""
    if not isinstance(params, MetaParams):
        return adapt, params
    return lambda loss, start, support, key: adapt(loss, params._replace(params=start), support, key), params.params


class Comparison(NamedTuple):
    """Of a first-order meta-gradient to the full one: cosine, and ratio of norms (first order over full)."""

    cosine: Array
    norm_ratio: Array


def first_order_comparison(full: Function, first_order: Function, params: Params) -> Comparison:
    """What first order drops: two objectives of the meta-parameters whose inner loops differ in their derivative alone."""
    a, b = jax.grad(full)(params), jax.grad(first_order)(params)
    squares: Any = dot(a, a), dot(b, b)
    norm = jnp.sqrt(squares[0]) * jnp.sqrt(squares[1])  # the product of the squares would be 0 of small gradients
    return Comparison(dot(a, b) / jnp.where(norm > 0, norm, 1), jnp.sqrt(squares[1] / squares[0]))
