"""Evaluation on held-out tasks, under a protocol that every number carries with it."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from maml.inner_loop import check_kind
from maml.metrics import Interval, interval
from maml.objectives import check_norm, with_norm
from maml.random import keys_for
from maml.types import (
    Adapt,
    Adapted,
    Apply,
    Conditioned,
    Joint,
    Loss,
    Params,
    Sampler,
    Trace,
    as_argument,
    numbers,
    whole,
)

Evaluator = Callable[[Params], dict[str, Interval]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that must be equal for two numbers to be comparable.

    Attributes:
      split: meta_train, meta_valid or meta_test.
      tasks: number of tasks drawn.
      ways: classes per task; None for regression.
      shots, queries: examples per class in the support and the query set (points, for regression).
      steps: inner steps; metrics are reported after 0, 1, ..., steps.
      norm: "batch" (transductive: statistics of the query set), "support" or "joint" (inductive); see `objectives.query_loss`.
      seed: of the draw of the tasks.
      task: the task distribution in words (data set, class split, rotations, ...).
      step_size: of the inner steps, or of each of them; None where it is learned.
      prototypes: "euclidean" or "cosine": the head is made from the support set first (`inner_loop.with_prototypes`): nearest
        centroids, or NIL, with 0 steps. None: it is the one that was learned.
      batch: examples of a minibatch of the inner steps, where they are others than in training (Reptile's evaluation).
      ensemble: the checkpoints whose outputs are averaged, where there are several.

    Raises:
      ValueError: for sizes that are not positive, negative steps, an unknown norm or kind of prototypes.
    """

    split: str = "meta_test"
    tasks: int = 600
    ways: int | None = None
    shots: int = 1
    queries: int = 1
    steps: int = 1
    norm: str = "batch"
    seed: int = 0
    task: str = ""
    step_size: float | tuple[float, ...] | None = None
    prototypes: str | None = None
    batch: int | None = None
    ensemble: str | None = None

    def __post_init__(self):
        for name, least in (("tasks", 1), ("shots", 1), ("queries", 1), ("steps", 0), ("batch", 1)):
            value = getattr(self, name)
            if name == "batch" and value is None:  # that of training
                continue
            if not whole(value, least):
                raise ValueError(f"evaluation.{name}={value!r}: give a whole number, {least} or more")
        check_norm(self.norm)
        if self.prototypes is not None:
            check_kind(self.prototypes)

    def as_dict(self) -> dict[str, Any]:
        """What is written, and hashed. Without later fields where they say nothing: hashes from before there were any hold."""
        later = ("prototypes", "batch", "ensemble")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in later or v is not None}

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that name the protocol."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def evaluate(
    params: Params, sampler: Sampler, loss: Loss, adapt: Adapt, protocol: Protocol, chunk: int = 1, after: Any = None
) -> dict[str, Interval]:
    """Mean and 95 % interval over tasks of each query metric after each inner step: `step_0/loss`, `step_1/loss`, ...

    after: the inner steps after which the query set is measured, `[0, 50]`; None: all. The numbers stay as they are. Where
    each query is predicted alone (`norm="support"`) measuring takes most of the time, not adapting.

    `adapt` takes `protocol.steps` steps and `sampler` draws tasks of the protocol's sizes. Nothing is differentiated with
    respect to the meta-parameters, so the memory is that of plain training. Tasks are drawn inside, `chunk` at a time, and
    depend on the protocol's seed and their index alone. A progress bar appears after 2 s where stderr is a terminal.

    Raises:
      ValueError: for another `chunk` or `after`, and for tasks and inner loops of other sizes than the protocol's.
    """
    return evaluator(sampler, loss, adapt, protocol, chunk, after)(params)


def evaluator(
    sampler: Sampler, loss: Loss, adapt: Adapt, protocol: Protocol, chunk: int = 1, after: Any = None
) -> Evaluator:
    """`evaluate` as a function of the parameters, compiled once: for validation during training."""
    if not whole(chunk, 1):
        raise ValueError(f"chunk={chunk!r}: give a whole number of tasks, 1 or more")
    steps = _measured_steps(protocol, after)
    root = jax.random.key(protocol.seed)
    block = min(100, protocol.tasks)

    @jax.jit
    def run(params, sampler, start):
        keys = keys_for(root, protocol.split, 0, block, start)
        return lax.map(lambda k: _curve(params, sampler, loss, adapt, protocol, k, steps), keys, batch_size=chunk)

    def measure(params):
        check_sizes(params, sampler, loss, adapt, protocol)
        starts = range(0, protocol.tasks, block)
        bar = tqdm(starts, protocol.split, unit=f"×{block} tasks", delay=2, disable=not sys.stderr.isatty())
        blocks = [jax.device_get(run(params, as_argument(sampler), np.int32(start))) for start in bar]
        values = {k: np.concatenate([b[k] for b in blocks])[: protocol.tasks] for k in blocks[0]}
        return {f"step_{step}/{name}": interval(v[:, i]) for name, v in values.items() for i, step in enumerate(steps)}

    return measure


def _measured_steps(protocol: Protocol, after: Any) -> list[int]:
    """The inner steps after which something is measured, in order.

    Raises:
      ValueError: for an empty list, and for other than steps that the protocol has.
    """
    if after is None:
        return list(range(protocol.steps + 1))
    if not isinstance(after, Sequence) or not after or not all(whole(i, 0) and i <= protocol.steps for i in after):
        raise ValueError(
            f"evaluation.after={after}: give a list of inner steps, 0 to {protocol.steps}, or null for all"
        )
    return sorted(set(map(int, after)))


def ensemble_apply(apply: Apply) -> Apply:
    """The mean of the outputs of several models, whose parameters are stacked: [models, ...]. Of logits in classification.

    MAML++ reports such a mean over its five best checkpoints (Antoniou et al. 2019, arXiv 1810.09502, in the authors' code).
    """

    def mean(params, inputs):
        stacked = type(params)(0, None) if isinstance(params, Conditioned | Joint) else 0
        return jax.tree.map(lambda x: x.mean(0), jax.vmap(apply, (stacked, None))(params, inputs))

    mean.takes_conditioned = getattr(apply, "takes_conditioned", False)
    return mean


def ensemble_adapt(adapt: Adapt, loss: Loss) -> Adapt:
    """An inner loop that adapts several models, [models, ...], each by itself under the `loss` of one."""

    def each(of_all, params, support, key) -> Adapted:
        del of_all
        adapted, (path, metrics) = jax.vmap(lambda p: adapt(loss, p, support, key))(params)
        first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), path)  # the steps
        return Adapted(adapted, Trace(first, jax.tree.map(lambda x: x.mean(0), metrics)))

    return each


def check_sizes(params: Params, sampler: Sampler, loss: Loss, adapt: Adapt, protocol: Protocol) -> None:
    """Before anything is measured under a protocol's name.

    Raises:
      ValueError: for tasks and inner loops of other sizes than the protocol's.
    """
    task = jax.eval_shape(sampler, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)))
    for name, side in (("shots", task.support), ("queries", task.query)):
        expected = (protocol.ways or 1) * getattr(protocol, name)
        drawn = jax.tree.leaves(side)[0].shape[1]
        if drawn != expected:
            raise ValueError(
                f"{name}={getattr(protocol, name)}: the sampler draws {drawn} examples and the protocol has {expected}; make "
                "them equal"
            )
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), task.support)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trace = jax.eval_shape(lambda p, s, k: adapt(loss, p, s, k), params, one, key).trace
    steps = jax.tree.leaves(trace.params)[0].shape[0] - 1
    if steps != protocol.steps:
        raise ValueError(f"steps={protocol.steps}: the inner loop takes {steps} steps; make them equal")


def _curve(params: Params, sampler: Sampler, loss: Loss, adapt: Adapt, protocol: Protocol, key, steps: Sequence[int]):
    """The query metrics of one task after these inner steps, each [len(steps)]."""
    key_task, key_adapt, key_query = jax.random.split(key, 3)
    task = jax.tree.map(lambda x: x[0], sampler(key_task[None]))
    adapted = adapt(loss, params, task.support, key_adapt)
    path = adapted.trace.params
    if len(steps) <= protocol.steps:
        path = jax.tree.map(lambda x: x[np.array(steps)], path)
    return lax.map(lambda p: numbers(loss(with_norm(p, task.support, protocol.norm), task.query, key_query)[1]), path)
