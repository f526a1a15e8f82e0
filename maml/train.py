"""Meta-training: the pure meta-step, and the loop that runs many of them per dispatch."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from maml.random import keys_for
from maml.sharding import mean_over_devices, tasks_each, tasks_mesh
from maml.types import Key, Metrics, Objective, Params, Sampler, Task, as_argument, of_model, whole


class MetaState(NamedTuple):
    """All that the meta-step carries: meta-steps done, the root of all keys, meta-parameters, the outer optimizer's state."""

    step: jax.Array
    key: Key
    params: Params
    opt_state: optax.OptState


MetaStep = Callable[[MetaState, Sampler], tuple[MetaState, Metrics]]


def init(params: Params, optimizer: optax.GradientTransformation, key: Key) -> MetaState:
    """The state before the first meta-step; `params` are all meta-parameters (`types.initial`), `key` the root of all keys."""
    return MetaState(jnp.zeros((), jnp.int32), key, params, optimizer.init(params))


def meta_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    meta_batch: int,
    task_chunk: int | str = "auto",
    devices: int | str = 1,
) -> MetaStep:
    """One outer step: θ ← update(∇θ mean over tasks of objective(θ, task)); pure, not jitted.

    Tasks are a pure function of (state.key, state.step): a resumed run draws what an uninterrupted one draws. The metrics are
    the objective's own, the mean outer loss as `objective` and the 2-norm of the meta-gradient as `gradient_norm` (over the
    model's parameters alone where the objective defines the update: what Reptile's inner optimizer carries would be most of it).

    Args:
      meta_batch: tasks per meta-step.
      task_chunk: tasks that are mapped together (vmap); the chunks run one after the other. "all", "auto", or a divisor
        of meta_batch. A matter of execution: the gradient is the same up to rounding.
      devices: over which the tasks are spread in equal parts, or "all"; chunks are then chunks of a part. The same holds.

    Raises:
      ValueError: for a meta_batch below 1, devices that do not divide it or are not there, a chunk that does not divide a part.
    """
    if not whole(meta_batch, 1):
        raise ValueError(f"meta_batch={meta_batch!r}: give a whole number of tasks, 1 or more")
    mesh, part = tasks_mesh(devices), tasks_each(meta_batch, devices)
    check_chunk(task_chunk, part)

    def mean_gradient(shared: tuple[MetaState, Sampler], of_tasks: Key, of_objective: Key) -> tuple[Params, Metrics]:
        state, sampler = shared
        chunk = chunk_size(task_chunk, part, state.params)
        return _mean_gradient(objective, state, sampler(of_tasks), of_objective, chunk)

    def step(state: MetaState, sampler: Sampler) -> tuple[MetaState, Metrics]:
        keys = keys_for(state.key, "meta_train/tasks", state.step, meta_batch)
        objective_keys = keys_for(state.key, "meta_train/objective", state.step, meta_batch)
        mean = mean_over_devices(mean_gradient, mesh) if mesh else mean_gradient
        grads, metrics = mean((state, as_argument(sampler) if mesh else sampler), keys, objective_keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = dict(metrics) | {"gradient_norm": optax.tree.norm(of_model(objective, grads))}
        return MetaState(state.step + 1, state.key, params, opt_state), metrics

    return step


def check_chunk(task_chunk: int | str, count: int) -> None:
    """ValueError for other than auto, all, or a divisor of the number of tasks."""
    if task_chunk in ("auto", "all"):
        return
    if not whole(task_chunk, 1) or count % task_chunk:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(f"task_chunk={task_chunk!r}: give auto, all or a divisor of {count} tasks: {divisors}")


def chunk_size(task_chunk: int | str, count: int, params: Params) -> int:
    """The number of tasks mapped together.

    "auto" is one on CPU, where batched products and convolutions with a kernel per task are slow, except for networks so
    small that the overhead of the loop weighs more; on GPU and TPU it is all.
    """
    if task_chunk == "auto":
        size = sum(x.size for x in jax.tree.leaves(params))
        return 1 if jax.default_backend() == "cpu" and size > 10_000 else count
    return count if task_chunk == "all" else int(task_chunk)


def _mean_gradient(
    objective: Objective, state: MetaState, tasks: Task, keys: Key, chunk: int
) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean over tasks, a chunk at a time: memory is that of one chunk."""
    over_tasks = jax.vmap(objective, (None, 0, 0, None))

    def mean(params, tasks, keys):
        if chunk == 1:
            task, key = jax.tree.map(lambda x: x[0], (tasks, keys))
            value, metrics = objective(params, task, key, state.step)
        else:
            result = over_tasks(params, tasks, keys, state.step)
            value, metrics = jax.tree.map(lambda x: x.mean(0), result)
        return value, dict(metrics) | {"objective": value}

    gradient = jax.grad(mean, has_aux=True)
    if chunk == len(keys):
        return gradient(state.params, tasks, keys)
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), (tasks, keys))

    def accumulate(total, one):
        grads, metrics = gradient(state.params, *one)
        return jax.tree.map(jnp.add, total, grads), metrics

    total, metrics = lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.params), chunks)
    count = len(keys) // chunk
    return jax.tree.map(lambda x: x / count, total), jax.tree.map(lambda x: x.mean(0), metrics)


class Window(NamedTuple):
    """Sums of the metrics since the last log line. Part of what is saved, so that a resumed run logs the same means."""

    count: jax.Array
    sums: Metrics


class Progress(NamedTuple):
    """What `fit` carries and a checkpoint holds."""

    state: MetaState
    window: Window


class NonFinite(ArithmeticError):
    """The outer loss, its gradient or the updated meta-parameters are no numbers any more."""


def begin(state: MetaState, step: MetaStep, sampler: Sampler) -> Progress:
    """The progress of a run that has not started: an empty window for the metrics that `step` gives.

    Raises:
      ValueError: for a metric that is no scalar.
    """
    _, metrics = jax.eval_shape(step, state, as_argument(sampler))
    for name, metric in metrics.items():
        if metric.shape:
            raise ValueError(
                f"metric {name!r} has shape {metric.shape}: metrics of an objective are scalars; reduce it"
            )
    return Progress(state, _empty(metrics))


def fit(
    progress: Progress,
    step: MetaStep,
    sampler: Sampler,
    *,
    steps: int,
    log_every: int,
    log: Callable[[int, Mapping[str, float]], None],
    every: Sequence[tuple[int, Callable[[Progress], None]]] = (),
    tick: Callable[[int], object] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    dispatch_s: float = 1.0,
) -> Progress:
    """Run meta-steps until `steps` are done: one compiled loop, about `dispatch_s` seconds of work per dispatch.

    How steps fall into dispatches changes no bit of the result. Metrics are means over the steps since the last log line,
    logged after the first step, every `log_every` steps and at the end.

    Args:
      every: pairs (n, callback); the callback gets the progress after each n-th step (validation, checkpoints), in order.
      tick: called with the number of steps done after each dispatch (a progress bar).
      stop: asked after each dispatch; once it is true `fit` returns, with fewer steps done.

    Raises:
      ValueError: for a log_every below 1.
      NonFinite: when the outer loss, its gradient or the update is not finite, before any callback; names the meta-step.
    """
    periods = [log_every, *(n for n, _ in every)]
    if min(periods) < 1:
        raise ValueError(f"log_every={log_every}, every={periods[1:]}: give 1 step or more")
    advance, lengths, sampler = compile_loop(step), _Lengths(dispatch_s), jax.device_put(as_argument(sampler))
    empty = _empty(progress.window.sums)
    done = int(progress.state.step)
    while done < steps and not stop():
        boundary = min(steps, *(done - done % n + n for n in periods)) if done else 1
        progress, finite = advance(progress, sampler, lengths.next(boundary - done))
        done = int(jax.device_get(progress.state.step))
        lengths.measure()
        if not jax.device_get(finite):
            raise NonFinite(f"the outer loss, its gradient or the update is not finite at meta-step {done}")
        tick(done)
        if done == 1 or done % log_every == 0 or done == steps:
            window = jax.device_get(progress.window)
            log(done, {k: float(v) / int(window.count) for k, v in window.sums.items()})
            if done == 1 or done % log_every == 0:  # the end may be extended by a resumed run
                progress = progress._replace(window=empty)
        for n, callback in every:
            if done % n == 0:
                callback(progress)
    return progress


def compile_loop(step: MetaStep):
    """Jit of: run `length` meta-steps, or fewer where the metrics cease to be finite."""

    def body(carry):
        i, progress, _, sampler = carry
        state, metrics = step(progress.state, sampler)
        sums = jax.tree.map(jnp.add, progress.window.sums, metrics)
        finite = jnp.isfinite(metrics["objective"]) & jnp.isfinite(metrics["gradient_norm"])
        return i + 1, Progress(state, Window(progress.window.count + 1, sums)), finite, sampler

    def advance(progress: Progress, sampler: Sampler, length):
        carry = jnp.zeros_like(length), progress, jnp.array(True), sampler
        _, progress, finite, _ = lax.while_loop(lambda c: (c[0] < length) & c[2], body, carry)
        # The last update may overflow after a finite loss, and is never to be saved.
        return progress, jnp.stack(
            [finite, *(jnp.isfinite(x).all() for x in jax.tree.leaves(progress.state.params))]
        ).all()

    return jax.jit(advance)


def _empty(metrics: Mapping[str, Any]) -> Window:
    wide = {k: jnp.promote_types(v.dtype, jnp.float32) for k, v in metrics.items()}  # also of counts and flags
    return Window(jnp.zeros((), jnp.int32), {k: jnp.zeros(v.shape, wide[k]) for k, v in metrics.items()})


class _Lengths:
    """Lengths of dispatches: powers of two, kept on the device, so that a steady run copies nothing to it."""

    def __init__(self, seconds: float):
        self.seconds, self.rate, self.arrays = seconds, 1.0, {}
        self.start, self.length = time.monotonic(), 0

    def next(self, most: int) -> jax.Array:
        """The largest power of two within `most` and within the time of a dispatch."""
        self.length = 1 << max(0, min(most, int(self.rate * self.seconds)).bit_length() - 1)
        self.start = time.monotonic()
        if self.length not in self.arrays:
            self.arrays[self.length] = jax.device_put(np.int32(self.length))
        return self.arrays[self.length]

    def measure(self) -> None:
        self.rate = self.length / max(time.monotonic() - self.start, 1e-9)
