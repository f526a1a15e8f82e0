"""Sharpness of a loss, and slices through it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maml.curvature.matrices import Function
from maml.curvature.products import hvp
from maml.curvature.spectra import dot, lanczos
from maml.types import Key, Params


class Sharpness(NamedTuple):
    """Largest eigenvalue of the Hessian with its residual, and the rise of f at `rho` along the gradient."""

    largest: Array
    residual: Array
    rise: Array


def sharpness(f: Function, params: Params, k: int, key: Key, rho: float = 0.05) -> Sharpness:
    """λmax by k Lanczos steps; f(θ + ρ g/|g|) - f(θ), the first-order sharpness of SAM, Foret et al. 2021 (arXiv 2010.01412).

    Raises:
      ValueError: for a rho that is not positive.
    """
    if not rho > 0:
        raise ValueError(f"rho={rho}: give a positive radius, in units of the parameters")
    spectrum, (value, gradient) = lanczos(hvp(f, params), params, k, key), jax.value_and_grad(f)(params)
    norm = jnp.sqrt(dot(gradient, gradient))
    ahead = jax.tree.map(lambda p, g: p + rho * g / jnp.where(norm > 0, norm, 1), params, gradient)
    return Sharpness(spectrum.values[-1], spectrum.residuals[-1], f(ahead) - value)


def filter_normalised(key: Key, params: Params) -> Params:
    """A random direction whose filters have the norms of the parameters' own: Li et al. 2018 (arXiv 1712.09913), section 4.

    A filter is what leads to one output unit: in Flax the *last* axis of a kernel. Biases and norms (one axis, or none) stay.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([_filters(k, x) for k, x in zip(keys, leaves, strict=True)])


def _filters(key: Key, x: jax.Array) -> jax.Array:
    if x.ndim < 2:
        return jnp.zeros_like(x)
    direction, axes = jax.random.normal(key, x.shape, x.dtype), tuple(range(x.ndim - 1))
    own, its = (jnp.sqrt(jnp.square(a).sum(axes, keepdims=True)) for a in (x, direction))
    return direction * own / jnp.where(its > 0, its, 1)


def slice_1d(f: Function, params: Params, direction: Params, steps: Float[Array, " points"]) -> Float[Array, " points"]:
    """f(θ + t d) for each t."""
    return lax.map(lambda t: f(jax.tree.map(lambda p, d: p + t * d, params, direction)), steps)


def slice_2d(
    f: Function, params: Params, directions: tuple[Params, Params], steps: tuple[Array, Array]
) -> Float[Array, "first second"]:
    """f(θ + s a + t b) for each s of steps[0] and each t of steps[1]."""
    first, second = directions
    one, two = steps

    def row(s):
        return slice_1d(f, jax.tree.map(lambda p, d: p + s * d, params, first), second, two)

    return lax.map(row, one)
