"""Meta-train, then evaluate on held-out tasks: python -m experiments.run [experiment=NAME] [key=value ...]."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import jax
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments import build, pictures, results
from experiments.program import INTERRUPTED, Interrupt, run_program
from maml import plots, train
from maml.checkpoint import Checkpoints

log = logging.getLogger(__name__)


def run(cfg: DictConfig, directory: Path) -> dict[str, Any]:
    """One run in its directory, or the rest of the run that is there. Returns the content of `summary.json`."""
    start = time.monotonic()
    jax.config.update("jax_debug_nans", cfg.debug_nans)
    if done := results.finished(directory, cfg):
        log.info("%s holds the finished run of this config: nothing to do", directory)
        return done

    # The parts, as they were left.
    learner = build.learner(cfg)
    checkpoints = Checkpoints(directory / "checkpoints", cfg.trainer.keep_checkpoints)
    progress = train.begin(learner.state, learner.step, learner.sampler)
    progress = results.resume(cfg, directory, checkpoints, progress)
    first = int(progress.state.step)
    loggers = [
        make(directory, cfg.trainer.steps, first) for make in instantiate(cfg.logger).values()
    ]

    # What happens along the way.
    def write(step: int, metrics) -> None:
        for logger in loggers:
            logger(step, metrics)

    def save(progress: train.Progress) -> None:
        checkpoints.save(int(progress.state.step), progress, results.plain(cfg, resolve=False))

    def validate(progress: train.Progress) -> None:
        tasks = cfg.trainer.validation_tasks
        _, metrics = build.measure(
            cfg, learner, progress.state.params, split="meta_valid", tasks=tasks
        )
        write(int(progress.state.step), {f"meta_valid/{k}": v.mean for k, v in metrics.items()})

    # Train.
    with Interrupt() as interrupted:
        progress = train.fit(
            progress,
            learner.step,
            learner.sampler,
            steps=cfg.trainer.steps,
            log_every=cfg.trainer.log_every,
            log=lambda step, metrics: write(
                step, {f"meta_train/{k}": v for k, v in metrics.items()}
            ),
            every=[
                (n, f)
                for n, f in (
                    (cfg.trainer.validate_every, validate),
                    (cfg.trainer.checkpoint_every, save),
                )
                if n
            ],
            tick=lambda step: [
                logger.progress(step) for logger in loggers if hasattr(logger, "progress")
            ],
            stop=interrupted,
        )
        save(progress)
    checkpoints.close()
    if int(progress.state.step) < cfg.trainer.steps:
        log.warning(
            "stopped by a signal at meta-step %d and saved; hydra.run.dir=%s continues",
            progress.state.step,
            directory,
        )
        sys.exit(INTERRUPTED)

    # Evaluate.
    protocol, metrics = build.measure(cfg, learner, progress.state.params)
    figures = pictures.draw(cfg, learner, progress.state.params, protocol, metrics)
    for name, figure in (figures | pictures.training_curves(directory)).items():
        plots.save(figure, directory / "plots" / f"{name}.png")
        for logger in loggers:
            if hasattr(logger, "image"):
                logger.image(name, figure, cfg.trainer.steps)
    for logger in loggers:
        logger.close()
    summary = results.summarize(
        cfg, protocol, metrics, progress.state.params, time.monotonic() - start
    )
    results.save(directory / "summary.json", summary)
    log.info(results.table(summary))
    return summary


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def _main(cfg: DictConfig) -> None:
    run(cfg, Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    run_program(_main)


if __name__ == "__main__":
    main()
