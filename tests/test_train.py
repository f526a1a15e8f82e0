"""The meta-step against its definition, chunks against each other, and the loop's promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml import train
from maml.inner_loop import unroll
from maml.losses import mse
from maml.models import MLP, functional
from maml.objectives import query_loss
from maml.random import keys_for
from maml.tasks import sinusoid
from maml.types import Task, as_argument
from tests.helpers import closed_form, quadratic_loss, quadratics, twins

ROOT = jax.random.key(4)


def problem(hidden=(8, 8)):
    init = nnx.initializers.glorot_uniform()
    apply, params = functional(MLP((1,), 1, hidden=hidden, kernel_init=init, rngs=nnx.Rngs(0)))
    return query_loss(mse(apply), unroll(optax.sgd(0.01), 1)), params


def start(step, params, optimizer, sampler):
    return train.begin(train.init(params, optimizer, ROOT), step, sampler)


@pytest.mark.usefixtures("x64")
def test_a_meta_step_is_the_outer_update_of_the_mean_gradient():
    tasks = quadratics(seed=0)
    objective = query_loss(quadratic_loss, unroll(optax.sgd(0.3), 2))
    step = train.meta_step(objective, optax.sgd(0.1), meta_batch=3)
    params = jnp.linspace(-1.0, 1.0, 4)
    state, metrics = step(train.init(params, optax.sgd(0.1), ROOT), lambda keys: tasks)  # noqa: ARG005
    expected = closed_form(tasks, np.asarray(params), 0.3, 2, first_order=False)
    np.testing.assert_allclose(state.params, params - 0.1 * expected, atol=1e-12)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(expected), atol=1e-12)
    assert metrics["objective"] == pytest.approx(float(metrics["query/loss"]))
    assert state.step == 1


@pytest.mark.parametrize("chunk", twins((2,), (1, 2, 4)))
def test_chunks_are_execution_and_not_mathematics(chunk):
    objective, params = problem()
    optimizer, sampler = optax.sgd(1.0), sinusoid(shots=5, queries=5)
    moves, values = [], []
    for size in ("all", chunk):
        step = train.meta_step(objective, optimizer, meta_batch=8, task_chunk=size)
        state, metrics = jax.jit(lambda s, step=step: step(s, sampler))(train.init(params, optimizer, ROOT))
        moves.append(jax.tree.map(jnp.subtract, params, state.params))
        values.append(metrics)
    scale = optax.tree.norm(moves[0])
    assert optax.tree.norm(jax.tree.map(jnp.subtract, *moves)) / scale < 1e-6
    for name, value in values[0].items():
        assert float(values[1][name]) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.usefixtures("x64")
def test_batch_norm_under_the_map_is_that_of_each_task_alone():
    """The mean of meta-gradients that were computed one by one, without any map."""
    apply, params = functional(MLP((1,), 1, hidden=(8,), norm=nnx.BatchNorm, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    objective = query_loss(mse(apply), unroll(optax.sgd(0.1), 1))
    tasks = sinusoid(shots=5, queries=5)(jax.random.split(ROOT, 4))
    step = train.meta_step(objective, optax.sgd(1.0), meta_batch=4, task_chunk=2)
    state, _ = jax.jit(lambda s: step(s, lambda _: tasks))(train.init(params, optax.sgd(1.0), ROOT))
    each = [
        jax.grad(lambda p, i=i: objective(p, jax.tree.map(lambda x: x[i], tasks), ROOT, 0)[0])(params) for i in range(4)
    ]
    expected = jax.tree.map(lambda *g: sum(g) / 4, *each)
    moved = jax.tree.map(jnp.subtract, params, state.params)
    size = float(optax.tree.norm(expected))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, moved, expected))) < 1e-10 * size


def test_the_mean_of_a_flag_is_the_share_of_its_steps():
    """A sum of booleans would be their disjunction."""

    def objective(params, task, key, step):
        del task, key
        return jnp.sum(params**2), {"late": step >= 3, "count": step}

    step = train.meta_step(objective, optax.sgd(0.0), meta_batch=1)
    logged = []
    train.fit(
        start(step, jnp.ones(2), optax.sgd(0.0), sinusoid()), step, sinusoid(), steps=5, log_every=5,
        log=lambda _, metrics: logged.append(metrics),
    )  # fmt: skip
    assert logged[1]["late"] == pytest.approx(2 / 4)  # of the steps 1, 2, 3, 4; the first was logged alone
    assert logged[1]["count"] == pytest.approx(2.5)


def test_the_tasks_of_a_step_are_a_function_of_root_and_step():
    seen = []

    def sampler(keys):
        seen.append(jax.random.key_data(keys))
        return sinusoid()(keys)

    objective, params = problem()
    step = train.meta_step(objective, optax.sgd(0.1), meta_batch=4)
    state, _ = step(train.init(params, optax.sgd(0.1), ROOT), sampler)
    step(state, sampler)
    np.testing.assert_array_equal(seen[0], jax.random.key_data(keys_for(ROOT, "meta_train/tasks", 0, 4)))
    np.testing.assert_array_equal(seen[1], jax.random.key_data(keys_for(ROOT, "meta_train/tasks", 1, 4)))


def collect(steps, log_every, dispatch_s=1.0, every=(), progress=None):
    objective, params = problem()
    optimizer, sampler, rows = optax.adam(1e-2), sinusoid(shots=5, queries=5), []
    step = train.meta_step(objective, optimizer, meta_batch=4)
    progress = progress or start(step, params, optimizer, sampler)
    progress = train.fit(
        progress, step, sampler, steps=steps, log_every=log_every, every=every, dispatch_s=dispatch_s,
        log=lambda done, metrics: rows.append((done, metrics)),
    )  # fmt: skip
    return progress, rows


def test_fit_logs_means_over_windows_of_the_plain_loop():
    objective, params = problem()
    optimizer = optax.adam(1e-2)
    step = jax.jit(lambda s: train.meta_step(objective, optimizer, meta_batch=4)(s, sinusoid(shots=5, queries=5)))
    state, losses = train.init(params, optimizer, ROOT), []
    for _ in range(25):
        state, metrics = step(state)
        losses.append(float(metrics["query/loss"]))
    progress, rows = collect(25, log_every=10)
    assert [done for done, _ in rows] == [1, 10, 20, 25]
    expected = [losses[0], np.mean(losses[1:10]), np.mean(losses[10:20]), np.mean(losses[20:])]
    np.testing.assert_allclose([m["query/loss"] for _, m in rows], expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        progress.state.params,
        state.params,
    )


def test_dispatches_change_no_bit():
    one, rows = collect(40, log_every=7, dispatch_s=1e-9)
    other, other_rows = collect(40, log_every=7, dispatch_s=100.0)
    assert rows == other_rows
    jax.tree.map(np.testing.assert_array_equal, one.state.params, other.state.params)


def test_stopped_in_the_middle_of_a_window_and_continued_is_uninterrupted():
    whole, rows = collect(20, log_every=6)
    saved = []
    collect(20, log_every=6, every=[(8, saved.append)])
    rest, rest_rows = collect(20, log_every=6, progress=saved[0])
    assert rest_rows == [row for row in rows if row[0] > 8]
    for a, b in zip(jax.tree.leaves(whole._replace(state=whole.state._replace(key=0))),
                    jax.tree.leaves(rest._replace(state=rest.state._replace(key=0))), strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_callbacks_come_on_their_steps():
    seen = {3: [], 5: []}
    every = [(n, lambda p, n=n: seen[n].append(int(p.state.step))) for n in seen]
    collect(12, log_every=100, every=every)
    assert seen == {3: [3, 6, 9, 12], 5: [5, 10]}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    def objective(params, task, key, step):
        del task, key
        value = jnp.where(step == 6, jnp.nan, params.sum())
        return value, {"query/loss": value}

    optimizer, sampler = optax.sgd(0.1), sinusoid()
    step = train.meta_step(objective, optimizer, meta_batch=2)
    progress = start(step, jnp.ones(2), optimizer, sampler)
    saved = []
    with pytest.raises(train.NonFinite, match="meta-step 7"):
        train.fit(
            progress,
            step,
            sampler,
            steps=100,
            log_every=50,
            log=print,
            every=[(2, saved.append)],
            dispatch_s=9.0,
        )
    assert [int(p.state.step) for p in saved] == [2, 4, 6]
    assert np.isfinite(saved[-1].state.params).all()


def test_a_gradient_that_is_not_finite_stops_the_run():
    def objective(params, task, key, step):
        del task, key, step
        value = jnp.sqrt(params * 0.0)  # value 0, derivative inf * 0
        return value, {"query/loss": value}

    optimizer, sampler = optax.sgd(0.1), sinusoid()
    step = train.meta_step(objective, optimizer, meta_batch=2)
    with pytest.raises(train.NonFinite, match="meta-step 1"):
        train.fit(
            start(step, jnp.ones(()), optimizer, sampler),
            step,
            sampler,
            steps=3,
            log_every=1,
            log=print,
        )


def test_steady_training_copies_nothing_to_the_device():
    """After the first dispatches even explicit copies are forbidden; a copy made on purpose shows that the guard works."""
    images = jnp.zeros((50, 1))
    sampler = jax.tree_util.Partial(lambda data, keys: _shifted(data, keys), images)
    objective, params = problem()
    optimizer = optax.adam(1e-3)
    step = train.meta_step(objective, optimizer, meta_batch=4)
    guard = []

    def log(done, metrics):
        del metrics
        if done == 20:  # all lengths of dispatch are compiled and on the device by now
            guard.append(jax.transfer_guard_host_to_device("disallow_explicit"))
            guard[0].__enter__()

    try:
        progress = train.fit(
            start(step, params, optimizer, sampler),
            step,
            sampler,
            steps=60,
            log_every=5,
            log=log,
            dispatch_s=1e-9,
        )
        with pytest.raises(Exception, match="[Dd]isallowed"):
            jax.device_put(np.ones(3))
    finally:
        guard[0].__exit__(None, None, None)
    assert progress.state.step == 60


def _shifted(data, keys):
    tasks = sinusoid(shots=5, queries=5)(keys)
    return Task((tasks.support[0] + data[0, 0], tasks.support[1]), tasks.query)


def test_data_of_a_sampler_are_an_argument_and_no_constant():
    data = jnp.arange(100_000.0)
    sampler = jax.tree_util.Partial(lambda data, keys: _shifted(data[:, None], keys), data)
    objective, params = problem()
    step = train.meta_step(objective, optax.sgd(0.1), meta_batch=2)
    progress = start(step, params, optax.sgd(0.1), sampler)
    lowered = train.compile_loop(step).lower(progress, as_argument(sampler), jnp.int32(1))
    assert len(lowered.as_text()) < 400_000  # 100,000 numbers as text would be more


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"meta_batch": 0}, "meta_batch=0"), ({"meta_batch": True}, "meta_batch=True"),
     ({"meta_batch": 4, "task_chunk": 3}, r"task_chunk=3.*\[1, 2, 4\]"),
     ({"meta_batch": 4, "task_chunk": "some"}, "task_chunk='some'")],
)  # fmt: skip
def test_wrong_sizes_are_refused_at_the_factory(kwargs, message):
    with pytest.raises(ValueError, match=message):
        train.meta_step(problem()[0], optax.sgd(0.1), **kwargs)
