"""Policy gradients: what they estimate, against sums over all episodes; the episodes; navigation."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from omegaconf import OmegaConf

from experiments import build, collect, evaluate, gradcheck, pictures, report, reuse, run
from maml import plots
from maml.inner_loop import unroll
from maml.losses import policy_gradient, rollout
from maml.losses.policies import ESTIMATORS
from maml.models import GaussianPolicy, functional
from maml.objectives import query_loss
from maml.per_example import per_example_gradients
from maml.tasks import navigation, point_mass
from maml.types import Task
from tests.programs import config

pytestmark = pytest.mark.usefixtures("compiled_once")

REWARDS = np.array([[1.0, -2.0], [0.5, 3.0]])
"""Of the second of two actions, by both; the first has half of the reward that its own column has in the first row."""
LOGITS = np.array([[0.3, -0.2], [0.1, 0.6], [-0.5, 0.2]])
"""Of the start, and of the states after the two first actions."""


def tree(key, state, action, told):
    """Two steps with two actions each: the state is one-hot, and the reward of the second step depends on both actions."""
    del key
    second = state[0] < 0.5
    first = jnp.argmax(state[1:])
    reward = jnp.where(second, jnp.asarray(REWARDS)[first, action], 0.5 * jnp.asarray(REWARDS)[0, action])
    return jax.nn.one_hot(1 + action, 3, dtype=state.dtype), reward + told, ~second


def expected_return(logits):
    """Summed over all four episodes."""
    p = jax.nn.softmax(logits)
    values = jnp.asarray(REWARDS)
    return sum(p[0, i] * p[1 + i, j] * (0.5 * values[0, i] + values[i, j]) for i in range(2) for j in range(2))


def tabular(params, states):
    return states @ params


def batch_of(episodes: int, more: float = 0.0):
    return jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (episodes, 1)), jnp.full(episodes, more)


def off(found, exact):
    """The largest distance of a mean over the first axis from what it should be, in standard errors."""
    error = found.std(0) / np.sqrt(len(found))
    return (np.abs(found.mean(0) - exact) / (error + 1e-9)).max()


@functools.cache
def derivatives(estimator: str, baseline: str | None):
    """Value, gradient, Hessian and a third derivative of 4,000 batches of 25 episodes."""
    with jax.enable_x64(True):
        loss = policy_gradient(tabular, tree, 2, estimator=estimator, baseline=baseline)
        params, batch = jnp.asarray(LOGITS), batch_of(25)

        def all_of(key):
            def value(params):
                return loss(params, batch, key)[0]

            along = jax.jacfwd(jax.hessian(lambda t: value(params + t * direction())))
            return value(params), jax.grad(value)(params), jax.hessian(value)(params), along(0.0)

        return jax.device_get(jax.jit(jax.vmap(all_of))(jax.random.split(jax.random.key(0), 4000)))


def direction():
    return jnp.array([[1.0, -1.0], [0.5, 0.2], [-0.3, 1.0]])


def exact():
    with jax.enable_x64(True):
        params = jnp.asarray(LOGITS)
        along = jax.jacfwd(jax.hessian(lambda t: expected_return(params + t * direction())))
        found = (f(params) for f in (expected_return, jax.grad(expected_return), jax.hessian(expected_return)))
        return [-np.asarray(x) for x in (*found, along(0.0))]


@pytest.mark.parametrize("baseline", [None, "others"])
def test_dice_estimates_every_derivative(baseline):
    for found, right in zip(derivatives("dice", baseline), exact(), strict=True):
        assert off(found, right) < 4.5


@pytest.mark.parametrize("estimator", ["lvc", "log_probability"])
def test_the_others_estimate_the_first_alone(estimator):
    value, gradient, hessian, _ = derivatives(estimator, "others")
    right = exact()
    assert off(value, right[0]) < 4.5
    assert off(gradient, right[1]) < 4.5
    assert off(hessian, right[2]) > 15


def test_all_estimators_have_the_same_value_and_gradient():
    ours = [derivatives(name, "others")[:2] for name in ESTIMATORS]
    for value, gradient in ours[1:]:
        np.testing.assert_allclose(value, ours[0][0], rtol=1e-12)
        np.testing.assert_allclose(gradient, ours[0][1], atol=1e-12)


def test_a_baseline_lowers_the_variance():
    """Where both rewards have 5 more, which changes no gradient."""
    variances = []
    for baseline in (None, "others"):
        loss = policy_gradient(tabular, tree, 2, baseline=baseline)
        gradient = jax.grad(lambda p, k, loss=loss: loss(p, batch_of(25, 5.0), k)[0])
        found = jax.vmap(gradient, (None, 0))(
            jnp.asarray(LOGITS, jnp.float32), jax.random.split(jax.random.key(1), 2000)
        )
        assert off(np.asarray(found), exact()[1]) < 4.5
        variances.append(np.asarray(found).var(0).sum())
    assert variances[1] < 0.2 * variances[0]


def near(key, state, action, told):
    """Navigation that ends far from the goal already, so that some episodes do."""
    following, reward, _ = point_mass(key, state, action, told, step=0.3)
    return following, reward, -reward > 0.4


# --- an inner step ---


@pytest.mark.parametrize(("estimator", "factor"), [("dice", 0.6), ("log_probability", 1.0)])
@pytest.mark.usefixtures("x64")
def test_the_meta_gradient_of_one_step_is_that_of_the_expected_return(estimator, factor):
    """A reward of -(a - c)² and a ~ N(θ, 1): the expected return is -(θ - c)² - 1, its Hessian -2.

    One step of α = 0.2 leads to θ + 2α(c - θ), and the derivative of minus the return there is 2(θ' - c)(1 - 2α). With log
    probabilities alone the step has the derivative 1: the mean of advantages times ∂²log π, which is constant.
    """

    def bandit(key, state, action, told):
        del key
        return state, -jnp.square(action - told)[0], jnp.array(False)

    def apply(params, states):
        mean = jnp.broadcast_to(params, (len(states), 1))
        return mean, jnp.zeros_like(mean)

    loss = policy_gradient(apply, bandit, 1, estimator=estimator, baseline="others")
    objective = query_loss(loss, unroll(optax.sgd(0.2), 1))
    side = jnp.zeros((100_000, 1)), jnp.full((100_000, 1), 1.5)
    theta = jnp.array(0.5)
    found = jax.grad(lambda t: objective(t, Task(side, side), jax.random.key(0), jnp.int32(0))[0])(theta)
    after = 0.5 + 0.4 * (1.5 - 0.5)
    assert float(found) == pytest.approx(2 * (after - 1.5) * factor, rel=0.03)


@pytest.mark.usefixtures("x64")
def test_standardized_it_is_the_surrogate_of_the_authors_code():
    """-mean over all steps taken of log π · advantage, the advantages of mean 0 and variance 1; here by the recorded episodes."""
    apply, params, batch = policy(4)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch)
    key, discount = jax.random.key(3), 0.9
    loss = policy_gradient(apply, near, 12, discount=discount, baseline=None, standardize=True)
    found = jax.device_get(rollout(apply, near, 12, params, batch, key))
    assert 4 < found.present.sum() < found.present.size
    returns = np.zeros_like(found.reward)
    following = np.zeros(4)
    for t in reversed(range(12)):
        returns[:, t] = following = found.reward[:, t] + discount * following
    taken = returns[found.present]
    advantage = jnp.asarray((taken - taken.mean()) / taken.std())

    def surrogate(params):
        mean, log_std = apply(params, jnp.asarray(found.state[found.present]))
        action = jnp.asarray(found.action[found.present])
        logs = jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).sum(1)
        return -jnp.mean(logs * advantage)

    ours, theirs = jax.grad(lambda p: loss(p, batch, key)[0])(params), jax.grad(surrogate)(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-8), ours, theirs)
    assert loss(params, batch, key)[0] == pytest.approx(-returns[:, 0].mean())


def test_gradients_of_episodes_average_to_that_of_the_batch():
    apply, params, batch = policy(4)
    loss = policy_gradient(apply, point_mass, 10, standardize=True)
    key = jax.random.key(1)
    _, each = per_example_gradients(loss, params, batch, key)
    whole = jax.grad(lambda p: loss(p, batch, key)[0])(params)
    jax.tree.map(lambda e, w: np.testing.assert_allclose(e.mean(0), w, atol=1e-5), each, whole)


# --- episodes ---


def policy(episodes: int, hidden=(8,), **more):
    apply, params = functional(GaussianPolicy((2,), 2, hidden=hidden, rngs=nnx.Rngs(0), **more))
    task = jax.tree.map(lambda x: x[0], navigation(shots=episodes)(jax.random.split(jax.random.key(5), 1)))
    return apply, params, task.support


def test_episodes_are_those_of_a_loop():
    apply, params, (start, goal) = policy(3, initial_std=0.7)
    found = rollout(apply, point_mass, 30, params, (start, goal), jax.random.key(2))
    for i in range(3):
        state, present = np.asarray(start[i]), True
        for t in range(30):
            assert found.present[i, t] == present
            np.testing.assert_allclose(found.state[i, t], state, atol=1e-6)
            following = state + 0.1 * np.clip(found.action[i, t], -1, 1)
            apart = np.linalg.norm(following - goal[i])
            np.testing.assert_allclose(found.reward[i, t], -apart if present else 0.0, atol=1e-6)
            present = present and bool(apart >= 0.01)
            state = following if present else state


@pytest.mark.parametrize("baseline", ["linear", "others", None])
def test_what_a_dynamics_would_give_after_the_end_reaches_nothing(baseline):
    """Here it divides by the distance that it has left, 0 from the end on; some episodes end before the others."""

    def falls(key, state, action, left):
        del key
        at = state[0] + 1
        return jnp.stack([at, state[1] / (left - at)]), action[0] / (left - state[0]), at < left

    apply, params, _ = policy(4)
    batch = jnp.tile(jnp.array([[0.0, 1.0]]), (4, 1)), jnp.array([2.0, 3.0, 5.0, 9.0])
    loss = policy_gradient(apply, falls, 7, baseline=baseline)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, jax.random.key(0))
    assert metrics["steps"] == (2 + 3 + 5 + 7) / 4
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_an_episode_ends_at_the_goal_and_nothing_after_it_counts():
    def straight(params, states):
        mean = params * jnp.ones((len(states), 2))
        return mean, jnp.full_like(mean, -20.0)

    goal = jnp.array([[0.3, 0.3], [0.3, 0.3], [0.35, 0.3]])  # the last is passed by
    loss = policy_gradient(straight, point_mass, 6, baseline=None)
    found = rollout(straight, point_mass, 6, jnp.array(1.0), (jnp.zeros((3, 2)), goal), jax.random.key(0))
    assert found.present.sum(1).tolist() == [3, 3, 6]
    first = -np.sqrt(2) * (0.2 + 0.1)
    np.testing.assert_allclose(found.reward[0].sum(), first, atol=1e-5)
    value, metrics = loss(jnp.array(1.0), (jnp.zeros((3, 2)), goal), jax.random.key(0))
    assert metrics["steps"] == 4
    np.testing.assert_allclose(metrics["return"], found.reward.sum() / 3, rtol=1e-6)
    np.testing.assert_allclose(value, -metrics["return"], rtol=1e-6)


def test_what_the_model_sees_are_the_states_of_its_episodes():
    apply, params, batch = policy(3)
    loss, key = policy_gradient(apply, point_mass, 7), jax.random.key(1)
    found = rollout(apply, point_mass, 7, params, batch, key).state
    np.testing.assert_array_equal(loss.inputs(params, batch, key), np.asarray(found).reshape(21, 2))


def test_rewards_of_few_digits_are_summed_in_float32():
    """Whole numbers, and an inner loop in bfloat16, in which 1 + 0.9 + 0.81 + ... has three digits."""

    def one_each(key, state, action, told):
        del key, action, told
        return state, jnp.int32(1), jnp.array(True)

    apply, params, batch = policy(4)
    value, metrics = policy_gradient(apply, one_each, 40, discount=0.9)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(value, -(1 - 0.9**40) / 0.1, rtol=1e-6)
    assert metrics["return"] == 40
    loss = policy_gradient(apply, point_mass, 8)
    adapted = unroll(optax.sgd(0.01), 1, precision="bfloat16")(loss, params, batch, jax.random.key(0))
    exactly = unroll(optax.sgd(0.01), 1)(loss, params, batch, jax.random.key(0))
    assert adapted.trace.metrics["loss"].dtype == jnp.float32
    np.testing.assert_allclose(adapted.trace.metrics["return"], exactly.trace.metrics["return"], rtol=0.1)


def test_actions_are_drawn_from_the_policy():
    def normal(params, states):
        mean = jnp.broadcast_to(params, (len(states), 2))
        return mean, jnp.full_like(mean, jnp.log(0.5))

    batch = jnp.zeros((4000, 2)), jnp.ones((4000, 2))
    found = rollout(normal, point_mass, 1, jnp.array([0.2, -0.4]), batch, jax.random.key(0))
    action = np.asarray(found.action[:, 0])
    np.testing.assert_allclose(action.mean(0), [0.2, -0.4], atol=4 * 0.5 / np.sqrt(4000))
    np.testing.assert_allclose(action.std(0), 0.5, rtol=0.06)
    logits = jnp.log(jnp.array([0.2, 0.8]))
    kinds = rollout(lambda p, s: jnp.tile(p, (len(s), 1)), tree, 1, logits, batch_of(4000), jax.random.key(0)).action
    assert abs(float(kinds.mean()) - 0.8) < 4 * 0.4 / np.sqrt(4000)


@pytest.mark.usefixtures("x64")
def test_the_linear_baseline_is_the_least_squares_of_numpy():
    """The gradient without it, less the score times the fitted values."""
    apply, params, batch = policy(6)
    batch = jax.tree.map(lambda x: x.astype(jnp.float64), batch)
    key = jax.random.key(4)
    found = jax.device_get(rollout(apply, near, 15, params, batch, key))
    present = found.present.reshape(-1)
    assert 15 < present.sum() < present.size
    returns = found.reward[:, ::-1].cumsum(1)[:, ::-1].reshape(-1)
    state, time = found.state.reshape(-1, 2), np.tile(np.arange(15) / 100, 6)[:, None]
    features = np.concatenate([state, state**2, time, time**2, time**3, np.ones_like(time)], 1)
    ridge = np.concatenate([features, np.sqrt(1e-5) * np.eye(8)])
    taken = np.concatenate([present, np.ones(8, bool)])
    fitted = features @ np.linalg.lstsq(ridge[taken], np.concatenate([returns, np.zeros(8)])[taken], rcond=None)[0]

    def scores(params):
        mean, log_std = apply(params, jnp.asarray(state))
        logs = jax.scipy.stats.norm.logpdf(jnp.asarray(found.action.reshape(-1, 2)), mean, jnp.exp(log_std)).sum(1)
        return -jnp.sum((logs * jnp.asarray(returns - fitted))[present]) / 6

    loss = policy_gradient(apply, near, 15, baseline="linear")
    ours, theirs = jax.grad(lambda p: loss(p, batch, key)[0])(params), jax.grad(scores)(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), ours, theirs)
    assert np.var((returns - fitted)[present]) < 0.7 * np.var(returns[present])


def test_the_linear_baseline_of_states_that_depend_on_each_other_is_that_in_float64():
    """One-hot states: they, their squares and the constant are dependent, and 2,000 steps hide a ridge of 1e-5 in float32."""

    def walk(key, state, action, told):
        at = (jnp.argmax(state) + 2 * action - 1) % 5
        return jax.nn.one_hot(at, 5, dtype=state.dtype), jax.random.normal(key) + at + told, jnp.array(True)

    params, loss = jnp.zeros((5, 2)), policy_gradient(tabular, walk, 100)
    starts = jax.nn.one_hot(jnp.arange(20) % 5, 5), jnp.zeros(20)
    found = jax.device_get(rollout(tabular, walk, 100, params, starts, jax.random.key(0)))
    ours = jax.grad(lambda p: loss(p, starts, jax.random.key(0))[0])(params)
    returns = found.reward.astype(np.float64)[:, ::-1].cumsum(1)[:, ::-1].reshape(-1)
    state, time = found.state.reshape(-1, 5), np.tile(np.arange(100) / 100, 20)[:, None]
    features = np.concatenate([state, state**2, time, time**2, time**3, np.ones_like(time)], 1).astype(np.float64)
    ridge = np.concatenate([features, np.sqrt(1e-5) * np.eye(14)])
    advantage = returns - features @ np.linalg.lstsq(ridge, np.concatenate([returns, np.zeros(14)]), rcond=None)[0]
    scores = np.eye(2)[found.action.reshape(-1)] - 0.5  # of uniform actions
    np.testing.assert_allclose(ours, -state.T @ (scores * advantage[:, None]) / 20, rtol=1e-4, atol=1e-3)


def test_plain_policy_gradients_find_a_goal():
    apply, params, batch = policy(20, hidden=(32,), initial_std=0.5)
    loss = policy_gradient(apply, point_mass, 50, discount=0.9, standardize=True)
    adapted = jax.jit(unroll(optax.adam(0.03), 60), static_argnums=0)(loss, params, batch, jax.random.key(0))
    returns = np.asarray(adapted.trace.metrics["return"])
    assert returns[:3].mean() < -15
    assert returns[-3:].mean() > -6


# --- tasks, and the program ---


def test_the_goal_of_a_task_is_that_of_both_of_its_sets():
    tasks = navigation(shots=3, queries=5, start=0.2)(jax.random.split(jax.random.key(0), 400))
    assert (tasks.support[0].shape, tasks.query[1].shape) == ((400, 3, 2), (400, 5, 2))
    goals = np.concatenate([tasks.support[1], tasks.query[1]], 1)
    assert (goals == goals[:, :1]).all()
    assert len(np.unique(goals[:, 0], axis=0)) == 400
    assert 0.45 < np.abs(goals).max() <= 0.5
    starts = np.concatenate([tasks.support[0], tasks.query[0]], 1)
    assert 0.18 < np.abs(starts).max() <= 0.2
    assert len(np.unique(starts.reshape(-1, 2), axis=0)) == 400 * 8
    assert not np.asarray(navigation()(jax.random.split(jax.random.key(0), 2)).support[0]).any()


def test_the_reward_is_a_distance_or_its_square():
    at, to = jnp.zeros(2), jnp.array([0.3, 0.4])
    for squared, reward in ((False, -0.5), (True, -0.25)):
        state, found, goes_on = point_mass(jax.random.key(0), at, jnp.zeros(2), to, squared=squared)
        assert (float(found), bool(goes_on), state.tolist()) == (pytest.approx(reward), True, [0, 0])


def test_the_program_passes_gradcheck():
    """With episodes and advantages held: the derivative of its program, through the inner step."""
    found = gradcheck.check(config("experiment=finn2017/navigation", *SIZES))
    assert found.worst < 1e-5
    assert found.asymmetry is not None
    assert found.asymmetry < 1e-6


SIZES = (
    "task.shots=3",
    "task.loss.horizon=5",
    "model.hidden=[6]",
    "trainer.meta_batch=2",
    "evaluation.shots=4",
    "evaluation.tasks=3",
)


def test_a_run_measures_returns_and_draws_paths(tmp_path):
    overrides = ("experiment=finn2017/navigation", *SIZES, "trainer.steps=2")
    summary = run.run(config(*overrides), tmp_path)
    assert {f"meta_test/step_{i}/return" for i in range(4)} <= set(summary["metrics"])
    assert summary["protocol"]["step_size"] == (0.1, 0.05, 0.05)
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"adaptation", "step_return", "training_return"} <= drawn
    told = report.report([str(tmp_path)], tmp_path / "report")
    assert "| meta_test/step_3/return |" in told  # without the paper's figure, which is of more episodes
    again = evaluate.evaluate_run(tmp_path, ["evaluation.step_size=0.1", "evaluation.steps=1"])
    assert again["protocol"]["step_size"] == 0.1
    first = "meta_test/step_0/return"  # of as many steps the keys are others, and the start has no step
    assert again["metrics"][first] == summary["metrics"][first]


def test_a_policy_takes_a_context():
    cfg = config("experiment=finn2017/navigation", *SIZES, "algorithm=cavia", "model.context=2")
    learner = build.learner(cfg)
    objective = build.build_objective(cfg, learner.loss)
    task = jax.tree.map(lambda x: x[0], learner.sampler(jax.random.split(jax.random.key(0), 1)))
    gradient = jax.grad(lambda p: objective(p, task, jax.random.key(0), jnp.int32(0))[0])(learner.state.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert optax.tree.norm(gradient) > 0


def test_what_is_measured_names_reward_and_horizon():
    plain, other = (
        build.build_protocol(config("experiment=finn2017/navigation", *more))
        for more in ((), ("task.loss.dynamics.squared=true",))
    )
    assert plain.hash != other.hash
    assert "horizon=100 discount=0.99 maml.tasks.point_mass squared=True" in other.task
    assert plain.step_size == (0.1, 0.05, 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 0}, "horizon=0: give a whole number of steps, 1 or more"),
        ({"horizon": True}, "horizon=True: give a whole number of steps"),
        ({"discount": 0.0}, "discount=0.0: give a number above 0 and not above 1"),
        ({"discount": 1.1}, "discount=1.1: give a number above 0 and not above 1"),
        ({"estimator": "score"}, "estimator='score': give one of dice, lvc, log_probability"),
        ({"baseline": "mean"}, "baseline='mean': give one of linear, others, None"),
    ],
)
def test_settings_that_are_none_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient(tabular, tree, **{"horizon": 2} | change)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda state: (state, jnp.zeros(1), jnp.array(True)), r"the reward has shape \(1,\); give a scalar"),
        (lambda state: (state, jnp.zeros(()), jnp.int32(1)), r"goes on has shape \(\) and dtype int32; give a bool"),
        (lambda state: (state[:2], jnp.zeros(()), jnp.array(True)), r"the state has .*\(2,\).* and had .*\(3,\)"),
        (lambda state: (state > 0, jnp.zeros(()), jnp.array(True)), "the state has .*bool.* and had .*float32"),
    ],
)
def test_dynamics_of_other_results_are_refused(step, message):
    loss = policy_gradient(tabular, lambda _key, state, _action, _told: step(state), 2)
    with pytest.raises(ValueError, match=message):
        loss(jnp.asarray(LOGITS, jnp.float32), batch_of(2), jax.random.key(0))


def test_sizes_that_are_none_are_refused():
    for change, message in (({"shots": 0}, "shots=0"), ({"goal": 0.0}, "goal=0.0"), ({"start": -0.1}, "start=-0.1")):
        with pytest.raises(ValueError, match=message):
            navigation(**change)
    with pytest.raises(ValueError, match="initial_std=0"):
        GaussianPolicy((2,), 2, initial_std=0.0, rngs=nnx.Rngs(0))
    one = policy_gradient(tabular, tree, 2, baseline="others")
    with pytest.raises(ValueError, match="one episode has no others"):
        one(jnp.asarray(LOGITS, jnp.float32), batch_of(1), jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("task.loss.horizon=10", False),
        ("+task.loss.dynamics.step=1.0", False),
        ("evaluation.step_size=0.1", False),
        ("task.loss.estimator=lvc", True),
    ],
)
def test_the_papers_return_stands_beside_its_own_problem_alone(change, shown):
    cfg = config("experiment=finn2017/navigation", change)
    protocol = json.loads(json.dumps(dataclasses.asdict(build.build_protocol(cfg))))
    node = OmegaConf.to_container(cfg, resolve=False)
    assert (collect._figures(node["paper"], node, {}, [], protocol, set())[1] != {}) == shown  # noqa: SLF001


def test_a_step_size_that_is_a_whole_number_has_one_protocol():
    one, same = (build.build_protocol(config(f"algorithm.step_size={size}")) for size in ("1", "1.0"))
    assert one.hash == same.hash


def test_a_policy_has_as_many_outputs_as_the_task_has_actions():
    """Not as many as a goal has numbers, where the task says so; and a target velocity has none."""
    cfg = config("experiment=finn2017/navigation", *SIZES)

    def sampler(keys):
        starts = jnp.zeros((len(keys), 3, 2))
        return Task((starts, starts[..., 0]), (starts, starts[..., 0]))

    with pytest.raises(ValueError, match="let the task have a number of `actions`"):
        build.build_module(cfg, sampler, jax.random.key(0))
    OmegaConf.set_struct(cfg, False)
    cfg.task.actions = 4
    mean, _ = build.build_module(cfg, sampler, jax.random.key(0))(jnp.zeros((5, 2)))
    assert mean.shape == (5, 4)


def test_paths_end_where_their_episodes_did(monkeypatch):
    """A path has one place more than its episode has steps."""
    cfg = config("experiment=finn2017/navigation", *SIZES, "evaluation.steps=1", "evaluation.step_size=0.1")
    learner, drawn = build.learner(cfg), []
    monkeypatch.setattr(plots, "paths_grid", drawn.append)

    def toward(key, state, action, goal):
        del key, action, goal
        return state + 0.2, jnp.zeros(()), state[0] < 0.3  # at 0.2, 0.4 and 0.6: three steps

    monkeypatch.setattr(pictures, "instantiate", lambda _: toward)
    assert set(pictures._paths(cfg, learner, learner.state.params, build.build_protocol(cfg))) == {"adaptation"}  # noqa: SLF001
    (tasks,) = drawn
    for path in tasks[0].paths[1]:
        np.testing.assert_allclose(path[:, 0], [0.0, 0.2, 0.4, 0.6, np.nan, np.nan], atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_a_policy_elsewhere_than_in_the_plane_has_curves_alone(size, monkeypatch):
    cfg = config("experiment=finn2017/navigation", *SIZES)

    def sampler(keys):
        side = jnp.zeros((len(keys), 3, size)), jnp.zeros((len(keys), 3, size))
        return Task(side, side)

    monkeypatch.setattr(build, "protocol_sampler", lambda *_: sampler)
    learner = build.Learner(None, None, sampler, None, None)
    assert pictures.draw(cfg, learner, {}, build.build_protocol(cfg), {}) == {}


def test_reuse_compares_a_policy_on_the_states_of_its_episodes():
    cfg = config("experiment=finn2017/navigation", *SIZES)
    learner, protocol = build.learner(cfg), build.build_protocol(cfg, tasks=2, queries=4)
    rows = reuse.similarity(cfg, learner, learner.state.params, protocol)
    assert {row["positions"] for row in rows} == {4 * 5}  # 4 episodes of 5 steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("evaluation.steps=0", "evaluation.step_size=[]"), r"step_size=\[\]: give a positive number"),
        (
            (
                "algorithm.step_size={_target_:optax.constant_schedule,value:0.1}",
                "evaluation.step_size=${algorithm.step_size}",
            ),
            "a schedule",
        ),
    ],
)
def test_step_sizes_that_no_protocol_has_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build.check(config("experiment=finn2017/navigation", *changes))


def test_reptile_has_one_step_size():
    cfg = config("algorithm=reptile", "optimizer=reptile", "evaluation.steps=2", "evaluation.step_size=[0.1,0.05]")
    with pytest.raises(ValueError, match="the inner optimizer of algorithm reptile is that of training; give a number"):
        build.build_adapt(cfg, build.build_protocol(cfg))


def test_step_sizes_of_each_step_are_as_many_as_the_steps():
    for sizes in ("big", "[0.1,0.05]", "[0.1,0.05,-1]", "[0.1,0.05,true]"):
        with pytest.raises(ValueError, match=r"evaluation.step_size=.*: give a positive number"):
            build.check(config("experiment=finn2017/navigation", f"evaluation.step_size={sizes}"))


def test_each_inner_step_has_its_own_step_size():
    cfg = config("algorithm.steps=2", "evaluation.steps=2", "evaluation.step_size=[0.5,0.25]")
    adapt = build.build_adapt(cfg, build.build_protocol(cfg))

    def loss(params, batch, key):
        del key
        return batch[0].sum() * params["x"], {}

    path = adapt(loss, {"x": jnp.array(0.0)}, (jnp.ones(2),), jax.random.key(0)).trace.params["x"]
    np.testing.assert_allclose(path, [0.0, -1.0, -1.5])
