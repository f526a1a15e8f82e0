"""Eigenvalues, spectral densities, traces and diagonals of symmetric matrices that are known by their products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from maml.curvature.products import Matvec
from maml.types import Key, Params


class Spectrum(NamedTuple):
    """Ritz values of a symmetric matrix in ascending order, both ends of its spectrum first to converge.

    Attributes:
      values: [k].
      vectors: unit Ritz vectors, leaves [k, ...].
      residuals: [k] |A x - θ x|, from a product with the matrix itself: an eigenvalue lies within it of θ.
      weights: [k] squared first components: a Gauss quadrature of the spectrum as the start vector sees it. They sum to 1.
      breakdown: steps after which the start vector's Krylov space was exhausted (k: it was not); then come restarts.
    """

    values: Float[Array, " k"]
    vectors: Params
    residuals: Float[Array, " k"]
    weights: Float[Array, " k"]
    breakdown: Array


def lanczos(matvec: Matvec, like: Params, k: int, key: Key, start: Params | None = None) -> Spectrum:
    """k steps of Lanczos with full reorthogonalisation, which survive the end of the Krylov space.

    Few-shot GGNs have a rank far below k. There the remainder is rounding, and normalised it is no new direction: eigenvalues
    outside of the spectrum follow (matfree 0.6.3: 540 times too large at rank 20). So where the remainder is below 64 ε times
    the size of the matrix, the coupling is 0 and a random direction takes its place; all are orthogonalised twice, and once
    more when normalised. Restarts also find repeated eigenvalues, of which one start vector sees one each.

    Args:
      like: parameters, whose shapes and dtype the vectors have.
      start: the first direction; None: random.

    Raises:
      ValueError: for a k below 1 or above the number of parameters.
    """
    flat, unravel = ravel_pytree(like)
    if not 1 <= k <= flat.size:
        raise ValueError(f"k={k}: there are {flat.size} parameters; give 1 to {flat.size} steps")

    def product(x):
        return ravel_pytree(matvec(unravel(x)))[0]

    def random(i):
        return jax.random.normal(jax.random.fold_in(key, i), flat.shape, flat.dtype)

    first = _unit(random(0) if start is None else ravel_pytree(start)[0])
    basis, alphas, betas = _tridiagonal(product, first, lambda i: random(i + 1), k)
    inner = betas[: k - 1]
    values, mix = jnp.linalg.eigh(jnp.diag(alphas) + jnp.diag(inner, 1) + jnp.diag(inner, -1))
    vectors = jax.vmap(_unit)(mix.T @ basis)
    residuals = lax.map(lambda pair: jnp.linalg.norm(product(pair[1]) - pair[0] * pair[1]), (values, vectors))
    broken = jnp.append(inner == 0, False)  # of one step there is nothing to break
    breakdown = jnp.where(broken.any(), jnp.argmax(broken) + 1, k)
    return Spectrum(values, jax.vmap(unravel)(vectors), residuals, mix[0] ** 2, breakdown)


def _tridiagonal(product: Callable, first: jax.Array, random: Callable, k: int):
    """Orthonormal basis [k, n], diagonal [k] and couplings [k] (the last leads out of the basis)."""
    tiny = 64 * jnp.finfo(first.dtype).eps

    def step(i, carry):
        basis, alphas, betas, q, scale = carry
        basis = basis.at[i].set(q)
        image = product(q)
        alpha = jnp.vdot(q, image)
        rest = _orthogonal(_orthogonal(image, basis), basis)
        beta = jnp.linalg.norm(rest)
        scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
        broken = beta <= tiny * scale
        fresh = _unit(_orthogonal(_unit(random(i)), basis))
        following = jnp.where(broken, fresh, rest / jnp.where(broken, 1, beta))
        following = _unit(_orthogonal(_unit(_orthogonal(following, basis)), basis))
        return basis, alphas.at[i].set(alpha), betas.at[i].set(jnp.where(broken, 0, beta)), following, scale

    zeros = jnp.zeros(k, first.dtype)
    start = (jnp.zeros((k, first.size), first.dtype), zeros, zeros, first, jnp.zeros((), first.dtype))
    return lax.fori_loop(0, k, step, start)[:3]


def _orthogonal(x: jax.Array, basis: jax.Array) -> jax.Array:
    shares = jnp.matmul(basis, x, precision="highest")  # orthogonality does not survive a GPU's short products
    return x - jnp.matmul(shares, basis, precision="highest")


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x)
    return x / jnp.where(norm > 0, norm, 1)


class Density(NamedTuple):
    """A spectral density, smoothed by a Gaussian of `bandwidth`: `grid` and `density` [points], the quadrature [probes, k]."""

    grid: Float[Array, " points"]
    density: Float[Array, " points"]
    bandwidth: Array
    nodes: Float[Array, "probes k"]
    weights: Float[Array, "probes k"]


def spectral_density(
    matvec: Matvec, like: Params, k: int, probes: int, key: Key, *, bandwidth: float | None = None, points: int = 200
) -> Density:
    """Stochastic Lanczos quadrature: Ubaru et al. 2017; Ghorbani et al. 2019 (arXiv 1901.10159).

    Each of `probes` random starts gives nodes and weights that are exact for the first 2k - 1 moments of the spectrum as it sees
    it. bandwidth: None is a hundredth of the width of the spectrum. Report it, k and probes with a figure.

    Raises:
      ValueError: for a bandwidth that is not positive, no probe, and as `lanczos`.
    """
    if probes < 1 or (bandwidth is not None and bandwidth <= 0):
        raise ValueError(
            f"probes={probes}, bandwidth={bandwidth}: give a probe or more, and a positive bandwidth or None"
        )
    runs = lax.map(lambda one: _quadrature(matvec, like, k, one), jax.random.split(key, probes))
    low, high = runs[0].min(), runs[0].max()
    width = jnp.maximum(high - low, jnp.finfo(low.dtype).eps * jnp.maximum(jnp.abs(high), 1))
    sigma = width / 100 if bandwidth is None else jnp.asarray(bandwidth, width.dtype)
    grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, points)
    bells = jnp.exp(-0.5 * jnp.square((grid[:, None, None] - runs[0][None]) / sigma)) / (sigma * jnp.sqrt(2 * jnp.pi))
    density = (bells * runs[1][None]).sum((1, 2)) / probes
    return Density(grid, density, sigma, *runs)


def _quadrature(matvec: Matvec, like: Params, k: int, key: Key):
    spectrum = lanczos(matvec, like, k, key)
    return spectrum.values, spectrum.weights


class Estimate(NamedTuple):
    """A mean over random probes and its standard error, a number or like the parameters."""

    mean: Any
    standard_error: Any


def trace(matvec: Matvec, like: Params, probes: int, key: Key) -> Estimate:
    """tr A ≈ mean of vᵀ A v over Rademacher vectors v: Hutchinson 1990. Its variance is 2 Σ_{i≠j} A_ij² / probes.

    Raises:
      ValueError: for fewer than 2 probes, which have no standard error.
    """
    return _mean_over_probes(lambda v: dot(v, matvec(v)), like, probes, key)


def diagonal(matvec: Matvec, like: Params, probes: int, key: Key) -> Estimate:
    """diag A ≈ mean of v ⊙ A v over Rademacher vectors v, like the parameters: Bekas et al. 2007. Exact for a diagonal matrix.

    Raises:
      ValueError: for fewer than 2 probes, which have no standard error.
    """
    return _mean_over_probes(lambda v: jax.tree.map(jnp.multiply, v, matvec(v)), like, probes, key)


def _mean_over_probes(value: Callable, like: Params, probes: int, key: Key) -> Estimate:
    if probes < 2:
        raise ValueError(f"probes={probes}: give 2 or more, a standard error needs them")
    flat, unravel = ravel_pytree(like)
    samples = lax.map(
        lambda one: value(unravel(jax.random.rademacher(one, flat.shape, flat.dtype))), jax.random.split(key, probes)
    )
    spread = jax.tree.map(lambda x: x.std(0, ddof=1) / probes**0.5, samples)
    return Estimate(jax.tree.map(lambda x: x.mean(0), samples), spread)


def dot(a: Params, b: Params) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))
