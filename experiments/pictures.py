"""The pictures of a run: per-step metrics, training curves, and adaptation on single tasks."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments import build
from experiments.collect import records
from maml import plots
from maml.evaluate import Protocol
from maml.losses import rollout
from maml.metrics import Interval
from maml.objectives import with_norm
from maml.random import keys_for
from maml.types import Params, Transitions, padded


def draw(
    cfg: DictConfig,
    learner: build.Learner,
    params: Params,
    protocol: Protocol,
    metrics: Mapping[str, Interval],
) -> dict[str, plots.Figure]:
    """Name -> figure: `step_<metric>` after each inner step, and `adaptation` of curves and paths, or `episode`."""
    figures = {f"step_{name}": _step_curve(name, metrics, protocol) for name in _names(metrics)}
    task = jax.eval_shape(build.protocol_sampler(cfg, protocol), jax.random.split(jax.random.key(0), 1))
    inputs, targets = task.query
    policy = "dynamics" in cfg.task.loss
    regression = not policy and targets.shape[-1] == 1 and not isinstance(task.support, Transitions)
    if padded(task):
        return figures
    if protocol.ways and inputs.ndim == 5:  # [tasks, examples, height, width, channels]
        figures |= _episode(cfg, learner, params, protocol)
    elif policy and inputs.shape[2:] == targets.shape[2:] == (2,):  # [tasks, episodes, place] and goals
        figures |= _paths(cfg, learner, params, protocol)
    elif not protocol.ways and inputs.ndim == 3 and regression:  # [tasks, points, features]
        figures |= _fits(cfg, learner, params, protocol)
    return figures


def training_curves(directory: Path) -> dict[str, plots.Figure]:
    """Outer and support metrics over meta-training, from `metrics.jsonl`."""
    rows = records(directory)
    figures = {}
    for name in ("loss", "accuracy", "return"):
        keys = [f"meta_train/support/{name}", f"meta_train/query/{name}"]
        curves = {k: _series(rows, k) for k in keys if any(k in r for r in rows)}
        if curves:
            figures[f"training_{name}"] = plots.learning_curves(curves, name)
    return figures


def _series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    pairs = [(r["step"], np.nan if r[key] is None else r[key]) for r in rows if key in r]
    return [s for s, _ in pairs], [v for _, v in pairs]


def _names(metrics: Mapping[str, Interval]) -> list[str]:
    return sorted({name.split("/", 1)[1] for name in metrics})


def _step_curve(name: str, metrics: Mapping[str, Interval], protocol: Protocol) -> plots.Figure:
    nothing = Interval(np.nan, None, 0)  # evaluation.after
    values = [metrics.get(f"step_{step}/{name}", nothing) for step in range(protocol.steps + 1)]
    means = np.array([v.mean for v in values])
    ci95 = np.array([np.nan if v.ci95 is None else v.ci95 for v in values])
    return plots.step_curve({f"{protocol.split}, {protocol.hash}": (means, ci95)}, name)


def _adapted(cfg, learner, params, protocol, queries: int, tasks: int, see=None):
    """Tasks drawn under the protocol, and the query outputs after 0..steps inner steps [tasks, steps + 1, ...].

    see: (params, query, key) -> what is to be seen in place of the outputs.
    """
    sampler = build.protocol_sampler(cfg, dataclasses.replace(protocol, queries=queries))
    adapt = build.build_adapt(cfg, protocol)
    keys = keys_for(jax.random.key(protocol.seed), "pictures", 0, tasks)

    shown = see or (lambda p, query, _: learner.apply(p, query[0]))

    def outputs(task, key):
        path = adapt(learner.loss, params, task.support, key).trace.params
        return jax.lax.map(lambda p: shown(with_norm(p, task.support, protocol.norm), task.query, key), path)

    drawn = sampler(keys)
    return jax.device_get((drawn, jax.jit(jax.vmap(outputs))(drawn, keys)))


def _fits(cfg, learner, params, protocol) -> dict[str, plots.Figure]:
    """Four regression tasks of one input: support, true function, predictions at 0, 1 and the last step."""
    tasks, outputs = _adapted(cfg, learner, params, protocol, queries=200, tasks=4)
    steps = sorted({0, min(1, protocol.steps), protocol.steps})
    fits = []
    for i in range(4):
        x = tasks.query[0][i, :, 0]
        order = np.argsort(x)
        predictions = {step: outputs[i, step, order, 0] for step in steps}
        support = (tasks.support[0][i, :, 0], tasks.support[1][i, :, 0])
        fits.append(plots.Fit(x[order], tasks.query[1][i, order, 0], predictions, support))
    return {"adaptation": plots.adaptation_grid(fits)}


def _paths(cfg, learner, params, protocol) -> dict[str, plots.Figure]:
    """Three episodes of each of four tasks in the plane, at 0, 1 and the last step."""
    dynamics, horizon = instantiate(cfg.task.loss.dynamics), cfg.task.loss.horizon
    see = functools.partial(rollout, learner.apply, dynamics, horizon)
    tasks, seen = _adapted(cfg, learner, params, protocol, queries=3, tasks=4, see=see)
    steps = sorted({0, min(1, protocol.steps), protocol.steps})
    after = np.where(seen.present[..., None], seen.following, np.nan)
    places = np.concatenate([seen.state[..., :1, :], after], -2)
    found = [plots.Paths({s: places[i, s] for s in steps}, tasks.query[1][i, 0]) for i in range(4)]
    return {"adaptation": plots.paths_grid(found)}


def _episode(cfg, learner, params, protocol) -> dict[str, plots.Figure]:
    """One classification task with the predictions after the last inner step."""
    tasks, outputs = _adapted(cfg, learner, params, protocol, protocol.queries, tasks=1)
    predictions = outputs[0, -1].argmax(-1)
    sizes = protocol.ways, protocol.shots, protocol.queries
    return {"episode": plots.episode(tasks.support[0][0], tasks.query[0][0], *sizes, predictions)}
