"""What the outer problem reports, and whose statistics batch norm uses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from maml.inner_loop import only, per_step, unroll
from maml.losses import cross_entropy, mse
from maml.models import MLP, functional
from maml.objectives import annealed, parameter_distance, query_loss
from maml.types import Task, initial

KEY = jax.random.key(0)


def line_task():
    x = jnp.linspace(-1, 1, 6)[:, None]
    return Task((x, 2 * x), (x + 0.1, 2 * x + 0.2))


def test_metrics_are_query_after_and_support_before_adaptation():
    apply = lambda w, x: w * x  # noqa: E731
    loss, task, w = mse(apply), line_task(), jnp.array([[0.5]])
    value, metrics = query_loss(loss, unroll(optax.sgd(0.1), 1))(w, task, KEY, 0)
    x, y = (np.asarray(v, np.float64) for v in task.support)
    before = ((0.5 * x - y) ** 2).mean()
    adapted = 0.5 - 0.1 * (2 * x * (0.5 * x - y)).mean()
    x, y = (np.asarray(v, np.float64) for v in task.query)
    after = ((adapted * x - y) ** 2).mean()
    assert float(value) == pytest.approx(after, rel=1e-5)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {"query/loss": after, "support/loss": before}, rel=1e-5
    )


def test_without_inner_steps_there_is_no_support_metric():
    loss = mse(lambda w, x: w * x)
    _, metrics = query_loss(loss, unroll(optax.sgd(0.1), 0))(jnp.array([[0.5]]), line_task(), KEY, 0)
    assert list(metrics) == ["query/loss"]


def test_norm_decides_whose_statistics_normalise_the_query():
    apply, params = functional(MLP((2,), 2, hidden=(4,), norm=nnx.BatchNorm, rngs=nnx.Rngs(0)))
    loss = cross_entropy(apply)
    x = jax.random.normal(KEY, (6, 2))
    task = Task((x, jnp.arange(6) % 2), (x[:3] * 3 + 1, jnp.array([0, 1, 0])))
    values = {
        norm: jax.jit(query_loss(loss, unroll(optax.sgd(0.0), 1), norm))(params, task, KEY, 0)[0]
        for norm in ("batch", "support")
    }
    assert abs(values["batch"] - values["support"]) > 1e-4
    with pytest.raises(ValueError, match="norm='query'.*batch, support"):
        query_loss(loss, unroll(optax.sgd(0.1), 1), "query")


def test_a_linen_module_trains_by_its_own_apply():
    module = linen.Dense(1)
    params = module.init(KEY, jnp.ones((1, 1)))
    objective = query_loss(mse(module.apply), unroll(optax.sgd(0.1), 3))
    value = jax.jit(lambda p: objective(p, line_task(), KEY, 0)[0])
    slope = jax.jit(jax.grad(value))
    before = value(params)
    for _ in range(60):
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope(params))
    assert value(params) < 0.1 * before


def test_inductive_statistics_need_an_apply_that_takes_them():
    module = linen.Dense(1)
    objective = query_loss(mse(module.apply), unroll(optax.sgd(0.1), 1), "support")
    with pytest.raises(ValueError, match="maml.models.functional"):
        objective(module.init(KEY, jnp.ones((1, 1))), line_task(), KEY, 0)


def test_no_distance_of_rows_is_taken_from_one_of_them():
    """A subtraction would broadcast [rows, ...] against the adapted [...]."""
    loss = mse(lambda p, x: (x * p["g"]) @ p["w"])
    rows = per_step(nnx.PathContains("g"), 3, only(nnx.PathContains("w"), unroll(optax.sgd(0.1), 3)))
    params = initial(rows, {"g": jnp.ones((1, 1)), "w": jnp.ones((1, 1))}, KEY)
    with pytest.raises(ValueError, match="parameters of its own, which no distance moves"):
        parameter_distance(loss, rows)(params, line_task(), KEY, 0)


def test_an_objective_that_becomes_a_distance_defines_an_update():
    loss, adapt = mse(lambda w, x: w * x), unroll(optax.sgd(0.1), 1)
    kinds = {name: annealed(loss, adapt, 5, *of) for name, of in {
        "none": (query_loss, query_loss), "first": (parameter_distance, query_loss), "then": (query_loss, parameter_distance),
    }.items()}  # fmt: skip
    assert {name: kind.defines_update for name, kind in kinds.items()} == {"none": False, "first": True, "then": True}
