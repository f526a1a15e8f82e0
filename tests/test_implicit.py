"""The proximal optimum and its implicit derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml.curvature import hvp
from maml.implicit import _cg, implicit, residual
from maml.inner_loop import from_zero, learned, learned_step_sizes, minibatches, only, unroll
from maml.losses import mse, semi_gradient
from maml.objectives import query_loss
from maml.types import Task, initial
from tests.helpers import Quadratic, central_difference, dot, quadratic_loss, quadratics, random_like

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x64")


def closed(tasks, theta, strength):
    """Optimum (A + λI)⁻¹(A b + λθ) and meta-gradient λ(A + λI)⁻¹ C (φ* - c), means over tasks for the latter."""
    optima, grads = [], []
    for i in range(3):
        support, query = (Quadratic(*(np.asarray(x[i]) for x in side)) for side in tasks)
        matrix = support.curvature + strength * np.eye(4)
        optima.append(np.linalg.solve(matrix, support.curvature @ support.center + strength * theta))
        grads.append(strength * np.linalg.solve(matrix, query.curvature @ (optima[-1] - query.center)))
    return np.stack(optima), np.mean(grads, 0)


def mean_gradient(adapt, theta, tasks):
    objective = query_loss(quadratic_loss, adapt)
    mean = lambda p: jax.vmap(lambda t: objective(p, t, KEY, 0)[0])(tasks).mean()  # noqa: E731
    return np.asarray(jax.jit(jax.grad(mean))(theta))


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_optimum_and_meta_gradient_are_the_closed_form(strength):
    tasks, theta = quadratics(seed=3), np.arange(4.0)
    adapt = implicit(unroll(optax.sgd(0.3), 200), strength, cg_steps=4)
    optima, gradient = closed(tasks, theta, strength)
    found = jax.vmap(lambda s: adapt(quadratic_loss, jnp.asarray(theta), s, KEY).params)(tasks.support)
    np.testing.assert_allclose(found, optima, rtol=1e-10)
    np.testing.assert_allclose(mean_gradient(adapt, jnp.asarray(theta), tasks), gradient, rtol=1e-8)


def test_damping_is_in_the_solve_alone():
    """λ(A + λI + dI)⁻¹C(φ* - c) at the optimum without damping."""
    tasks, theta = quadratics(seed=3), np.arange(4.0)
    optima, _ = closed(tasks, theta, 0.5)
    expected = []
    for i, optimum in enumerate(optima):
        support, query = (Quadratic(*(np.asarray(x[i]) for x in side)) for side in tasks)
        outer = query.curvature @ (optimum - query.center)
        expected.append(0.5 * np.linalg.solve(support.curvature + (0.5 + 0.7) * np.eye(4), outer))
    adapt = implicit(unroll(optax.sgd(0.3), 200), 0.5, cg_steps=4, damping=0.7)
    np.testing.assert_allclose(mean_gradient(adapt, jnp.asarray(theta), tasks), np.mean(expected, 0), rtol=1e-8)


def test_the_error_falls_with_inner_steps_and_with_conjugate_gradients():
    tasks, theta = quadratics(seed=3), np.arange(4.0)
    _, exact = closed(tasks, theta, 0.5)

    def error(steps, cg_steps):
        return np.linalg.norm(
            mean_gradient(implicit(unroll(optax.sgd(0.3), steps), 0.5, cg_steps=cg_steps), jnp.asarray(theta), tasks)
            - exact
        )

    in_steps = [error(n, 4) for n in (1, 2, 5, 15, 50)]
    in_cg = [error(200, n) for n in (1, 2, 3, 4)]
    assert in_steps == sorted(in_steps, reverse=True)
    assert in_cg == sorted(in_cg, reverse=True)
    assert max(in_steps[-1], in_cg[-1]) < 1e-5 * min(in_steps[0], in_cg[0])


def test_stationarity_falls_to_zero_and_the_residual_too():
    tasks = quadratics(seed=3)
    support, query = (jax.tree.map(lambda x: x[0], side) for side in tasks)
    loops = {
        n: implicit(unroll(optax.sgd(0.3), n), 0.5)(quadratic_loss, jnp.arange(4.0), support, KEY) for n in (1, 5, 60)
    }
    seen = [np.asarray(adapted.trace.metrics["stationarity"]) for adapted in loops.values()]
    assert [x.shape for x in seen] == [(1,), (5,), (60,)]
    assert 1 > seen[0][0] > seen[1][0] > seen[2][0]
    assert seen[2][-1] < 1e-8
    shrink = np.eye(4) - 0.3 * (np.asarray(support[0]) + 0.5 * np.eye(4))  # of the slope, in one step
    slope = np.asarray(support[0]) @ (np.arange(4.0) - np.asarray(support[1]))
    assert seen[0][0] == pytest.approx(np.linalg.norm(shrink @ slope) / np.linalg.norm(slope), rel=1e-10)
    adapted = loops[60]
    vector = jax.grad(lambda p: quadratic_loss(p, query, KEY)[0])(adapted.params)
    product = hvp(lambda p: quadratic_loss(p, support, KEY)[0], adapted.params)
    left = np.asarray(residual(lambda u: product(u) + 0.5 * u, vector, 4))
    assert left[0] == pytest.approx(1.0)
    assert left[-1] < 1e-10
    one = left[1]  # by hand: the first step goes along v
    matrix, v = np.asarray(support[0]) + 0.5 * np.eye(4), np.asarray(vector)
    w = (v @ v) / (v @ matrix @ v) * v
    assert one == pytest.approx(np.linalg.norm(matrix @ w - v) / np.linalg.norm(v), rel=1e-10)


def test_every_cotangent_is_the_central_difference_at_the_optimum():
    """Of θ, the support set, and λ, which the loop closes over; a network, not a quadratic."""
    x, y = random_like(0, jnp.zeros((2, 6, 2))), random_like(1, jnp.zeros((2, 6, 1)))
    loss = mse(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
    params = {"a": random_like(2, jnp.zeros((2, 3))), "b": random_like(3, jnp.zeros((3, 1)))}
    adapt = learned(
        lambda h: implicit(unroll(optax.sgd(0.2), 400), h, cg_steps=9),
        lambda params, key: jnp.float64(1.5),  # noqa: ARG005
    )

    def value(arguments):
        meta, inputs = arguments
        return query_loss(loss, adapt)(meta, Task((inputs, y[0]), (x[1], y[1])), KEY, 0)[0]

    arguments = initial(adapt, params, KEY), x[0]
    grads = jax.jit(jax.grad(value))(arguments)
    along = random_like(5, arguments)
    assert dot(grads, along) == pytest.approx(central_difference(jax.jit(value), arguments, along), rel=1e-6)
    assert abs(float(grads[0].inner)) > 1e-6


def test_memory_does_not_grow_with_the_inner_steps_as_that_of_the_unrolled_loop_does():
    params = {"a": jnp.ones((20, 300), jnp.float32), "b": jnp.ones((300, 1), jnp.float32)}
    loss = mse(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
    task = Task(*[(jnp.ones((10, 20), jnp.float32), jnp.ones((10, 1), jnp.float32))] * 2)

    def temporaries(adapt):
        value = jax.grad(lambda p: query_loss(loss, adapt)(p, task, KEY, 0)[0])
        return jax.jit(value).lower(params).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporaries(implicit(unroll(optax.sgd(1e-3), n), 1.0)) for n in (4, 64))
    plain = temporaries(unroll(optax.sgd(1e-3), 64))
    path = 60 * 4 * sum(x.size for x in params.values())  # the trace, of which only its last is asked for
    assert many - few < 0.1 * path
    assert plain > 5 * many


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 0.0}, "strength=0"),
        ({"cg_steps": 0}, "cg_steps=0"),
        ({"damping": -1.0}, "damping=-1"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        implicit(**({"search": unroll(optax.sgd(0.1), 1)} | wrong))


@pytest.mark.parametrize(
    "search",
    [
        only(lambda path, _: path[-1] == 0, unroll(optax.sgd(0.1), 1)),
        from_zero(unroll(optax.sgd(0.1), 1)),
        minibatches(2, unroll(optax.sgd(0.1), 1)),
        learned_step_sizes(1, 0.1),
    ],
)
def test_a_search_that_ends_at_no_optimum_of_all_parameters_is_refused(search):
    with pytest.raises(ValueError, match="ends at no optimum of all parameters"):
        implicit(search)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e12])
def test_more_steps_than_the_krylov_space_has_dimensions_leave_the_solution(dtype, size):
    """(aaᵀ + λI)⁻¹v, for 200 vectors v: two steps are exact, and in float32 what comes after them underflows."""
    strength = jnp.asarray(0.01, dtype)
    a, many = (random_like(i, jnp.zeros((n, 3), dtype)) for i, n in enumerate((1, 200)))
    a, vectors = a[0], size * many
    solve = jax.jit(jax.vmap(lambda v: _cg(lambda u: a * (a @ u) + strength * u, v, 20)))
    matrix = np.outer(a, a).astype(np.float64) + float(strength) * np.eye(3)
    expected = np.linalg.solve(matrix, np.asarray(vectors, np.float64).T).T
    scale = np.linalg.norm(expected, axis=1, keepdims=True)
    condition = np.linalg.cond(matrix)
    np.testing.assert_allclose(
        solve(vectors) / scale, expected / scale, atol=10 * condition * float(jnp.finfo(dtype).eps)
    )
    assert np.all(np.asarray(solve(0 * vectors)) == 0)


def test_of_a_gradient_that_is_zero_nothing_is_left():
    np.testing.assert_array_equal(residual(lambda u: 2 * u, jnp.zeros(3), 2), np.zeros(3))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20])
def test_the_residual_is_that_of_a_vector_of_any_size(size):
    """Of diag(1, 4) and (1, 1): after one step w = 0.4 (1, 1), so that |(0.4, 1.6) - (1, 1)| / |(1, 1)| = 0.6."""
    found = residual(lambda u: jnp.array([1.0, 4.0], jnp.float32) * u, jnp.full(2, size, jnp.float32), 2)
    np.testing.assert_allclose(found, [1, 0.6, 0], atol=1e-6)


def test_a_semi_gradient_has_no_optimum():
    loss = semi_gradient(lambda p, t, b, k: (jnp.sum((p - t + b) ** 2), {}))  # noqa: ARG005
    with pytest.raises(ValueError, match="semi-gradient"):
        implicit(unroll(optax.sgd(0.1), 1))(loss, jnp.ones(2), jnp.ones(2), KEY)


def test_a_second_derivative_is_refused():
    tasks, theta = quadratics(seed=3), jnp.arange(4.0)
    objective = query_loss(quadratic_loss, implicit(unroll(optax.sgd(0.3), 20), 0.5))
    task = jax.tree.map(lambda x: x[0], tasks)
    gradient = jax.grad(lambda p: objective(p, task, KEY, 0)[0])
    assert np.isfinite(gradient(theta)).all()
    for second in (jax.jacfwd(gradient), jax.jacrev(gradient), jax.jit(jax.jacfwd(gradient))):
        with pytest.raises(ValueError, match="has no derivative of its own"):
            second(theta)
