"""What a meta-step would cost, and how it would be computed in a budget of memory: nothing is trained.

    python -m experiments.plan [trainer.memory_gb=GB] [experiment=NAME] [key=value ...]

The same as `python -m experiments.run plan=true ...`. Compiles the meta-step of the config for each candidate: derivative x
rematerialisation x chunk of tasks. What the config sets (`trainer.task_chunk`, `algorithm.remat`) stays as it is.
"""

import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from experiments import build
from experiments.program import run_program
from maml import plan, train
from maml.plan import Cost
from maml.sharding import tasks_each
from maml.types import as_argument

log = logging.getLogger(__name__)

_EXACT = ("maml.derivatives.reverse", "maml.derivatives.mixed")
"""Second order, and the same up to rounding."""


class Candidate(NamedTuple):
    """A way to compute the meta-step: the `_target_` of the derivative, the inner steps of a block, tasks mapped together.

    The first two are None where the algorithm has no such choice.
    """

    derivative: str | None
    remat: int | None
    chunk: int

    def __str__(self):
        name = self.derivative.rpartition(".")[-1] if self.derivative else "–"
        return f"derivative {name}, remat {_or_null(self.remat)}, task_chunk {self.chunk}"

    def applied(self, cfg: DictConfig) -> DictConfig:
        """The config of a run that is computed so."""
        cfg = cfg.copy()
        OmegaConf.set_readonly(cfg, False)
        cfg.trainer.task_chunk = self.chunk
        if self.derivative:
            cfg.algorithm.derivative._target_ = self.derivative
        if self.remat:
            cfg.algorithm.remat = self.remat
        return cfg


def candidates(cfg: DictConfig, auto: int) -> list[Candidate]:
    """Every candidate, those of the config first; `auto` is the number of tasks that `task_chunk=auto` maps together."""
    target = OmegaConf.select(cfg, "algorithm.derivative._target_")
    steps = cfg.algorithm.get("steps", 0)
    targets, remats = [target], [cfg.algorithm.get("remat")]
    if steps and target in _EXACT:
        targets += [other for other in _EXACT if other != target]
    if steps and remats == [None] and "remat" in cfg.algorithm and target != "maml.derivatives.first_order":
        remats += [1, *([round(math.sqrt(steps))] if steps >= 8 else [])]
    return [Candidate(*parts) for parts in itertools.product(targets, remats, _chunks(cfg, auto))]


def _chunks(cfg: DictConfig, auto: int) -> list[int]:
    """What `auto` is, all tasks, one, and a divisor of their number near to its root; only the config's own if it has one."""
    chunk, tasks = cfg.trainer.task_chunk, _tasks(cfg)
    if chunk != "auto":
        return [tasks if chunk == "all" else chunk]
    between = min((n for n in range(1, tasks + 1) if tasks % n == 0), key=lambda n: abs(n * n - tasks))
    return list(dict.fromkeys([auto, tasks, between, 1]))


def _tasks(cfg: DictConfig) -> int:
    return tasks_each(cfg.trainer.meta_batch, cfg.trainer.devices)


def auto_chunk(cfg: DictConfig, learner: build.Learner) -> int:
    return train.chunk_size("auto", _tasks(cfg), learner.state.params)


def trace(learner: build.Learner) -> jax.stages.Traced:
    """The compiled loop of training, which runs a meta-step after another in the same memory."""
    progress = train.begin(learner.state, learner.step, learner.sampler)
    with warnings.catch_warnings():  # that mixed mode falls back is said when it is taken
        warnings.filterwarnings("ignore", "derivative=mixed")
        return train.compile_loop(learner.step).trace(progress, as_argument(learner.sampler), jnp.int32(1))


def by_preference(cfg: DictConfig, learner: build.Learner) -> Iterator[tuple[Candidate, jax.stages.Traced]]:
    """The candidates, traced and not compiled, those expected to be fast first."""
    auto = auto_chunk(cfg, learner)
    found = sorted(candidates(cfg, auto), key=lambda c: plan.preference(c.chunk, 0, auto))
    for _, equal in itertools.groupby(found, lambda c: c.chunk):
        traced = [(c, trace(build.learner(c.applied(cfg)))) for c in equal]
        yield from sorted(traced, key=lambda pair: _preference(*pair, auto))


def _preference(candidate: Candidate, traced: jax.stages.Traced, auto: int) -> tuple[int, int]:
    return plan.preference(candidate.chunk, plan.count(traced.jaxpr), auto)


def fitting(cfg: DictConfig, learner: build.Learner) -> build.Learner:
    """The learner of the config, computed in the fastest way that fits `trainer.memory_gb`.

    Compiles candidates in the order of preference, up to the first that fits.

    Raises:
      ValueError: when none fits, with the smallest budget in which one does.
    """
    costs: dict[Candidate, Cost] = {}
    budget, auto = cfg.trainer.memory_gb, auto_chunk(cfg, learner)
    for _, equal in itertools.groupby(by_preference(cfg, learner), lambda pair: _preference(*pair, auto)):
        costs |= {candidate: plan.cost(traced, candidate.chunk) for candidate, traced in equal}
        if any(cost.fits(budget) for cost in costs.values()):
            break
    choice = plan.choose(costs, budget, auto=auto)
    log.info("trainer.memory_gb=%g: %s; %.4g GB at the peak of a meta-step", budget, choice, costs[choice].peak / 1e9)
    return build.learner(choice.applied(cfg))


def show(cfg: DictConfig) -> None:
    """Compile every candidate and print the table, fastest first, with a mark on what a run would take.

    Raises:
      ValueError: after the table, when none fits.
    """
    learner = build.learner(cfg)
    budget, auto = cfg.trainer.memory_gb, auto_chunk(cfg, learner)
    total = len(candidates(cfg, auto))
    costs, seconds = {}, {}
    for candidate, traced in tqdm(by_preference(cfg, learner), "compiling", total, disable=None, leave=False):
        start = time.monotonic()
        costs[candidate] = plan.cost(traced, candidate.chunk)
        seconds[candidate] = time.monotonic() - start
    fits = any(cost.fits(budget) for cost in costs.values())
    print(table(costs, seconds, plan.choose(costs, budget, auto=auto) if fits else None), flush=True)
    if not fits:
        plan.choose(costs, budget, auto=auto)  # raises


def table(costs: Mapping[Candidate, Cost], seconds: Mapping[Candidate, float], choice: Candidate | None) -> str:
    """Markdown, one row for each candidate; MB are 10⁶ bytes, the seconds those that it took to find out."""
    head = ("derivative", "remat", "chunk", "GFLOP", "arguments MB", "temporaries MB", "peak MB", "compile s", "choice")
    rows = [head] + [
        (
            *(c.derivative.rpartition(".")[-1] if c.derivative else "–", _or_null(c.remat), str(c.chunk)),
            *(f"{x:.4g}" for x in (cost.flops / 1e9, cost.arguments / 1e6, cost.temporaries / 1e6)),
            *(f"{cost.peak / 1e6:.4g}", f"{seconds[c]:.1f}", "<-" if c == choice else ""),
        )
        for c, cost in costs.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(x.rjust(n) for x, n in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (n + 1) + ":" for n in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _or_null(value: Any) -> str:
    return "null" if value is None else str(value)


def main() -> None:
    run_program(show)


if __name__ == "__main__":
    main()
