"""Our sides of the comparison: the library's outer step in its loop, and plain JAX. Each compiles once, to what is timed."""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial

from benchmarks import naive
from benchmarks.cases import Case, flat
from maml import derivatives, losses, objectives, train
from maml.inner_loop import only, unroll
from maml.types import Task

OPTIMIZER = optax.adam(1e-3)
_MOMENTUM = 0.9
"""Of that Adam: its first moment after one step is 0.1 of the gradient, by which the gradient of the timed program is read."""


def variants(order: str) -> dict[str, derivatives.Derivative]:
    """The library's ways to differentiate the inner loop, by the name of their column."""
    if order == "first":
        return {"library first order": derivatives.first_order}
    names = [name for name in ("reverse", "mixed") if hasattr(derivatives, name)]
    return {f"library {name}": getattr(derivatives, name) for name in names}


class Library:
    """Many outer steps per dispatch, by `train.compile_loop`, on fixed tasks."""

    def __init__(
        self, case: Case, tasks: Task, steps: int, derivative: derivatives.Derivative, remat: int | None = None
    ):
        apply, params = case.functional()
        params = jax.tree.map(lambda x: x.astype(precision(tasks)), params)
        loss = losses.mse(apply) if case.loss == "mse" else losses.cross_entropy(apply)
        inner = unroll(optax.sgd(case.step_size), steps, derivative, remat)
        adapt = only(nnx.Not(nnx.PathContains("norms")), inner) if case.norm else inner
        count = len(jax.tree.leaves(tasks)[0])
        step = train.meta_step(objectives.query_loss(loss, adapt), OPTIMIZER, meta_batch=count, task_chunk="auto")
        self.sampler = jax.device_put(Partial(_fixed, tasks))
        self.progress = train.begin(train.init(params, OPTIMIZER, jax.random.key(0)), step, self.sampler)
        lowered = _timed(lambda: train.compile_loop(step).lower(self.progress, self.sampler, jnp.int32(1)))
        compiled = _timed(lowered[0].compile)
        self.compiled, self.compile_s = compiled[0], lowered[1] + compiled[1]

    def gradient(self) -> dict[str, np.ndarray]:
        progress, _ = self.compiled(self.progress, self.sampler, jnp.int32(1))
        return _gradient(progress.state.opt_state)

    def run(self, steps: int) -> float:
        """Seconds per outer step of one dispatch of `steps`."""
        length = jax.device_put(np.int32(steps))
        return _timed(lambda: self.compiled(self.progress, self.sampler, length))[1] / steps


class Naive:
    """One jitted call per outer step."""

    def __init__(self, case: Case, tasks: Task, steps: int, order: str):
        params = {k: jnp.asarray(x, precision(tasks)) for k, x in flat(case.functional()[1]).items()}
        self.start, self.tasks = (params, OPTIMIZER.init(params)), jax.device_put(tasks)
        step = jax.jit(naive.outer_step(case, steps, order, OPTIMIZER))
        self.compiled, self.compile_s = _timed(lambda: step.lower(*self.start, self.tasks).compile())

    def gradient(self) -> dict[str, np.ndarray]:
        return _gradient(self.compiled(*self.start, self.tasks)[1])

    def run(self, steps: int) -> float:
        def loop():
            carry = self.start
            for _ in range(steps):
                carry = self.compiled(*carry, self.tasks)
            return carry

        return _timed(loop)[1] / steps


def precision(tasks: Task) -> np.dtype:
    """Of the inputs, hence of everything: float32 where it is timed, float64 where gradients are compared."""
    return tasks.support[0].dtype


def temporaries(side: Library | Naive) -> int:
    """Bytes of temporary memory of the compiled program."""
    return side.compiled.memory_analysis().temp_size_in_bytes


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """2-norm of the difference of two gradients, relative to the first.

    Raises:
      ValueError: where names or shapes differ.
    """
    shapes = [{k: x.shape for k, x in g.items()} for g in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"gradients of other parameters: {shapes[0]} and {shapes[1]}")
    a, b = (np.concatenate([g[k].astype(np.float64).ravel() for k in sorted(ours)]) for g in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def _fixed(tasks: Task, keys: jax.Array) -> Task:
    """A sampler that always draws `tasks`; the barrier keeps the compiler from working on them once for all outer steps."""
    return jax.lax.optimization_barrier((tasks, jax.random.key_data(keys)))[0]


def _gradient(state: optax.OptState) -> dict[str, np.ndarray]:
    return {k: x / (1 - _MOMENTUM) for k, x in flat(optax.tree.get(state, "mu")).items()}


def _timed(work) -> tuple:
    """The result of `work()`, ready, and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    return result, time.perf_counter() - start
