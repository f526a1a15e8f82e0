"""Diagnostics during training: callbacks for `train.fit`, by config. They look at the parameters and change nothing.

`diagnostics.per_example.every=500` logs, on tasks drawn for it (the same in a resumed run):

    diagnostics/task/...     per-task meta-gradients: noise scale over tasks, coherence, norms, signal-to-noise per layer
    diagnostics/query/...    per-query-example meta-gradients within a task, and their noise scale in examples
    diagnostics/support/...  derivative of a task's query loss in the weight of each support example

as scalars to every logger, as histograms and a table of outliers to those that take them, and as pictures of the worst examples.
The last two need a loss with `per_example`. `diagnostics.curvature.every` logs what `experiments.curvature` measures, and
`diagnostics.learned.every` what the inner loop learns (step sizes, low-rank factors, ...), as it is stored:

    diagnostics/learned/NAME                      a number; of an array NAME/smallest, NAME/mean and NAME/largest
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from omegaconf import DictConfig

from experiments import build, curvature
from maml import plots, train
from maml.curvature import paths
from maml.per_example import (
    COSINE_BINS,
    LOG_NORM_BINS,
    Noise,
    coherence,
    histogram,
    influence,
    outliers,
    per_query_gradients,
    per_task_gradients,
    statistics,
    weighted,
)
from maml.random import keys_for
from maml.types import MetaParams, Params, Task, as_argument, of_model, padded

Callback = Callable[[train.Progress], None]


def callbacks(cfg: DictConfig, learner: build.Learner, loggers: Sequence[Any]) -> list[tuple[int, Callback]]:
    """The diagnostics that the config asks for, as pairs (every so many meta-steps, callback) of `train.fit`."""
    makers = {"per_example": per_example, "curvature": curvature.callback, "learned": learned_callback}
    periods = {name: cfg.diagnostics[name].every for name in makers}
    return [(every, makers[name](cfg, learner, loggers)) for name, every in periods.items() if every]


def tell(loggers: Sequence[Any], what: str, *arguments: Any) -> None:
    """Call the method of those loggers that have it."""
    for logger in loggers:
        if hasattr(logger, what):
            getattr(logger, what)(*arguments)


# --- learned by the inner loop ---


def learned(cfg: DictConfig, params: Params) -> dict[str, np.ndarray]:
    """The meta-parameters beside the model's own, by name; none where the inner loop has none or carries a state in them."""
    if not isinstance(params, MetaParams) or hasattr(build.inner_loop(cfg), "carried"):
        return {}
    return _named(params)


def _named(params: MetaParams) -> dict[str, np.ndarray]:
    return {name or "value": np.asarray(x) for name, x in paths(params.inner).items()}


def ends(values: np.ndarray) -> dict[str, float]:
    return {"smallest": float(values.min()), "mean": float(values.mean()), "largest": float(values.max())}


def learned_callback(cfg: DictConfig, learner: build.Learner, loggers: Sequence[Any]) -> Callback:
    """A callback that logs them.

    Raises:
      ValueError: where there is nothing to log.
    """
    if not learned(cfg, learner.state.params):
        raise ValueError(
            f"diagnostics.learned: algorithm {cfg.algorithm.name} learns nothing beside the model's parameters; set every=0"
        )

    def callback(progress: train.Progress) -> None:
        metrics = {}
        for name, x in _named(progress.state.params).items():
            metrics |= (
                {name: float(x.item())} if x.size == 1 else {f"{name}/{end}": value for end, value in ends(x).items()}
            )
        for logger in loggers:
            logger(int(progress.state.step), {f"diagnostics/learned/{k}": v for k, v in metrics.items()})

    return callback


# --- per example ---


class Seen(NamedTuple):
    """Of each task [tasks, ...], and within it of each query and each support example; None without `loss.per_example`."""

    tasks: Task
    losses: jax.Array
    norms: jax.Array
    cosines: jax.Array
    noise: Noise
    coherence: jax.Array
    layers: Mapping[str, tuple[jax.Array, jax.Array]]
    queries: "Queries | None"


class Queries(NamedTuple):
    losses: jax.Array
    norms: jax.Array
    cosines: jax.Array
    noise: Noise
    influence: jax.Array


def per_example(cfg: DictConfig, learner: build.Learner, loggers: Sequence[Any]) -> Callback:
    """A callback that measures at the parameters of the moment, and logs."""
    measure = measurement(cfg, learner)

    def callback(progress: train.Progress) -> None:
        state, step = progress.state, int(progress.state.step)
        seen = jax.device_get(measure(state.params, as_argument(learner.sampler), state.key, state.step))
        for logger in loggers:
            logger(step, {f"diagnostics/{k}": v for k, v in scalars(seen).items()})
        _log_histograms(loggers, seen, step)
        if seen.queries is not None and cfg.diagnostics.per_example.outliers:
            _log_outliers(loggers, seen, cfg.diagnostics.per_example.outliers, step)

    return callback


def measurement(cfg: DictConfig, learner: build.Learner) -> Callable[..., Seen]:
    """Compiled: (params, sampler, root key, meta-step) -> Seen."""
    objective, count = build.build_objective(cfg, learner.loss), cfg.diagnostics.per_example.tasks
    chunk = train.chunk_size("auto", count, learner.state.params)
    defines_update = getattr(objective, "defines_update", False)

    @jax.jit
    def measure(params, sampler, root, step) -> Seen:
        tasks = sampler(keys_for(root, "diagnostics/tasks", step, count))
        keys = keys_for(root, "diagnostics/objective", step, count)
        losses, gradients = per_task_gradients(objective, params, tasks, keys, step, chunk)
        gradients = of_model(objective, gradients)
        found = statistics(gradients)
        layers = {name: (found.layer_norms[name].mean(), found.gsnr[name]) for name in found.gsnr}
        queries = None
        of_examples = hasattr(learner.loss, "per_example") and not padded(tasks) and not defines_update
        if of_examples and getattr(learner.loss, "is_gradient", True):
            queries = _queries(cfg, learner, params, tasks, keys, step)
        return Seen(tasks, losses, found.norms, found.cosines, found.noise, coherence(gradients), layers, queries)

    return measure


def _queries(cfg: DictConfig, learner: build.Learner, params: Params, tasks: Task, keys: Any, step: Any) -> Queries:
    """Of each task on its own, one after the other: the memory is that of the query gradients of one task."""
    loss = weighted(learner.loss)
    objective, exact = (
        build.build_objective(cfg, loss),
        build.build_objective(build.with_derivative(cfg, "reverse"), loss),
    )

    def one(pair):
        task, key = pair
        losses, gradients = per_query_gradients(objective, params, task, key, step)
        found = statistics(gradients)
        weights = influence(exact, params, task, key, step)
        return Queries(losses, found.norms, found.cosines, found.noise, weights)

    return jax.lax.map(one, (tasks, keys))


def scalars(seen: Seen) -> dict[str, float]:
    """The numbers that every logger gets. A noise scale that is not resolved is NaN, and `resolved` 0."""
    values = {
        "task/norm_mean": seen.norms.mean(),
        "task/norm_max": seen.norms.max(),
        "task/cosine_mean": seen.cosines.mean(),
        "task/coherence": seen.coherence,
        **_noise("task", seen.noise),
    }
    for name, (norm, gsnr) in seen.layers.items():
        values |= {f"task/layer/{name}/norm": norm, f"task/layer/{name}/gsnr": gsnr}
    if (queries := seen.queries) is not None:
        together = Noise(queries.noise.trace.mean(), queries.noise.signal.mean())  # a ratio of means over tasks
        values |= {
            "query/norm_mean": queries.norms.mean(),
            "query/norm_max": queries.norms.max(),
            "query/cosine_mean": queries.cosines.mean(),
            **_noise("query", together),
            "support/influence_mean": queries.influence.mean(),
            "support/influence_max": queries.influence.max(),
        }
    return {name: float(value) for name, value in values.items()}


def _noise(name: str, noise: Noise) -> dict[str, Any]:
    return {
        f"{name}/noise_scale": noise.scale,
        f"{name}/noise_trace": noise.trace,
        f"{name}/noise_signal": noise.signal,
        f"{name}/noise_resolved": noise.resolved,
    }


def _log_histograms(loggers: Sequence[Any], seen: Seen, step: int) -> None:
    """To TensorBoard the values, to JSON lines the counts in fixed bins (of influences in those of their own range)."""
    values = {"task/log10_norm": _log10(seen.norms), "task/cosine": seen.cosines}
    if seen.queries is not None:
        values |= {"query/log10_norm": _log10(seen.queries.norms), "query/cosine": seen.queries.cosines}
        values |= {"support/influence": seen.queries.influence}
    record = {}
    for name, x in values.items():
        tell(loggers, "histogram", f"diagnostics/histogram/{name}", x, step)
        bins = _bins(name, x)
        record[f"diagnostics/histogram/{name}"] = {"bins": bins.tolist(), "counts": histogram(x, bins)}
    tell(loggers, "record", step, record)


def _log10(norms: Any) -> np.ndarray:
    return np.log10(np.maximum(norms, 1e-30))


def _bins(name: str, values: np.ndarray) -> np.ndarray:
    fixed = {"log10_norm": LOG_NORM_BINS, "cosine": COSINE_BINS}.get(name.rpartition("/")[-1])
    if fixed is not None:
        return fixed
    reach = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    return np.linspace(-reach, reach, 21)


def _log_outliers(loggers: Sequence[Any], seen: Seen, count: int, step: int) -> None:
    """The query examples with the largest meta-gradients, and the support examples that hurt most, over all tasks."""
    queries, support = worst_queries(seen, count), worst_support(seen, count)
    tables = {"diagnostics/outliers/query": queries, "diagnostics/outliers/support": support}
    tell(loggers, "record", step, tables)
    for name, rows in tables.items():
        tell(loggers, "text", name, markdown(rows), step)
        if any(hasattr(logger, "image") for logger in loggers):
            for figure in pictures(seen.tasks, name.rpartition("/")[-1], rows):
                tell(loggers, "image", name, figure, step)


def worst_queries(seen: Seen, count: int) -> list[dict[str, Any]]:
    found = seen.queries
    assert found is not None
    rows = outliers(np.ravel(found.norms), np.ravel(found.cosines), np.ravel(found.losses), count)
    each = found.norms.shape[1]
    return [{"task": row.index // each, **row._asdict(), "index": row.index % each} for row in rows]


def worst_support(seen: Seen, count: int) -> list[dict[str, Any]]:
    assert seen.queries is not None
    values = seen.queries.influence
    worst = np.argsort(-values, axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(worst, values.shape), strict=True)
    return [{"task": int(t), "index": int(i), "influence": float(values[t, i])} for t, i in places]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the keys of the rows as its head."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pictures(tasks: Task, side: str, rows: Sequence[Mapping[str, Any]]) -> list[plots.Figure]:
    """The examples of a table, where they are images."""
    inputs = getattr(tasks, side)[0]
    if inputs.ndim != 5:  # [tasks, examples, height, width, channels]
        return []
    images = np.stack([inputs[row["task"], row["index"]] for row in rows])
    measure = "norm" if side == "query" else "influence"
    return [plots.examples(images, [f"task {r['task']} #{r['index']}\n{measure} {r[measure]:.2g}" for r in rows])]
