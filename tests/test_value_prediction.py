"""Markov reward processes: exact values, what is sampled, and Boyan's chain as published."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml.derivatives import reverse
from maml.evaluate import Protocol, evaluate
from maml.inner_loop import unroll
from maml.losses import td0
from maml.tasks import boyan_chain, value_prediction
from maml.tasks.value_prediction import Process, exact_values, visits
from tests.programs import main, summary

KEYS = jax.random.split(jax.random.key(0), 40)


def random_process(seed: int, states: int = 6, gamma: float = 0.8) -> Process:
    """A dense process with one terminal state, the first."""
    generator = np.random.default_rng(seed)
    transition = generator.dirichlet(np.ones(states), states)
    discount = np.full(states, gamma)
    discount[0] = 0.0
    start = generator.dirichlet(np.ones(states))
    return Process(transition, generator.normal(size=states), discount, start, np.eye(states))


@pytest.mark.usefixtures("x64")
def test_values_and_visits_are_the_limits_of_their_recursions():
    plain = random_process(0)
    step = plain.transition * plain.discount[None]
    value, count, weight = np.zeros(6), np.zeros(6), plain.start
    for _ in range(400):
        value = plain.reward + step @ value
        count, weight = count + weight, step.T @ weight
    process = Process(*map(jnp.asarray, plain))
    np.testing.assert_allclose(exact_values(process), value, atol=1e-12)
    np.testing.assert_allclose(visits(process), count / count.sum(), atol=1e-12)
    ours = np.linalg.solve(np.eye(6) - step, plain.reward)
    np.testing.assert_allclose(exact_values(process), ours, atol=1e-12)


def test_values_are_the_mean_return_of_long_monte_carlo():
    process, generator = random_process(1), np.random.default_rng(2)
    values = np.asarray(exact_values(Process(*(jnp.asarray(x, jnp.float32) for x in process))))
    episodes, cumulative = 40_000, process.transition.cumsum(1)
    for first in (1, 4):
        state, weight, total = np.full(episodes, first), np.ones(episodes), np.zeros(episodes)
        for _ in range(80):  # 0.8^80 = 2e-8
            total += weight * process.reward[state]
            state = np.minimum((generator.random((episodes, 1)) > cumulative[state]).sum(1), 5)
            weight *= process.discount[state]
        error = total.std() / np.sqrt(episodes)
        assert abs(total.mean() - values[first]) < 4 * error
        assert error < 0.02


def draw(sampler, keys):
    """Tasks, by a program that is not optimised: compilation is the time of these tests."""
    return jax.device_get(jax.jit(sampler, compiler_options={"xla_backend_optimization_level": 0})(keys))


@pytest.fixture(scope="module")
def garnets():
    """Two random processes of 5 states with 2 successors each, and 200,000 transitions of either."""
    return draw(value_prediction(shots=200_000, states=5, branching=2, features=3, discount=0.7), KEYS[:2])


@pytest.fixture(scope="module")
def chains():
    """Boyan's chain, three times, with 20,000 transitions."""
    return draw(boyan_chain(shots=20_000), KEYS[:3])


def recovered(tasks, i):
    """Which state each of a task's transitions leaves and enters, by its features."""
    features = tasks.query[0][i]

    def index(x):
        distances = np.abs(x[:, None] - features[None]).sum(-1)
        assert (distances.min(1) == 0).all()
        return distances.argmin(1)

    return index(tasks.support.inputs_tm1[i]), index(tasks.support.inputs_t[i])


@pytest.mark.parametrize("i", [0, 1])
def test_the_values_of_a_task_are_those_of_its_transitions(garnets, i):
    """P, r and γ are estimated from the transitions of a task; the values and visits that they imply are the task's."""
    now, then = recovered(garnets, i)
    counts = np.zeros((5, 5))
    np.add.at(counts, (now, then), 1)
    assert ((counts > 0).sum(1) <= 2).all()
    reward = np.array([garnets.support.reward_t[i][now == s, 0][0] for s in range(5)])
    np.testing.assert_array_equal(garnets.support.reward_t[i][:, 0], reward[now])
    assert (garnets.support.discount_t == np.float32(0.7)).all()
    chances = counts / counts.sum(1, keepdims=True)
    values = np.linalg.solve(np.eye(5) - 0.7 * chances, reward)
    np.testing.assert_allclose(garnets.query[1][i][:, 0], values, atol=0.05)
    expected = np.linalg.solve(np.eye(5) - 0.7 * chances.T, np.full(5, 0.2))
    np.testing.assert_allclose(counts.sum(1) / len(now), expected / expected.sum(), atol=0.01)
    weights, *_ = np.linalg.lstsq(garnets.query[0][i], reward)
    np.testing.assert_allclose(garnets.query[0][i] @ weights, reward, atol=1e-5)  # linear in the features


def test_boyans_chain_has_the_published_values_and_features(chains):
    inputs, values = chains.query
    np.testing.assert_allclose(values[..., 0], np.tile(-2.0 * np.arange(13), (3, 1)), atol=1e-4)
    np.testing.assert_allclose(inputs @ np.array([-24.0, -16.0, -8.0, 0.0]), values[..., 0], atol=1e-4)
    np.testing.assert_allclose(inputs[0, [12, 11, 9, 8, 0]], [
        [1, 0, 0, 0], [0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1],
    ])  # fmt: skip
    now, then = recovered(chains, 0)
    rewards, discounts = chains.support.reward_t[0, :, 0], chains.support.discount_t[0, :, 0]
    assert now.min() >= 1  # nothing leaves the last state
    assert set(now - then) == {1, 2}
    np.testing.assert_array_equal(rewards, np.where(now == 1, -2.0, -3.0))
    np.testing.assert_array_equal(discounts, np.where(then == 0, 0.0, 1.0))
    assert np.mean((now - then)[now > 1] == 1) == pytest.approx(0.5, abs=0.05)
    # An episode enters 12 once and 11 every other time.
    assert np.sum(now == 11) / np.sum(now == 12) == pytest.approx(0.5, abs=0.06)
    assert (chains.support.inputs_tm1[0] != chains.support.inputs_tm1[1]).any()


def test_td0_comes_to_rest_at_boyans_coefficients(chains):
    """The field of TD(0) with a linear value is affine, g(θ) = g(0) + Jθ, and it vanishes at the published coefficients."""
    task = jax.tree.map(lambda x: x[0], chains)
    gradient = reverse(td0(lambda theta, x: x @ theta[:, None]))

    def field(theta):
        return gradient(theta, task.support, KEYS[0])[0]

    theta = -np.linalg.solve(jax.jacfwd(field)(jnp.zeros(4)), field(jnp.zeros(4)))
    np.testing.assert_allclose(theta, [-24, -16, -8, 0], atol=0.5)  # 20,000 transitions
    np.testing.assert_allclose(field(jnp.array([-24.0, -16.0, -8.0, 0.0])), np.zeros(4), atol=0.02)


def test_a_spread_makes_chains_that_differ():
    values = draw(boyan_chain(spread=0.5), KEYS).query[1][..., 0]
    assert (values[:, 0] == 0).all()
    assert (np.diff(values, axis=1).mean(1) < 0).all()
    assert values[:, -1].std() > 1
    assert (values[:, 1] >= -2.0 * 1.5).all()
    assert (values[:, 1] <= -2.0 * 0.5).all()


@pytest.mark.parametrize(
    ("sampler", "states", "features"),
    [(value_prediction(shots=7, states=6, features=3), 6, 3), (boyan_chain(shots=7, states=9, spread=1.0), 9, 4)],
)
def test_shapes_and_that_tasks_are_a_function_of_their_key(sampler, states, features):
    one, again = draw(sampler, KEYS), draw(sampler, KEYS[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), one, again)
    shapes = [x.shape for x in jax.tree.leaves(one)]
    transitions = [(40, 7, features), (40, 7, 1), (40, 7, features), (40, 7, 1)]
    assert shapes == [*transitions, (40, states, features), (40, states, 1)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(one))
    assert len({x.tobytes() for x in one.query[1]}) == 40


def test_a_protocol_measures_the_error_to_the_exact_values(chains):
    chain = jax.tree.map(lambda x: x[:1], chains)
    protocol = Protocol(tasks=2, shots=20_000, queries=13, steps=2)
    loss, adapt = td0(lambda theta, x: x @ theta), unroll(optax.sgd(0.5), 2)
    result = evaluate(jnp.zeros((4, 1)), lambda keys: chain, loss, adapt, protocol)  # noqa: ARG005
    assert result["step_0/loss"].mean == pytest.approx(np.mean((2.0 * np.arange(13)) ** 2), rel=1e-4)
    assert result["step_2/loss"].mean < result["step_0/loss"].mean


@pytest.mark.parametrize(
    ("factory", "wrong", "message"),
    [
        *((value_prediction, {name: 0}, f"{name}=0") for name in ("shots", "states", "branching", "features")),
        (value_prediction, {"branching": 11}, "branching=11"),
        (value_prediction, {"discount": 1.0}, r"discount=1\.0"),
        (boyan_chain, {"states": 3}, "states=3"),
        (boyan_chain, {"shots": 0}, "shots=0"),
        (boyan_chain, {"spread": 2.0}, "spread=2"),
    ],
)
def test_wrong_sizes_are_refused(factory, wrong, message):
    with pytest.raises(ValueError, match=message):
        factory(**wrong)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="full", marks=pytest.mark.slow),
        pytest.param(("task=boyan_chain", "task.loss.target=stop"), id="boyan, stop"),
    ],
)
def test_the_experiment_runs_as_a_program(overrides, tmp_path):
    small = ("debug=short", "trainer.meta_batch=4", "model.hidden=[8]", "evaluation.steps=2", "logger=quiet")
    ended = main("experiment=td0_value_prediction", *overrides, *small, f"hydra.run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    found = summary(tmp_path)
    assert found["protocol"]["queries"] == (13 if overrides else 10)
    assert np.isfinite(found["metrics"]["meta_test/step_2/loss"]["mean"])
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"step_loss.png"}
