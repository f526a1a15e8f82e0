"""What the outer problem reports, and whose statistics batch norm uses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from maml.derivatives import mixed, truncated
from maml.implicit import implicit
from maml.inner_loop import learned, low_rank, minibatches, only, per_step, unroll
from maml.inner_loop.parts import started
from maml.losses import cross_entropy, mse
from maml.models import MLP, functional
from maml.objectives import annealed, multi_step_loss, parameter_distance, query_loss
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


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm", ["support", "joint"])
def test_the_statistics_of_the_support_set_have_derivatives(norm):
    """Two inner steps and the query set, by hand; Flax keeps statistics without derivatives."""
    apply, params = functional(MLP((2,), 1, hidden=(3,), norm=nnx.BatchNorm, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: 0.3 + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    x, y = jax.random.normal(KEY, (7, 2)), jnp.linspace(-1, 1, 7)[:, None]
    task = Task((x[:4], y[:4]), (x[4:] * 2 + 1, y[4:]))

    def predict(p, x, reference):
        hidden, seen = (z @ p["layers"][0]["kernel"] + p["layers"][0]["bias"] for z in (x, reference))
        norm = p["norms"][0]
        hidden = (hidden - seen.mean(0)) / jnp.sqrt(seen.var(0) + 1e-5) * norm["scale"] + norm["bias"]
        return jax.nn.relu(hidden) @ p["head"]["kernel"] + p["head"]["bias"]

    def by_hand(p):
        inner = jax.grad(lambda p: jnp.mean((predict(p, x[:4], x[:4]) - y[:4]) ** 2))
        for _ in range(2):
            p = jax.tree.map(lambda w, g: w - 0.1 * g, p, inner(p))
        references = [jnp.concatenate([x[:4], q[None]]) if norm == "joint" else x[:4] for q in task.query[0]]
        out = [predict(p, q[None], reference) for q, reference in zip(task.query[0], references, strict=True)]
        return jnp.mean((jnp.concatenate(out) - y[4:]) ** 2)

    objective = query_loss(mse(apply), unroll(optax.sgd(0.1), 2), norm)
    value, found = jax.value_and_grad(lambda p: objective(p, task, KEY, 0)[0])(params)
    with jax.numpy_rank_promotion("allow"):
        expected, wanted = jax.value_and_grad(by_hand)(nnx.to_pure_dict(params))
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    for a, b in zip(jax.tree.leaves(nnx.to_pure_dict(found)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_a_multi_step_loss_of_an_implicit_loop_is_refused():
    """Its earlier steps have no derivative: their share of the meta-gradient would be zero."""
    search, task = unroll(optax.sgd(0.1), 2), line_task()
    loss = mse(lambda p, x: x * p["a"] + p["b"])
    params = {"a": jnp.ones((1, 1)), "b": jnp.zeros((1, 1))}
    own = learned(lambda strength: implicit(search, strength), lambda *_: jnp.ones(()))
    loops = [implicit(search), only(nnx.PathContains("a"), implicit(search)), own]
    loops += [started(lambda loss, params, support: params, implicit(search))]  # noqa: ARG005
    loops += [only(nnx.PathContains("a"), own), low_rank(1, implicit(search), "a"), minibatches(6, implicit(search))]
    for loop in loops:
        objective, start = multi_step_loss(loss, loop, lambda _: jnp.ones(2) / 2), initial(loop, params, KEY)
        with pytest.raises(ValueError, match="implicit inner loop only the parameters after the last step"):
            objective(start, task, KEY, 0)
        assert jnp.isfinite(query_loss(loss, loop)(start, task, KEY, 0)[0])


def test_metrics_are_numbers_by_name():
    loss, w = mse(lambda w, x: w * x), jnp.array([[0.5]])

    def and_own(own, **how):
        def with_own(params, batch, key):
            value, metrics = loss(params, batch, key)
            return value, metrics | {"own": own}

        return query_loss(with_own, unroll(optax.sgd(0.1), 2, **how))

    _, metrics = and_own(7)(w, line_task(), KEY, 0)
    assert metrics["query/own"] == metrics["support/own"] == 7
    for how in ({"derivative": mixed}, {"remat": 1}, {"derivative": truncated(1)}):
        _, metrics = and_own(0.5, **how)(w, line_task(), KEY, 0)
        assert metrics["query/own"] == metrics["support/own"] == 0.5
    for wrong, name in ((None, "NoneType"), ({"a": 1.0}, "dict"), ("x", "str")):
        with pytest.raises(ValueError, match=f"metric 'own' is of type {name}: metrics of a loss are numbers by name"):
            and_own(wrong)(w, line_task(), KEY, 0)


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
