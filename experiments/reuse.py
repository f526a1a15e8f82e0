"""What adaptation changes: each layer before and after the inner loop, and what it is worth while the first layers stay frozen.

    python -m experiments.reuse RUN_DIRECTORY [tasks=N] [queries=N] [evaluation.KEY=VALUE ...] [checkpoints=STEP]
                                [task.data_dir=DIR]

The analysis of Raghu et al. 2020 (arXiv 1909.09157), section 3, of the newest checkpoint of a run or of that of a meta-step:
similarity of the outputs of each layer on query inputs (Figure 2) and the evaluation with frozen layers (Table 1). Writes
RUN_DIRECTORY/reuse/reuse.md with its figures as PNG, and reuse.json with its numbers (of checkpoints=STEP to reuse-STEP).

Similarity is over the first `tasks` of the protocol's draw (100), with `queries` examples per class of their own (15; 100 points
for regression, and of a policy the states of 100 episodes before adaptation): CCA needs more examples than both sides have
features. The frozen rows are under the run's own protocol.
"""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from omegaconf import DictConfig

from experiments import build, diagnostics
from experiments.evaluate import load
from experiments.program import on_run, write
from experiments.results import as_json
from maml import plots
from maml.evaluate import Protocol, evaluate
from maml.inner_loop.parts import composed
from maml.metrics import interval
from maml.models import activations, blocks
from maml.objectives import with_norm
from maml.random import keys_for
from maml.similarity import cca, cka
from maml.train import chunk_size
from maml.types import Adapt, Adapted, Loss, Params, Sampler, Trace, as_argument, leaf_name

Rows = list[dict[str, Any]]


# --- similarity ---


def similarity(cfg: DictConfig, learner: build.Learner, params: Params, protocol: Protocol) -> Rows:
    """A row for each layer in order of execution: positions x features that are compared, CCA and CKA over tasks."""
    if (least := build.evaluated_task(cfg).get("least_ways")) is not None:
        raise ValueError(
            f"least_ways={least}: layers are compared on tasks of one size, and those of this run vary; give "
            "evaluation.least_ways=0"
        )
    sampler, adapt = build.protocol_sampler(cfg, protocol), build.build_adapt(cfg, protocol)
    outputs = activations(build.build_module(cfg, learner.sampler, jax.random.key(cfg.seed)))

    @jax.jit
    def run(params, sampler, keys):
        return lax.map(lambda key: _compared(outputs, learner.loss, adapt, params, sampler, protocol.norm, key), keys)

    keys = keys_for(jax.random.key(protocol.seed), protocol.split, 0, protocol.tasks)
    seen = jax.device_get(run(params, as_argument(sampler), keys))
    shapes = jax.eval_shape(lambda key: _drawn(outputs, learner.loss, adapt, params, sampler, "batch", key)[0], keys[0])
    return [
        {
            "layer": name,
            "positions": shapes[name].size // shapes[name].shape[-1],
            "features": shapes[name].shape[-1],
            **{measure: as_json(interval(values)) for measure, values in measures.items()},
        }
        for name, measures in seen.items()
    ]


def _compared(outputs: Callable, loss: Loss, adapt: Adapt, params: Params, sampler: Sampler, norm: str, key):
    """{layer: {measure: scalar}} of one task."""
    before, after = _drawn(outputs, loss, adapt, params, sampler, norm, key)
    return OrderedDict(
        (name, OrderedDict((of.__name__, _or_nan(of, x, after[name])) for of in (cca, cka)))
        for name, x in before.items()
    )


def _drawn(outputs: Callable, loss: Loss, adapt: Adapt, params: Params, sampler: Sampler, norm: str, key):
    """Query outputs of each layer before and after adaptation to one task, drawn and adapted as in `maml.evaluate`."""
    key_task, key_adapt, key_query = jax.random.split(key, 3)
    task = jax.tree.map(lambda x: x[0], sampler(key_task[None]))
    adapted, (path, _) = adapt(loss, params, task.support, key_adapt)
    start = jax.tree.map(lambda x: x[0], path)
    inputs = getattr(loss, "inputs", None)
    seen = inputs(start, task.query, key_query) if inputs else task.query[0]
    return [outputs(with_norm(p, task.support, norm), seen) for p in (start, adapted)]


def _or_nan(of: Callable, x, y):
    """NaN where there are too few examples for an answer."""
    try:
        return of(x, y)
    except ValueError:
        return jnp.full((), jnp.nan)


def query_inputs(sampler: Sampler) -> Any:
    """Shape and type of the query inputs of one task."""
    tasks = jax.eval_shape(sampler, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tasks.query[0])


# --- frozen layers ---


def frozen(cfg: DictConfig, learner: build.Learner, params: Params, protocol: Protocol) -> Rows:
    """A row for each number of first layers that stay, none to all: the metrics after the last inner step."""
    sampler, adapt = build.protocol_sampler(cfg, protocol), build.build_adapt(cfg, protocol)
    parts = blocks(build.build_module(cfg, learner.sampler, jax.random.key(cfg.seed)), query_inputs(sampler))
    chunk, layers, last = chunk_size("auto", protocol.tasks, params), list(parts), f"step_{protocol.steps}/"
    rows = []
    for count in range(len(layers) + 1):
        stays = _staying(parts, count)
        metrics = evaluate(params, sampler, learner.loss, freeze(stays, adapt), protocol, chunk, after=[protocol.steps])
        values = {name.removeprefix(last): as_json(v) for name, v in metrics.items() if name.startswith(last)}
        rows.append({"frozen": count, "last_frozen": layers[count - 1] if count else None, **values})
    return rows


def _staying(parts: Mapping[str, Sequence[str]], count: int) -> Callable[[str], bool]:
    """Whether the parameter of a path belongs to the first so many layers; to all layers belongs all that there is."""
    first = tuple(f"{path}/" for paths in list(parts.values())[:count] for path in paths)
    return lambda path: count == len(parts) or path.startswith(first)


def freeze(stays: Callable[[str], bool], adapt: Adapt) -> Adapt:
    """Run `adapt` while the parameters whose path is told to stay remain as they were.

    Unlike `inner_loop.only` it goes around any inner loop, also one that starts elsewhere, and may leave nothing to move.
    """

    def adapt_rest(loss: Loss, params, support, key) -> Adapted:
        fixed = jax.tree.map(lambda x: x[0], adapt(loss, params, support, key).trace.params)

        def join(moved):
            return jax.tree.map_with_path(lambda path, x, y: x if stays(leaf_name(path)) else y, fixed, moved)

        adapted = adapt(composed(loss, join), params, support, key)
        return Adapted(join(adapted.params), Trace(jax.vmap(join)(adapted.trace.params), adapted.trace.metrics))

    return adapt_rest


# --- the report ---


def reuse(
    directory: Path, tasks: int = 100, queries: int | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The numbers of the report on the newest checkpoint of a run, or on that of `checkpoints=STEP`."""
    cfg, learner, found = load(directory, overrides)
    if len(found) > 1:
        raise ValueError(f"checkpoints={','.join(map(str, found))}: give one; representations are those of one network")
    ((step, params),) = found.items()
    protocol = build.build_protocol(cfg)
    queries = queries or (15 if protocol.ways else 100)
    return {
        "algorithm": cfg.algorithm.name,
        "meta_step": step,
        "protocol": protocol.as_dict(),
        "protocol_hash": protocol.hash,
        "similarity_tasks": tasks,
        "similarity": similarity(cfg, learner, params, dataclasses.replace(protocol, tasks=tasks, queries=queries)),
        "frozen": frozen(cfg, learner, params, protocol),
    }


def figures(report: Mapping[str, Any]) -> dict[str, plots.Figure]:
    rows, frozen_rows = report["similarity"], report["frozen"]
    metric = "accuracy" if "accuracy" in frozen_rows[0] else "loss"
    return {
        "similarity": plots.by_layer(
            {name.upper(): _column(rows, name) for name in ("cca", "cka")},
            [row["layer"] for row in rows], "similarity before and after adaptation",
        ),
        "frozen": plots.step_curve(
            {f"after {report['protocol']['steps']} inner steps": _column(frozen_rows, metric)}, metric, "layers frozen"
        ),
    }  # fmt: skip


def _column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and half-widths, NaN where there is none."""
    mean, ci95 = (np.array([row[name][key] for row in rows], np.float64) for key in ("mean", "ci95"))
    return mean, ci95


def markdown(report: Mapping[str, Any]) -> str:
    protocol = ", ".join(f"{k} {v}" for k, v in report["protocol"].items() if v is not None)
    return "\n".join(
        [
            f"# Feature reuse: {report['algorithm']} at meta-step {report['meta_step']}",
            "",
            f"Protocol {report['protocol_hash']}: {protocol}. ± is the 95 % interval over tasks.",
            "",
            "## Similarity of each layer before and after adaptation",
            "",
            f"Over {report['similarity_tasks']} tasks: mean CCA of the directions that hold 99 % of the variance (SVCCA), linear "
            "CKA; of the layer's outputs before norm and activation function, on query inputs (of a policy: on the states of its "
            "episodes before adaptation). –: constant outputs, or too few positions for the features (CCA takes more than twice "
            "as many: give queries=).",
            "",
            diagnostics.markdown([_cells(row) for row in report["similarity"]]),
            "",
            "![similarity](similarity.png)",
            "",
            "## With the first layers frozen during adaptation",
            "",
            f"After {report['protocol']['steps']} inner steps. With all layers frozen these are the meta-parameters.",
            "",
            diagnostics.markdown([_cells(row) for row in report["frozen"]]),
            "",
            "![frozen](frozen.png)",
            "",
        ]
    )


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, Mapping):
        mean, ci95 = value["mean"], value["ci95"]
        value = None if mean is None else f"{mean:.4f}" + ("" if ci95 is None else f" ± {ci95:.4f}")
    return "–" if value is None else value


def save(directory: Path, report: Mapping[str, Any]) -> Path:
    """Write reuse.md, reuse.json and the figures; returns the path of the first."""
    for name, figure in figures(report).items():
        plots.save(figure, directory / f"{name}.png")
    write(directory / "reuse.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write(directory / "reuse.md", markdown(report))
    return directory / "reuse.md"


def sizes(arguments: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """tasks= and queries=, and the other arguments.

    Raises:
      ValueError: for what is no whole number, 1 or more.
    """
    found, others = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in ("tasks", "queries"):
            others.append(argument)
        elif not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{argument}: give a whole number, 1 or more")
        else:
            found[name] = int(value)
    return found, others


def written(directory: Path, arguments: Sequence[str]) -> str:
    numbers, overrides = sizes(arguments)
    given = next((f"-{o.partition('=')[2]}" for o in overrides if o.startswith("checkpoints=")), "")
    path = save(directory / f"reuse{given}", reuse(directory, **numbers, overrides=overrides))
    return f"{path.read_text()}\n{path}"


def main() -> None:
    on_run(__doc__, written)


if __name__ == "__main__":
    main()
