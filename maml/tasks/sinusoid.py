"""Regression of sine waves from a few points."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maml.types import Sampler, Task, whole


def sinusoid(
    split: str = "meta_train",
    shots: int = 10,
    queries: int = 10,
    amplitude: Sequence[float] = (0.1, 5.0),
    phase: Sequence[float] = (0.0, jnp.pi),
    inputs: Sequence[float] = (-5.0, 5.0),
    oracle: bool = False,
    frequency: Sequence[float] | None = None,
) -> Sampler:
    """Tasks y = A·sin(x - φ) with A, φ and x uniform: Finn et al. 2017 (arXiv 1703.03400), section 5.1.

    With `frequency` y = A·sin(ωx - φ) with ω uniform too: the family of Meta-SGD (Li et al. 2017, arXiv 1707.09835), whose
    phase has the other sign (ωx + b: phases of [-π, 0] here are its b of [0, π]). The draws of A, φ and x do not change.

    Inputs [tasks, points, 1] and targets [tasks, points, 1]. With `oracle` the inputs are (x, A, φ) [tasks, points, 3], and
    (x, A, φ, ω) with `frequency`: the paper's upper bound, a learner that is told the task. All splits are one distribution;
    only the keys differ.

    Raises:
      ValueError: for sizes below 1 or an empty range; that of ω may be one number, (1.0, 1.0).
    """
    del split
    for name, size in (("shots", shots), ("queries", queries)):
        if not whole(size, 1):
            raise ValueError(f"{name}={size!r}: give a whole number of points, 1 or more")
    for name, bounds in (("amplitude", amplitude), ("phase", phase), ("inputs", inputs)):
        if len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"{name}={tuple(bounds)}: give a range (low, high) with low < high")
    if frequency is not None and (len(frequency) != 2 or not frequency[0] <= frequency[1]):
        raise ValueError(f"frequency={tuple(frequency)}: give a range (low, high) with low <= high, or None for 1")

    def draw(key) -> Task:
        key_a, key_p, key_x = jax.random.split(key, 3)
        a = jax.random.uniform(key_a, (), minval=amplitude[0], maxval=amplitude[1])
        p = jax.random.uniform(key_p, (), minval=phase[0], maxval=phase[1])
        x = jax.random.uniform(key_x, (shots + queries, 1), minval=inputs[0], maxval=inputs[1])
        told, angle = [a, p], x - p
        if frequency is not None:
            key_w = jax.random.fold_in(key, 3)  # none of the three children, so that these stay what they are
            w = jax.random.uniform(key_w, (), minval=frequency[0], maxval=frequency[1])
            told, angle = [a, p, w], w * x - p
        y = a * jnp.sin(angle)
        if oracle:
            x = jnp.concatenate([x, *(jnp.full_like(x, value) for value in told)], axis=1)
        return Task((x[:shots], y[:shots]), (x[shots:], y[shots:]))

    return jax.vmap(draw)
