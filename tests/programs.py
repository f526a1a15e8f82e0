"""The programs, run in this process: a process of its own takes seconds to start."""

import contextlib
import copy
import functools
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint  # noqa: F401  its logging is set up before Hydra's
import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from jax.experimental.compilation_cache import compilation_cache
from omegaconf import DictConfig, OmegaConf

from experiments import build, run
from maml import train
from maml.checkpoint import Checkpoints, digest

ROOT = Path(__file__).parents[1]
SMALL = ("debug=short", "trainer.meta_batch=4", "model.hidden=[8,8]", "evaluation.steps=2", "paper=null")
"""A sinusoid run of a second or two."""


def config(*overrides: str) -> DictConfig:
    """The composed config, as the program gets it."""
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", list(overrides))


@contextlib.contextmanager
def compiling_once(directory: Path):
    """Programs of this process that are compiled again come from a cache: nine tenths of the time of a small run."""
    compilation_cache.reset_cache()  # JAX looks whether there is one at the first program that it compiles
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


class Ended(NamedTuple):
    """How a program ended: exit code, and what it wrote."""

    code: int
    out: str
    err: str


def main(*arguments: str, program=run) -> Ended:
    """`python -m experiments.PROGRAM ARGUMENTS` in this process, with everything global put back."""
    GlobalHydra.instance().clear()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _own_logging(),
    ):
        patch.setattr(sys, "argv", [program.__name__, *arguments])
        patch.setattr("experiments.program.keep_compiled", lambda: None)
        try:
            program.main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            jax.config.update("jax_debug_nans", False)
        return Ended(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _own_logging():
    """Hydra closes every handler that there is, pytest's and absl's too, and leaves its own open."""
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "_handlerList", [])
        try:
            yield
        finally:
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)


def start(*arguments: str, program: str = "experiments.run", cwd=None, **keywords) -> subprocess.Popen:
    """A program in a process of its own."""
    command = [sys.executable, "-m", program, *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, **keywords)


def finish(process: subprocess.Popen, timeout: float = 120) -> Ended:
    """Waits for it; kills it if that takes too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def restored(cfg: DictConfig, directory: Path) -> train.Progress:
    """The newest checkpoint of a run: all that a resumed run knows."""
    text = OmegaConf.to_yaml(cfg)
    if text not in _templates:
        learner = build.learner(cfg)
        _templates[text] = train.begin(learner.state, learner.step, learner.sampler)
    found = Checkpoints(directory / "checkpoints").restore(_templates[text])
    assert found is not None
    return found[1]


_templates: dict[str, train.Progress] = {}
"""Shapes and types of what is saved under a config: what `restored` would trace again for every checkpoint."""


def bits(cfg: DictConfig, directory: Path) -> tuple[str, str, bytes]:
    """What must be equal for two runs to be the same: parameters, everything that is saved, metrics."""
    return summary(directory)["params_sha256"], digest(restored(cfg, directory)), metrics_bytes(directory)


def summary(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())


def metrics_bytes(directory: Path) -> bytes:
    return (directory / "metrics.jsonl").read_bytes()


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in metrics_bytes(directory).splitlines()]


def steps(directory: Path) -> list[int]:
    return Checkpoints(directory / "checkpoints").steps()


class SignalAt:
    """A logger that sends this process a signal when the loop reaches a step."""

    def __init__(self, directory, steps, resume_step=0, *, step: int, signal: int):
        del directory, steps, resume_step
        self.step, self.signal = step, signal

    def __call__(self, step, metrics):
        """Nothing to write."""

    def progress(self, step):
        if self.step is not None and step >= self.step:
            self.step = None
            os.kill(os.getpid(), self.signal)

    def close(self):
        """Nothing to close."""


def signal_at(step: int, signal: int) -> str:
    """The override that adds it to a run."""
    name = "{_target_: tests.programs.SignalAt, _partial_: true"
    return f"+logger.signal={name}, step: {step}, signal: {int(signal)}}}"
