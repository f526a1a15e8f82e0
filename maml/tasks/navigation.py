"""Navigation in the plane: a point that is to find a goal which only its rewards tell."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maml.types import Key, Sampler, Task, whole


def navigation(
    split: str = "meta_train", shots: int = 20, queries: int = 20, goal: float = 0.5, start: float = 0.0
) -> Sampler:
    """A goal uniform in [-goal, goal]² for each task: Finn et al. 2017 (arXiv 1703.03400), section 5.3 and appendix A.2.

    Both sets of a task are pairs (starts, goals), [tasks, episodes, 2], with the task's goal in every row: what
    `losses.policy_gradient` draws episodes from, with `point_mass`. Starts are the origin, or uniform in [-start, start]² for
    each episode. All splits are one distribution; only the keys differ.

    Raises:
      ValueError: for fewer than one episode, and bounds that are no bounds.
    """
    del split
    for name, size in (("shots", shots), ("queries", queries)):
        if not whole(size, 1):
            raise ValueError(f"{name}={size!r}: give a whole number of episodes, 1 or more")
    if not (goal > 0 and start >= 0):
        raise ValueError(f"goal={goal}, start={start}: give a bound above 0 for goals, and one of 0 or more for starts")

    def draw(key) -> Task:
        key_goal, key_start = jax.random.split(key)
        goals = jnp.tile(jax.random.uniform(key_goal, (1, 2), minval=-goal, maxval=goal), (shots + queries, 1))
        starts = jax.random.uniform(key_start, goals.shape, minval=-start, maxval=start)
        return Task((starts[:shots], goals[:shots]), (starts[shots:], goals[shots:]))

    return jax.vmap(draw)


def point_mass(
    key: Key,
    state: Float[Array, "2"],
    action: Float[Array, "2"],
    goal: Float[Array, "2"],
    *,
    step: float = 0.1,
    squared: bool = False,
) -> tuple[Float[Array, "2"], Float[Array, ""], Bool[Array, ""]]:
    """The point moves by `step` times the action, clipped to [-1, 1]; its reward is minus the distance to the goal.

    The episode ends within 0.01 of the goal. The paper's text has the distance `squared`, the authors' code has not; a point that
    stays at the origin has a return of -38 in 100 steps without the square, which is what the paper's Table 4 starts
    from (-40.41), and -17 with it.
    """
    del key
    state = (state + step * jnp.clip(action, -1, 1)).astype(state.dtype)
    apart = jnp.sum(jnp.square(state - goal))
    return state, -(apart if squared else jnp.sqrt(apart)), apart >= 0.01**2
