"""A run directory: what identifies a run, where it was left, and the summary of what came out."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from omegaconf import MISSING, DictConfig, OmegaConf

from experiments import build, schema
from experiments.program import write
from maml.checkpoint import Checkpoints, digest
from maml.evaluate import Protocol
from maml.metrics import Interval
from maml.train import Progress
from maml.types import Params

log = logging.getLogger(__name__)

WALL_TIME = "wall_time.json"
"""Of a run directory: the seconds until its newest checkpoint."""

_MAY_CHANGE = (
    *("resume", "logger", "evaluation", "paper", "debug_nans", "task.data_dir", "task.cache_dir"),
    *("trainer.steps", "trainer.log_every", "trainer.checkpoint_every", "trainer.keep_checkpoints"),
    *("trainer.validate_every", "trainer.validation_tasks", "diagnostics", "gradcheck"),
    *("algorithm.needs", "algorithm.adapt.strict"),
)
"""Keys that change no bit of the meta-parameters and the optimizer's state at a given step."""


def plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """The config as plain data; unresolved it keeps its interpolations, so that values can still be changed."""
    return OmegaConf.to_container(cfg, resolve=resolve)  # pyright: ignore[reportReturnType]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(tree, Mapping) or not tree:
        return {path: tree}
    items = [flat(v, f"{path}.{k}" if path else str(k)) for k, v in tree.items()]
    return {k: v for item in items for k, v in item.items()}


def finished(directory: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """The summary in a directory, if it is that of this very config."""
    try:
        summary = json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    same = summary.get("config") == _without_resume(plain(cfg))
    return summary if same and summary.get("protocol", {}).get("task") == build.build_protocol(cfg).task else None


def saved(cfg: DictConfig) -> dict[str, Any]:
    """What checkpoints are saved with: the config, and which data were read (`build.data_read`)."""
    return plain(cfg, resolve=False) | {_DATA: build.data_read(cfg)}


_DATA = "data_read"


def _without_resume(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "resume"}


def saved_config(checkpoints: Checkpoints) -> Mapping[str, Any]:
    """The config that checkpoints were saved with, `completed`.

    Raises:
      ValueError: where there are none.
    """
    config = checkpoints.config()
    if config is None:
        directory = checkpoints.directory
        raise ValueError(f"{directory.parent}: no checkpoint in {directory}; give the directory of a run")
    return completed(config)


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved config with the keys of `trainer` that an older run had not, at what it did: the schema's defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(schema.Trainer) if f.default is not MISSING}
    return {k: v for k, v in config.items() if k != _DATA} | {"trainer": {**defaults, **config["trainer"]}}


def resume(cfg: DictConfig, directory: Path, checkpoints: Checkpoints, progress: Progress) -> Progress:
    """The progress that was saved in the run's own directory, else in `cfg.resume`, else the one that is given.

    Raises:
      ValueError: when `resume` names a directory without checkpoint, when the checkpoint is of another config or beyond
        `trainer.steps`, when no checkpoint can be read.
    """
    if not checkpoints.steps() and cfg.resume is None:
        return progress
    source = None
    if not checkpoints.steps():
        source = Path(cfg.resume).expanduser()
        if not Checkpoints(source / "checkpoints").steps():
            raise ValueError(
                f"resume={cfg.resume}: no checkpoint in {source / 'checkpoints'}; give a run directory that has some"
            )
        checkpoints = Checkpoints(source / "checkpoints")
    _same_config(cfg, checkpoints)
    step, progress = checkpoints.restore(progress) or (0, progress)
    if step > cfg.trainer.steps:
        raise ValueError(
            f"trainer.steps={cfg.trainer.steps}: the run in {checkpoints.directory.parent} has done {step}; give more"
        )
    if source is not None:
        for name in ("metrics.jsonl", WALL_TIME):
            (directory / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copy(source / name, directory / name)
    log.info("continuing %s after meta-step %s", checkpoints.directory.parent, step)
    return progress


def spent(directory: Path) -> float:
    """Seconds until the newest checkpoint of a run, over all its sessions; 0 where a run did not note it."""
    try:
        seconds = float(json.loads((directory / WALL_TIME).read_text())["wall_time_s"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def spend(directory: Path, seconds: float) -> None:
    """Note the seconds that a run took until this checkpoint."""
    save(directory / WALL_TIME, {"wall_time_s": round(seconds, 3)})


def after_divergence(cfg: DictConfig, checkpoints: Checkpoints) -> str:
    """What is left, and what to do."""
    saved = checkpoints.steps()
    left = (
        f"the last good checkpoint is {checkpoints.directory / str(saved[-1])}" if saved else "no checkpoint was saved"
    )
    names = ["algorithm.step_size"] * build.reads(cfg, "step_size") + ["optimizer.learning_rate"]
    values = {name: OmegaConf.select(cfg, name) for name in names}
    lower = " or ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    return f"{left}; start again with a lower {lower}"


def _same_config(cfg: DictConfig, checkpoints: Checkpoints) -> None:
    config = checkpoints.config() or cfg
    before, now = (flat(plain(OmegaConf.create(dict(c)))) for c in (completed(config), cfg))
    keys = [k for k in {**before, **now} if not k.startswith(_MAY_CHANGE) and before.get(k) != now.get(k)]
    changes = [f"{k} was {before.get(k)}, is {now.get(k)}" for k in keys]
    if config.get(_DATA, data := build.data_read(cfg)) != data:
        changes.append(f"other images or classes were read, from task.data_dir={before.get('task.data_dir')}")
    if changes:
        changes = "; ".join(changes)
        raise ValueError(
            f"the checkpoints in {checkpoints.directory} are of another config: {changes}. "
            "Give the old values or another directory (with -m hydra.sweep.subdir)"
        )


def summarize(
    cfg: DictConfig,
    protocol: Protocol,
    metrics: Mapping[str, Interval],
    params: Params,
    wall_time_s: float,
) -> dict[str, Any]:
    """Everything that must travel with the numbers."""
    return {
        "metrics": {f"{protocol.split}/{k}": as_json(v) for k, v in metrics.items()},
        "protocol": protocol.as_dict(),
        "protocol_hash": protocol.hash,
        "params_sha256": digest(params),
        "seed": cfg.seed,
        "versions": versions(),
        "device": device(),
        "wall_time_s": round(wall_time_s, 3),
        "config": _without_resume(plain(cfg)),
    }


def save(path: Path, summary: Mapping[str, Any]) -> None:
    write(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")


def as_json(value: Interval) -> dict[str, Any]:
    """A mean that is no number is null: JSON has no NaN."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in value._asdict().items()}


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "hydra-core", "tensorflow-datasets", "numpy")
    return {"python": platform.python_version(), "maml": _version("maml-jax")} | {n: _version(n) for n in names}


def _version(name: str) -> str:
    """A package may be importable from a folder alone (a clone on the path): a trained run does not fail for that."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> str:
    """Kind and number of devices; on CPU the number of threads, on which the low bits of sums depend."""
    devices = jax.devices()
    threads = (
        f", {len(os.sched_getaffinity(0))} threads"
        if devices[0].platform == "cpu" and hasattr(os, "sched_getaffinity")
        else ""
    )
    return f"{len(devices)} × {devices[0].device_kind}{threads}"


def table(summary: Mapping[str, Any]) -> str:
    """The numbers of a summary as lines of text."""
    rows = [f"{name:32} {_number(v['mean'])} ± {_number(v['ci95'])}" for name, v in summary["metrics"].items()]
    protocol = ", ".join(f"{k} {v}" for k, v in summary["protocol"].items() if v is not None)
    return "\n".join([f"protocol {summary['protocol_hash']}: {protocol}", *rows])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
