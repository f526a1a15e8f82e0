"""Problems whose answers are known: quadratic losses, where every inner loop is a matrix."""

from collections.abc import Collection, Iterable, Set
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml.types import Task


class Quadratic(NamedTuple):
    """L(θ; (A, b)) = ½ (θ - b)ᵀ A (θ - b), with gradient A(θ - b) and Hessian A."""

    curvature: np.ndarray
    center: np.ndarray


def quadratic_loss(params, batch, key):
    del key
    curvature, center = batch
    difference = params - center
    value = 0.5 * difference @ curvature @ difference
    return value, {"loss": value}


def quadratics(seed: int, size: int = 4, tasks: int = 3) -> Task:
    """Tasks with positive definite curvatures (eigenvalues 0.5 to 2) for support and query; float64."""
    generator = np.random.default_rng(seed)

    def draw() -> Quadratic:
        q, _ = np.linalg.qr(generator.normal(size=(size, size)))
        return Quadratic((q * np.linspace(0.5, 2.0, size)) @ q.T, generator.normal(size=size))

    pairs = [(draw(), draw()) for _ in range(tasks)]
    support, query = (jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *side) for side in zip(*pairs, strict=True))
    return Task(tuple(support), tuple(query))


def gradient_descent(quadratic: Quadratic, params: np.ndarray, step_size: float, steps: int):
    """Closed form of `steps` gradient steps: (θₖ, J) with J = (I - αA)ᵏ and θₖ = b + J(θ - b)."""
    identity = np.eye(len(params))
    jacobian = np.linalg.matrix_power(identity - step_size * quadratic.curvature, steps)
    return quadratic.center + jacobian @ (params - quadratic.center), jacobian


def closed_form(tasks: Task, params: np.ndarray, step_size: float, steps: int, first_order: bool):
    """The meta-gradient: mean over tasks of Jᵀ C (θₖ - c) (MAML) or C (θₖ - c) (FOMAML)."""
    gradients = []
    for i in range(len(tasks.support[0])):
        support, query = (Quadratic(*(np.asarray(x[i]) for x in side)) for side in tasks)
        adapted, jacobian = gradient_descent(support, params, step_size, steps)
        outer = query.curvature @ (adapted - query.center)
        gradients.append(outer if first_order else jacobian.T @ outer)
    return np.mean(gradients, 0)


def central_difference(f, params, direction, epsilon: float = 1e-5) -> float:
    """Directional derivative of a scalar function of a pytree, in float64."""
    moved = partial(jax.tree.map, lambda p, d, s: p + s * epsilon * d, params, direction)
    at = [f(moved(jax.tree.map(lambda d, s=s: jnp.asarray(s, d.dtype), direction))) for s in (1.0, -1.0)]
    return float((at[0] - at[1]) / (2 * epsilon))


def random_like(seed: int, tree):
    """Standard normal values in the structure of a tree."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), tree)


def dot(a, b) -> float:
    return float(sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def twins(default: Collection, everything: Iterable) -> list:
    """Values of a parametrized test: those by default, and as slow ones the others, which tell less than they take."""
    if isinstance(everything, Set):  # each worker of xdist would have another order, and the whole run would be refused
        raise TypeError(f"a set has no order: sort {sorted(everything)}")
    return [
        x if x in default else pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow)
        for x in everything
    ]
