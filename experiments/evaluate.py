"""Evaluate a run again, under another protocol.

    python -m experiments.evaluate RUN_DIRECTORY [evaluation=NAME] [evaluation.KEY=VALUE ...] [task.data_dir=DIR]

The newest checkpoint of the run is evaluated under the run's own config with these changes (a protocol by name leaves the run's
steps and step size: give evaluation.steps= to change them); prints the numbers and writes
them to RUN_DIRECTORY/evaluations/<protocol hash>.json.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from experiments import build, results
from experiments.program import on_run
from maml import train
from maml.checkpoint import Checkpoints
from maml.types import Params

CONF = Path(__file__).parents[1] / "conf"
ALLOWED = ("evaluation.", "task.data_dir")


def changed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with the overrides applied: a protocol by name, single values of it, another place of the data.

    Raises:
      ValueError: for an unknown protocol or key, and for keys that would change what was trained.
    """
    typed = OmegaConf.structured(build.Evaluation)
    cfg.evaluation = OmegaConf.merge(typed, cfg.evaluation)  # with the keys that an older run had not
    for override in overrides:
        key, separator, value = override.partition("=")
        if key == "evaluation":
            path = CONF / "evaluation" / f"{value}.yaml"
            if not path.exists():
                names = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
                raise ValueError(f"evaluation={value}: no such protocol; there are {names}")
            kept = {
                "steps": cfg.evaluation.steps,
                "step_size": cfg.evaluation.step_size,
            }  # of the algorithm, not of the protocol
            cfg.evaluation = OmegaConf.merge(typed, OmegaConf.load(path), kept)
        elif not separator or not key.startswith(ALLOWED) or OmegaConf.select(cfg, key, default=cfg) is cfg:
            raise ValueError(
                f"{override}: give evaluation=NAME, evaluation.KEY=VALUE with {list(cfg.evaluation)}, or task.data_dir=DIR"
            )
        else:
            OmegaConf.update(cfg, key, yaml.safe_load(value))
    return cfg


def load(directory: Path, overrides: Sequence[str] = ()) -> tuple[DictConfig, build.Learner, int, Params]:
    """Config with the overrides, learner, and the newest checkpoint of a run: its meta-step and its meta-parameters.

    Raises:
      ValueError: for a directory without checkpoint or overrides that are refused.
    """
    checkpoints = Checkpoints(directory / "checkpoints")
    cfg = changed(OmegaConf.create(dict(results.saved_config(checkpoints))), overrides)
    learner = build.learner(cfg)
    progress = train.begin(learner.state, learner.step, learner.sampler)
    step, progress = checkpoints.restore(progress) or (0, progress)
    return cfg, learner, step, progress.state.params


def evaluate_run(directory: Path, overrides: Sequence[str] = ()) -> dict:
    """The numbers of the newest checkpoint of a run, as in `summary.json`.

    Raises:
      ValueError: as `load`.
    """
    start = time.monotonic()
    cfg, learner, step, params = load(directory, overrides)
    protocol, measure = build.evaluation(cfg, learner)
    metrics = measure(params)
    summary = results.summarize(cfg, protocol, metrics, params, time.monotonic() - start)
    return summary | {"step": step}


def written(directory: Path, overrides: Sequence[str]) -> str:
    summary = evaluate_run(directory, overrides)
    (directory / "evaluations").mkdir(exist_ok=True)
    results.save(directory / "evaluations" / f"{summary['protocol_hash']}.json", summary)
    return results.table(summary)


def main() -> None:
    on_run(__doc__, written)


if __name__ == "__main__":
    main()
