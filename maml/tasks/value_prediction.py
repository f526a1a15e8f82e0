"""Prediction of values: Markov reward processes, seen through sampled transitions and judged on the exact value function.

The support set of a task is a batch of `Transitions` (for `losses.td0`), the query set all states with their true values
v = (I - PΓ)⁻¹ r, each state with the same weight, so that the query loss is the mean squared error to the exact value function.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maml.types import Key, Sampler, Task, Transitions, whole


class Process(NamedTuple):
    """A Markov reward process: P(s'|s), the mean reward on leaving s, the discount on arriving in s', and where episodes start.

    A terminal state is one on whose arrival the discount is 0.
    """

    transition: Float[Array, "states states"]
    reward: Float[Array, "states"]
    discount: Float[Array, "states"]
    start: Float[Array, "states"]
    features: Float[Array, "states features"]


def exact_values(process: Process) -> Float[Array, "states"]:
    """v = (I - PΓ)⁻¹ r, with Γ = diag(discount): the solution of v(s) = r(s) + Σ P(s'|s) γ(s') v(s')."""
    step = process.transition * process.discount[None]
    return jnp.linalg.solve(jnp.eye(len(step), dtype=step.dtype) - step, process.reward)


def visits(process: Process) -> Float[Array, "states"]:
    """d ∝ (I - ΓPᵀ)⁻¹ start: how often episodes are in each state before they end, where 1 - γ is the chance of ending.

    Unlike a stationary distribution it is unique for every process, and TD(0) with linear values converges under it.
    """
    step = process.transition * process.discount[None]
    count = jnp.linalg.solve(jnp.eye(len(step), dtype=step.dtype) - step.T, process.start)
    count = jnp.maximum(count, 0)  # rounding
    return count / count.sum()


def value_prediction(
    split: str = "meta_train",
    shots: int = 20,
    states: int = 10,
    branching: int = 3,
    features: int = 4,
    discount: float = 0.8,
) -> Sampler:
    """Random processes: Garnets (Bhatnagar et al. 2009, Automatica 45, 2471-2482) without actions; a family of our own.

    Each state has `branching` successors, drawn without replacement, with probabilities uniform on the simplex. The features φ(s)
    are standard normal, and r(s) = φ(s)·w with w normal of variance 1/features. What differs from task to task is w, P and φ: a
    learner that knows the family can tell the value of a state that it has not visited.

    The support set is `shots` independent transitions: s from `visits` for a uniform start, s' from P. Inputs [tasks, shots,
    features], rewards and discounts [tasks, shots, 1]; query inputs [tasks, states, features], values [tasks, states, 1]. All
    splits are one distribution; only the keys differ.

    Raises:
      ValueError: for sizes below 1, more successors than states, and a discount outside of [0, 1).
    """
    del split
    _check(shots=(shots, 1), states=(states, 1), branching=(branching, 1), features=(features, 1))
    if branching > states:
        raise ValueError(f"branching={branching}: a process of states={states} has no more successors than states")
    if not 0 <= discount < 1:
        raise ValueError(f"discount={discount}: give a number from 0 to below 1; these processes do not end")

    def draw(key) -> Task:
        key_s, key_p, key_f, key_w, key_t = jax.random.split(key, 5)
        _, successors = jax.lax.top_k(jax.random.uniform(key_s, (states, states)), branching)
        chances = jax.random.exponential(key_p, (states, branching))
        chances = chances / chances.sum(1, keepdims=True)
        transition = jnp.zeros((states, states)).at[jnp.arange(states)[:, None], successors].set(chances)
        inputs = jax.random.normal(key_f, (states, features))
        reward = inputs @ jax.random.normal(key_w, (features,)) / jnp.sqrt(features)
        start = jnp.full(states, 1 / states)
        return _task(key_t, Process(transition, reward, jnp.full(states, discount), start, inputs), shots)

    return jax.vmap(draw)


def boyan_chain(split: str = "meta_train", shots: int = 20, states: int = 13, spread: float = 0.0) -> Sampler:
    """Boyan's chain: from state i to i - 1 or i - 2 at even odds, reward -3, and from 1 to the last, 0, reward -2.

    Boyan 2002 (Machine Learning 49, 233-246): 13 states, episodes start in the highest and are not discounted. The
    4 features interpolate linearly between states 12, 8, 4 and 0, so that v(i) = -2i is linear in them, with the coefficients
    -24, -16, -8, 0. Tasks of the chain itself differ in their transitions alone; with `spread` ς > 0 each has odds of its own,
    uniform in ½ (1 ± ς), and each of its rewards is multiplied by a number uniform in 1 ± ς.

    Shapes are those of `value_prediction`; the rows of the query set are the states 0, 1, ..., states - 1.

    Raises:
      ValueError: for fewer than 4 states, sizes below 1, and a spread outside of [0, 1].
    """
    del split
    _check(shots=(shots, 1), states=(states, 4))
    if not 0 <= spread <= 1:
        raise ValueError(f"spread={spread}: give a number from 0 to 1")

    def draw(key) -> Task:
        key_p, key_r, key_t = jax.random.split(key, 3)
        return _task(key_t, _chain(states, spread, key_p, key_r), shots)

    return jax.vmap(draw)


def _chain(states: int, spread: float, key_p: Key, key_r: Key) -> Process:
    i = jnp.arange(states)
    near = 0.5 * (1 + spread * jax.random.uniform(key_p, (states,), minval=-1.0, maxval=1.0))
    near = jnp.where(i < 2, 1.0, near)  # state 1 has one successor, and 0 is the last
    transition = jnp.zeros((states, states)).at[i, jnp.maximum(i - 1, 0)].add(near)
    transition = transition.at[i, jnp.maximum(i - 2, 0)].add(1 - near)
    reward = jnp.where(i == 0, 0.0, jnp.where(i == 1, -2.0, -3.0))
    reward = reward * (1 + spread * jax.random.uniform(key_r, (states,), minval=-1.0, maxval=1.0))
    place = 3 * (states - 1 - np.arange(states)) / (states - 1)  # on the host: the same for every task and compiler
    features = jnp.asarray(np.maximum(0.0, 1 - np.abs(place[:, None] - np.arange(4.0)[None])), float)
    start = jnp.where(i == states - 1, 1.0, 0.0)
    return Process(transition, reward, jnp.where(i == 0, 0.0, 1.0), start, features)


def _task(key: Key, process: Process, shots: int) -> Task:
    """Independent transitions whose first states are drawn from `visits`, and all states with their values."""
    key_tm1, key_t = jax.random.split(key)
    s_tm1 = jax.random.categorical(key_tm1, jnp.log(visits(process)), shape=(shots,))
    s_t = jax.random.categorical(key_t, jnp.log(process.transition[s_tm1]), axis=-1)
    support = Transitions(
        process.features[s_tm1],
        process.reward[s_tm1][:, None],
        process.features[s_t],
        process.discount[s_t][:, None],
    )
    return Task(support, (process.features, exact_values(process)[:, None]))


def _check(**sizes: tuple[int, int]) -> None:
    for name, (size, least) in sizes.items():
        if not whole(size, least):
            raise ValueError(f"{name}={size!r}: give a whole number, {least} or more")
