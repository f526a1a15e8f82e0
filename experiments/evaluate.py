"""Evaluate a run again, under another protocol.

    python -m experiments.evaluate RUN_DIRECTORY [evaluation=NAME] [evaluation.KEY=VALUE ...] [checkpoints=WHICH]
                                   [task.data_dir=DIR]

The newest checkpoint of the run is evaluated under the run's own config with these changes (a protocol by name leaves the run's
ways, shots, steps and step size, and rotations, least ways and minibatches that its file does not give: evaluation.steps=
changes them).
Prints the numbers and writes them to RUN_DIRECTORY/evaluations/<protocol hash>.json (of another checkpoint than the newest
<protocol hash>-<meta-step>.json, or -best1.json).

checkpoints=20000 takes the one of that meta-step; checkpoints=20000,25000 (or best5: of those kept the five that were best on
validation tasks, as MAML++ does; trainer.validate_every=trainer.checkpoint_every) the mean of their outputs, and says so in the
protocol.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf

from experiments import build, results, schema
from experiments.collect import records
from experiments.program import CONF, on_run
from maml import train
from maml.checkpoint import Checkpoints
from maml.types import Params

log = logging.getLogger(__name__)

ALLOWED = ("evaluation.", "task.data_dir")


def changed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with the overrides applied: a protocol by name, single values of it, another place of the data.

    Raises:
      ValueError: for an unknown protocol or key, and for keys that would change what was trained.
    """
    typed = OmegaConf.structured(schema.Evaluation)
    cfg.evaluation = OmegaConf.merge(typed, cfg.evaluation)  # with the keys that an older run had not
    # The group first, as in Hydra.
    for override in sorted(overrides, key=lambda text: not text.startswith("evaluation=")):
        key, separator, value = override.partition("=")
        if key == "checkpoints":
            continue
        if key == "evaluation":
            path = CONF / "evaluation" / f"{value}.yaml"
            if not path.exists():
                names = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
                raise ValueError(f"evaluation={value}: no such protocol; there are {names}")
            protocol = OmegaConf.load(path)
            own = {"rotations", "least_ways", "batch"} - set(protocol) | {"steps", "step_size"}  # of task and algorithm
            own |= {name for name in ("ways", "shots") if OmegaConf.is_interpolation(protocol, name)}
            kept = {name: OmegaConf.select(cfg, f"evaluation.{name}") for name in own}
            cfg.evaluation = OmegaConf.merge(typed, protocol, kept)
        elif not separator or not key.startswith(ALLOWED) or OmegaConf.select(cfg, key, default=cfg) is cfg:
            raise ValueError(
                f"{override}: give evaluation=NAME, evaluation.KEY=VALUE with {list(cfg.evaluation)}, checkpoints=STEPS, or "
                "task.data_dir=DIR"
            )
        elif key == "evaluation.step_size" and value != "null" and not build.reads(cfg, "step_size"):
            raise ValueError(f"{override}: {build.no_step_size(cfg)}")
        elif key == "evaluation.steps" and value != "0" and not build.reads(cfg, "steps"):
            raise ValueError(f"{override}: {build.no_steps(cfg)}")
        else:
            OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value)  # which reads 1e-3 as a number
    return cfg


def load(directory: Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, build.Learner, dict[int, Params]]:
    """Config with the overrides, learner, and the meta-parameters of the checkpoints that are asked for, by meta-step.

    Raises:
      ValueError: for a directory without checkpoint, checkpoints that are not there, overrides that are refused.
    """
    checkpoints = Checkpoints(directory / "checkpoints")
    cfg = changed(OmegaConf.create(dict(results.saved_config(checkpoints))), overrides)
    learner = build.learner(cfg)
    template = train.begin(learner.state, learner.step, learner.sampler)
    asked = [o.partition("=")[2] for o in overrides if o.startswith("checkpoints=")]
    if not asked:
        step, progress = checkpoints.restore(template) or (0, template)
        return cfg, learner, {step: progress.state.params}
    steps = _steps(asked[-1], directory, checkpoints)
    kept = checkpoints.restore_all(template, steps)
    if missing := sorted(set(steps) - set(kept)):
        raise ValueError(f"checkpoints={asked[-1]}: {missing} cannot be read; there are {checkpoints.steps()}")
    return cfg, learner, {step: kept[step].state.params for step in steps}


def _steps(which: str, directory: Path, checkpoints: Checkpoints) -> list[int]:
    """The meta-steps of `20000`, `20000,25000` or `best5`."""
    if which.removeprefix("best").isdigit() and which.startswith("best"):
        return _best(int(which.removeprefix("best")), directory, checkpoints)
    if not all(part.isdigit() for part in which.split(",")):
        raise ValueError(
            f"checkpoints={which}: give meta-steps with commas between, or best5; there are {checkpoints.steps()}"
        )
    return sorted({int(part) for part in which.split(",")})


def _best(count: int, directory: Path, checkpoints: Checkpoints) -> list[int]:
    """Of the checkpoints that were validated as the newest one would be, those of the highest accuracy, or lowest loss, after
    the last step all have."""
    under = {step: _validation(config) for step, config in checkpoints.configs().items()}
    kept = {step for step in under if under[step] == under[max(under)]}
    rows = [row for row in records(directory) if row["step"] in kept]
    validated = [row for row in rows if any(n.startswith("meta_valid/step_") for n in row)]
    # In all rows: evaluation.after may have changed on the way.
    shared = [
        n for n in (validated or [{}])[0] if n.startswith("meta_valid/step_") and all(n in row for row in validated)
    ]
    names = sorted(shared, key=_number)
    name = next((n for kind in ("accuracy", "loss") for n in reversed(names) if n.endswith(f"/{kind}")), "none")
    scores = {row["step"]: row[name] for row in validated if row.get(name) is not None}
    if len(scores) < count or not count:
        raise ValueError(
            f"checkpoints=best{count}: {len(scores)} checkpoints in {directory} were kept and validated, under the newest one's "
            "evaluation and after the same inner step; run with trainer.validate_every and trainer.checkpoint_every "
            "equal, and more trainer.keep_checkpoints"
        )
    if others := sorted(set(under) - kept):
        log.warning(
            "checkpoints=best%d: those of meta-steps %s were validated otherwise and are left out", count, others
        )
    best = sorted(scores, key=scores.__getitem__, reverse=name.endswith("accuracy"))
    return sorted(best[:count])


def _validation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a validation depends on, but for the inner steps: of those the ones that all have are compared."""
    cfg = results.plain(OmegaConf.create(dict(results.completed(config))))
    of_test = ("split", "tasks", "steps", "after")
    protocol = {k: v for k, v in cfg["evaluation"].items() if v is not None and k not in of_test}
    return protocol | {"tasks": cfg["trainer"]["validation_tasks"]}


def _number(name: str) -> int:
    return int(name.split("/")[1].removeprefix("step_"))


def evaluate_run(directory: Path, overrides: Sequence[str] = ()) -> dict:
    """The numbers of a checkpoint of a run, or of several together, as in `summary.json`.

    Raises:
      ValueError: as `load`.
    """
    start = time.monotonic()
    cfg, learner, found = load(directory, overrides)
    params = next(iter(found.values()))
    ensemble = None
    if len(found) > 1:
        ensemble = f"mean outputs of meta-steps {', '.join(map(str, found))}"
        params = jax.tree.map(lambda *x: jnp.stack(x), *found.values())
    protocol, measure = build.evaluation(cfg, learner, ensemble=ensemble)
    metrics = measure(params)
    summary = results.summarize(cfg, protocol, metrics, params, time.monotonic() - start)
    given = [override for override in overrides if not override.startswith(("task.data_dir", "evaluation.after"))]
    return summary | {"step": max(found), "overrides": given}


def written(directory: Path, overrides: Sequence[str]) -> str:
    summary = evaluate_run(directory, overrides)
    (directory / "evaluations").mkdir(exist_ok=True)
    newest = summary["step"] == max(Checkpoints(directory / "checkpoints").steps())
    best = [text.partition("=")[2] for text in summary["overrides"] if text.startswith("checkpoints=best")]
    name = summary["protocol_hash"]
    if "ensemble" not in summary["protocol"]:
        name += f"-{best[-1]}" if best else "" if newest else f"-{summary['step']}"
    path = directory / "evaluations" / f"{name}.json"
    results.save(path, summary | {"metrics": _with_those_of(path, summary)})
    return results.table(summary)


def _with_those_of(path: Path, summary: dict) -> dict:
    """The metrics, with those that an evaluation of the same here has found after other inner steps (evaluation.after)."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return summary["metrics"]
    same = all(before.get(name) == summary[name] for name in ("params_sha256", "versions", "device"))
    metrics = (before["metrics"] if same else {}) | summary["metrics"]
    return {name: metrics[name] for name in sorted(metrics, key=lambda name: (name.split("/", 2)[2], _number(name)))}


def main() -> None:
    on_run(__doc__, written)


if __name__ == "__main__":
    main()
