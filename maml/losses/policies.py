"""Policy gradients: losses that draw the episodes they are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jaxtyping import PyTree

from maml.losses.supervised import forward, with_examples
from maml.types import Apply, Batch, Key, Loss, Params, whole

ESTIMATORS = ("dice", "lvc", "log_probability")
BASELINES = ("linear", "others", None)

Dynamics = Callable[[Key, Any, jax.Array, Any], tuple[Any, jax.Array, jax.Array]]
"""(key, state, action, told) -> (state, reward, whether the episode goes on), of one episode."""


class Episodes(NamedTuple):
    """States and actions [episodes, horizon, ...]; rewards, and whether the episode still went on, [episodes, horizon].

    `following` are the states after each action, that in which an episode ends too.
    """

    state: PyTree
    action: jax.Array
    reward: jax.Array
    present: jax.Array
    following: PyTree


def rollout(apply: Apply, dynamics: Dynamics, horizon: int, params: Params, batch: Batch, key: Key) -> Episodes:
    """Episodes of a policy from batch = (first states, what `dynamics` is told), each [episodes, ...]; see `policy_gradient`.

    Nothing is differentiated: the parameters are constants here. After its end an episode stays in the state of its last
    action, without rewards.
    """
    start, told = batch
    count, fixed = len(jax.tree.leaves(start)[0]), jax.lax.stop_gradient(params)

    def act(carry, key):
        state, present = carry
        key_action, key_dynamics = jax.random.split(key)
        action = _draw(key_action, forward(apply, fixed, state))
        following, reward, goes_on = jax.vmap(dynamics)(jax.random.split(key_dynamics, count), state, action, told)
        _check_step(state, following, jnp.asarray(reward), jnp.asarray(goes_on))
        reward = jnp.where(present, reward, 0).astype(jnp.promote_types(reward.dtype, jnp.float32))
        remains = present & goes_on
        kept = jax.vmap(lambda on, new, old: jax.tree.map(lambda x, y: jnp.where(on, x, y), new, old))(
            remains, following, state
        )
        return (kept, remains), (state, action, reward, present, following)

    found = jax.lax.scan(act, (start, jnp.ones(count, bool)), jax.random.split(key, horizon))[1]
    return Episodes(*jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found))


def policy_gradient(
    apply: Apply,
    dynamics: Dynamics,
    horizon: int,
    *,
    discount: float = 1.0,
    estimator: str = "dice",
    baseline: str | None = "linear",
    standardize: bool = False,
) -> Loss:
    """Minus the return of a policy, with the derivatives that episodes drawn from it estimate: REINFORCE, and beyond.

    The policy is `apply(params, states)`: a pair (mean, log standard deviation), each [episodes, ...], of a normal distribution,
    or one array, the logits [episodes, actions] of a categorical one. batch = (first states, what the dynamics are told), both
    [episodes, ...], such as starts and goals; `dynamics(key, state, action, told)` -> (state, reward, whether the episode goes
    on), for one episode. The loss draws an episode of at most `horizon` steps for each row, with its key: those of the support
    and of the query set come from the parameters that they judge. Its value is minus the mean return; the metrics are "loss",
    "return" (not discounted) and "steps", the mean length.

    With the return from step t on, Rₜ, and a baseline bₜ, the derivatives are those of -mean Σₜ wₜ (Rₜ - bₜ) over episodes. All
    estimators have the first one, -mean Σₜ ∂log πₜ (Rₜ - bₜ); they differ in the derivative of an inner step.

    Args:
      discount: γ. Below 1 each step counts in full as in most codes, those of MAML too: what is estimated is the gradient of no
        function (Thomas 2014, ICML), and what is said below of expectations holds for γ = 1
        without `standardize`.
      estimator: "dice": wₜ = □(Σₛ₍ₛ≤ₜ₎ log πₛ) - □(Σₛ₍ₛ<ₜ₎ log πₛ) with □(x) = exp(x - stop_gradient(x)). In expectation every
        derivative is that of the expected return (Foerster et al. 2018, arXiv 1802.05098; with baselines Farquhar et al. 2019,
        arXiv 1909.10549). "lvc": wₜ = □(log πₜ), less variance, and no products of scores of different times (Rothfuss et al.
        2019, arXiv 1810.06784). "log_probability": wₜ = log πₜ, the code of Finn et al. 2017, whose second derivative lacks the
        products of scores.
      baseline: "linear": ridge regression of the returns on states and time (Duan et al. 2016, arXiv 1604.06778, section
        3), fitted to these episodes: not independent of the actions, hence a bias of the order of features / steps. "others":
        the mean return at that time of the other episodes, which is independent of them: no bias. None: 0.
      standardize: advantages of mean 0 and variance 1 over all steps of the batch, and the mean over steps in place of episodes:
        as in the code of MAML, whose step sizes are for this.

    `loss.per_example` exists; an episode's part depends on the others through baseline, scale and key ("jacobian").

    Raises:
      ValueError: for a horizon below 1, a discount outside of (0, 1], unknown names; when traced, for "others" of one episode,
        and for dynamics that give other than (state, scalar, bool).
    """
    if not whole(horizon, 1):
        raise ValueError(f"horizon={horizon!r}: give a whole number of steps, 1 or more")
    if not 0 < discount <= 1:
        raise ValueError(f"discount={discount}: give a number above 0 and not above 1")
    for name, value, known in (("estimator", estimator, ESTIMATORS), ("baseline", baseline, BASELINES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: give one of {', '.join(map(str, known))}")
    times = np.arange(horizon)
    since = np.where(times[:, None] >= times, discount ** np.maximum(times[:, None] - times, 0.0), 0.0)

    @jax.named_scope("score_function")  # by which `gradcheck.frozen` knows these stops from others
    def each(params, batch, key):
        """The loss of each episode, and the episodes."""
        found = rollout(apply, dynamics, horizon, params, batch, key)
        present, count = found.present, len(found.present)
        returns = jnp.matmul(found.reward, since.astype(found.reward.dtype), precision="highest")
        advantage = returns - _baseline(baseline, found, returns)
        scale = 1.0
        if standardize:
            mean = jnp.mean(advantage, where=present)
            advantage = (advantage - mean) / (jnp.std(advantage, where=present) + 1e-8)
            scale = count / jnp.sum(present)
        states, actions = _flat((found.state, found.action))
        log_probability = _log_probability(forward(apply, params, states), actions).reshape(present.shape)
        weight = _weight(estimator, jnp.where(present, log_probability, 0))
        value = jnp.sum(jax.lax.stop_gradient(jnp.where(present, scale * advantage, 0)) * weight, 1)
        return -returns[:, 0] - value, found

    def loss(params, batch, key):
        values, found = each(params, batch, key)
        value = jnp.mean(values)
        metrics = {"return": jnp.mean(jnp.sum(found.reward, 1)), "steps": jnp.mean(jnp.sum(found.present, 1))}
        return value, {"loss": value} | jax.lax.stop_gradient(metrics)

    one: Any = with_examples(loss, lambda params, batch, key: each(params, batch, key)[0], apply)
    one.batch_statistics = True  # of baseline, scale and key
    one.inputs = lambda params, batch, key: _flat(rollout(apply, dynamics, horizon, params, batch, key).state)
    return one


def _flat(tree: PyTree) -> PyTree:
    """[episodes, horizon, ...] to [episodes * horizon, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _check_step(before: PyTree, after: PyTree, reward: jax.Array, goes_on: jax.Array) -> None:
    shapes = [jax.tree.map(lambda x: (jnp.shape(x)[1:], jnp.result_type(x)), state) for state in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"dynamics: the state has (shape, dtype) {shapes[1]} and had {shapes[0]}; give one of the same kind"
        )
    if reward.ndim != 1:
        raise ValueError(f"dynamics: the reward has shape {reward.shape[1:]}; give a scalar")
    if goes_on.ndim != 1 or goes_on.dtype != bool:
        raise ValueError(
            f"dynamics: whether the episode goes on has shape {goes_on.shape[1:]} and dtype {goes_on.dtype}; give a bool"
        )


def _draw(key: Key, outputs: Any) -> jax.Array:
    if not isinstance(outputs, tuple):
        return jax.random.categorical(key, outputs)
    mean, log_std = outputs
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)


def _log_probability(outputs: Any, action: jax.Array) -> jax.Array:
    """[examples]."""
    if not isinstance(outputs, tuple):
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), action[:, None], 1)[:, 0]
    mean, log_std = outputs
    each = -0.5 * jnp.square((action - mean) * jnp.exp(-log_std)) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return each.reshape(len(each), -1).sum(1)


def _weight(estimator: str, log_probability: jax.Array) -> jax.Array:
    """wₜ less its value, [episodes, horizon]."""
    stop = jax.lax.stop_gradient
    if estimator == "log_probability":
        return log_probability - stop(log_probability)
    if estimator == "lvc":
        return jnp.exp(log_probability - stop(log_probability)) - 1
    through = jnp.cumsum(log_probability, 1)
    box = jnp.exp(through - stop(through))
    return box - jnp.concatenate([jnp.ones_like(box[:, :1]), box[:, :-1]], 1)


def _baseline(kind: str | None, found: Episodes, returns: jax.Array) -> jax.Array:
    """What is expected of each step, [episodes, horizon]."""
    count, horizon = returns.shape
    if kind is None:
        return jnp.zeros_like(returns)
    if kind == "others":
        if count < 2:
            raise ValueError("baseline='others': one episode has no others; draw two or more, or give None")
        return (jnp.sum(returns, 0, keepdims=True) - returns) / (count - 1)
    states = [x.reshape(count * horizon, -1).astype(returns.dtype) for x in jax.tree.leaves(found.state)]
    state = jnp.clip(jnp.concatenate(states, 1), -10, 10)
    time = jnp.tile(jnp.arange(horizon, dtype=returns.dtype) / 100, count)[:, None]
    features = jnp.concatenate([state, state**2, time, time**2, time**3, jnp.ones_like(time)], 1)
    present, size = found.present.reshape(-1, 1), features.shape[1]
    # By QR: the features may be dependent (one-hot states), and in float32 their Gram matrix then hides the ridge.
    ridge = jnp.sqrt(1e-5) * jnp.eye(size, dtype=returns.dtype)
    q, r = jnp.linalg.qr(jnp.concatenate([features * present, ridge]))
    with jax.default_matmul_precision("highest"):
        sought = q[:-size].T @ (present[:, 0] * returns.reshape(-1))
        return (features @ jax.scipy.linalg.solve_triangular(r, sought)).reshape(returns.shape)
