"""Meta-train, then evaluate on held-out tasks: python -m experiments.run [experiment=NAME] [key=value ...]."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments import build, diagnostics, pictures, plan, results
from experiments.program import INTERRUPTED, Interrupt, of_experiment, of_experiment_at_test, run_program
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
    protocol, measure = build.evaluation(cfg, learner)
    if cfg.trainer.memory_gb is not None:
        learner = plan.fitting(cfg, learner)
    checkpoints = Checkpoints(directory / "checkpoints", cfg.trainer.keep_checkpoints)
    progress = train.begin(learner.state, learner.step, learner.sampler)
    progress = results.resume(cfg, directory, checkpoints, progress)

    with closing(checkpoints), _opened(cfg, directory, int(progress.state.step)) as loggers:
        start -= results.spent(directory) if int(progress.state.step) else 0.0  # in earlier sessions
        progress, stopped = _train(cfg, learner, progress, checkpoints, loggers, start)
        step, params = int(progress.state.step), progress.state.params
        if stopped:
            log.warning("stopped by a signal at meta-step %d and saved; hydra.run.dir=%s continues", step, directory)
            sys.exit(INTERRUPTED)
        metrics = measure(params)
        summary = results.summarize(cfg, protocol, metrics, params, time.monotonic() - start) | _asked()
        results.save(directory / "summary.json", summary)
        log.info(results.table(summary))
        figures = pictures.draw(cfg, learner, params, protocol, metrics) | pictures.training_curves(directory)
        for name, figure in figures.items():
            plots.save(figure, directory / "plots" / f"{name}.png")
            diagnostics.tell(loggers, "image", name, figure, step)
        log.info("all of it is in %s; next, for example: python -m experiments.diagnose %s", directory, directory)
    return summary


def _train(
    cfg: DictConfig,
    learner: build.Learner,
    progress: train.Progress,
    checkpoints: Checkpoints,
    loggers: Sequence[Any],
    start: float,
) -> tuple[train.Progress, bool]:
    """Train to the last step, or until a signal comes (then true); log, validate and save along the way and at the end."""

    def write(kind: str, step: int, metrics: Mapping[str, float]) -> None:
        for logger in loggers:
            logger(step, {f"{kind}/{name}": value for name, value in metrics.items()})

    def save(progress: train.Progress) -> None:
        checkpoints.save(int(progress.state.step), progress, config)
        results.spend(checkpoints.directory.parent, time.monotonic() - start)

    def validate(progress: train.Progress) -> None:
        metrics = measure(progress.state.params)
        write("meta_valid", int(progress.state.step), {k: v.mean for k, v in metrics.items()})

    config = results.saved(cfg)
    every = [*diagnostics.callbacks(cfg, learner, loggers), (cfg.trainer.checkpoint_every, save)]  # saved last
    if cfg.trainer.validate_every:
        _, measure = build.evaluation(cfg, learner, split="meta_valid", tasks=cfg.trainer.validation_tasks)
        every.insert(0, (cfg.trainer.validate_every, validate))
    with Interrupt() as interrupted:
        try:
            progress = train.fit(
                progress,
                learner.step,
                learner.sampler,
                steps=cfg.trainer.steps,
                log_every=cfg.trainer.log_every,
                log=lambda step, metrics: write("meta_train", step, metrics),
                every=every,
                tick=lambda step: diagnostics.tell(loggers, "progress", step),
                stop=interrupted,
            )
        except train.NonFinite as error:
            raise train.NonFinite(f"{error}; {results.after_divergence(cfg, checkpoints)}") from error
        save(progress)
        return progress, interrupted()


def _asked() -> dict[str, Any]:
    """The groups and the overrides of the command line, which a later command in the same directory replaces there."""
    if not HydraConfig.initialized():
        return {}
    hydra = HydraConfig.get()
    return {"hydra": {"choices": dict(hydra.runtime.choices), "overrides": list(hydra.overrides.task)}}


@contextmanager
def _opened(cfg: DictConfig, directory: Path, first: int) -> Iterator[list[Any]]:
    """The loggers of the config, which go on from meta-step `first`."""
    with ExitStack() as stack:
        makers = instantiate(cfg.logger).values()
        yield [stack.enter_context(closing(make(directory, cfg.trainer.steps, first))) for make in makers]


def job(cfg: DictConfig) -> None:
    if cfg.plan:
        return plan.show(cfg)
    hydra = HydraConfig.get()
    if taken := of_experiment(cfg, hydra.runtime.choices, hydra.overrides.task):
        numbers = ", ".join(f"algorithm.{key}={value}" for key, value in taken.items())
        log.warning(
            "%s: from the experiment, for its own algorithm; conf/algorithm/%s.yaml has others",
            numbers,
            cfg.algorithm.name,
        )
    if fixed := of_experiment_at_test(cfg, hydra.runtime.choices, hydra.overrides.task):
        values = ", ".join(f"evaluation.{key}={value}" for key, value in fixed.items())
        log.warning("%s: from the experiment, for its own evaluation", values)
    run(cfg, Path(hydra.runtime.output_dir))
    return None


def main() -> None:
    run_program(job)


if __name__ == "__main__":
    main()
