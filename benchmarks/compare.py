"""The library's outer step beside its peers' and plain JAX, in one run: a Markdown table, and everything in JSON beside it.

    python -m benchmarks.compare --peer-python PYTHON_WITH_TORCH

What is timed is one outer step with Adam, from the same weights on the same tasks, with as many threads for every side (a peer
may do with one where that is faster). Before that the first meta-gradient of every side is computed in float64 on the first
tasks, and a side whose gradient is another is not timed. (In float32 a ReLU that flips in the inner loop moves the gradient
by far more than its rounding: the differences in float32 on the whole meta-batch are in the JSON.) Rounds are interleaved: in
each, every side is timed once. Numbers are medians.
`--check` compares gradients alone.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks import machine
from benchmarks.cases import CASES, Case
from benchmarks.jax_sides import Library, Naive, difference, temporaries, variants
from benchmarks.peers import PEERS, PeerError, PeerSide, Worker
from benchmarks.table import table
from maml.types import Task

TOLERANCE = 1e-9
"""Relative 2-norm in which meta-gradients agree in float64."""

BUDGET = 60.0
"""Seconds that the rounds of one side may take. A slow side is timed in fewer of them; one too slow for any is timed once."""


class Side(Protocol):
    def gradient(self) -> dict[str, np.ndarray]: ...

    def run(self, steps: int) -> float: ...


def sides(case: Case, tasks: Task, steps: int, order: str, worker: Worker | None, peers: Sequence[str]):
    """Pairs (name, function that builds the side); ours come first, the one that gradients are compared with foremost."""
    for name, derivative in variants(order).items():
        yield name, lambda d=derivative: Library(case, tasks, steps, d)
    yield "plain JAX", lambda: Naive(case, tasks, steps, order)
    for peer in peers:
        yield peer, lambda p=peer: PeerSide(worker, p, case, tasks, steps, order)


def check(
    case: Case, steps: int, order: str, worker: Worker | None, peers: Sequence[str], count: int
) -> dict[str, Any]:
    """The difference of every side's first meta-gradient from ours, in float64 on `count` tasks; or what went wrong."""
    found, reference = {}, None
    with jax.enable_x64(True):
        tasks = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, first(case, count))
        for name, build in sides(case, tasks, steps, order, worker, peers):
            try:
                gradient = build().gradient()
            except PeerError as e:
                found[name] = str(e)
                continue
            reference = gradient if reference is None else reference
            found[name] = difference(reference, gradient)
    return found


def first(case: Case, count: int) -> Task:
    return jax.tree.map(lambda x: x[:count], case.data())


def measure(
    case: Case, steps: int, order: str, worker: Worker | None, peers: Sequence[str], repeats: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time every side: medians and samples in milliseconds per outer step; for ours compilation and temporaries too."""
    built: dict[str, Side] = {name: f() for name, f in sides(case, case.data(), steps, order, worker, peers)}
    rows = {name: prepare(side, repeats, seconds) for name, side in built.items()}
    for i in range(repeats):
        for name, row in rows.items():
            if i < row["rounds"]:
                row["samples_ms"].append(built[name].run(row["steps_per_sample"]) * 1e3)
    reference = next(iter(built.values())).gradient()
    for name, row in rows.items():
        row["median_ms"] = statistics.median(row["samples_ms"])
        if row["rounds"]:
            row["float32 difference"] = difference(reference, built[name].gradient())
    return rows


def prepare(side: Side, repeats: int, seconds: float) -> dict[str, Any]:
    """Warm a side up, and choose the outer steps of a sample and the number of rounds."""
    row = {"samples_ms": []}
    if isinstance(side, Library | Naive):
        row |= {"compile_s": side.compile_s, "temporary_bytes": temporaries(side)}
    if isinstance(side, PeerSide):
        side.choose()
        row["threads"] = side.threads
    row["steps_per_sample"], each = length(side, seconds)
    row["rounds"] = min(repeats, int(BUDGET / (row["steps_per_sample"] * each)))
    if not row["rounds"]:
        row["samples_ms"].append(each * 1e3)
    return row


def length(side: Side, seconds: float) -> tuple[int, float]:
    """How many outer steps take about `seconds`, and the seconds of one."""
    steps, each = 1, side.run(1)
    while steps * each < seconds / 2:
        steps = max(2 * steps, round(seconds / each))
        each = side.run(steps)
    return max(1, round(seconds / each)), each


def compare(case: Case, steps: int, order: str, worker: Worker | None, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the check, and the timings of the sides that passed it."""
    peers = options.peers if worker else []
    differences = check(case, steps, order, worker, peers, options.check_tasks)
    wrong = {k: d for k, d in differences.items() if isinstance(d, float) and not d < TOLERANCE}
    if any(k not in PEERS for k in wrong):
        raise ArithmeticError(f"case {case.name}, {steps} steps, {order} order: our own meta-gradients differ: {wrong}")
    row = {
        "case": case.name, "title": case.title, "order": order, "steps": steps, "tasks": case.tasks,
        "flops": case.flops(steps, order), "float64 differences": differences,
        "not timed": {k: d if isinstance(d, str) else f"another gradient: {d:.1e}" for k, d in differences.items()
                      if isinstance(d, str) or k in wrong},
    }  # fmt: skip
    if not options.check:
        peers = [p for p in peers if p not in row["not timed"]]
        row["sides"] = measure(case, steps, order, worker, peers, options.repeats, options.seconds)
    if worker:
        worker.ask("forget")
    return row


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=words, default=list(CASES))
    parser.add_argument("--steps", type=lambda text: [int(n) for n in words(text)], default=[1, 5], help="inner steps")
    parser.add_argument("--orders", type=words, default=["second", "first"])
    parser.add_argument("--peers", type=words, default=list(PEERS), help="an empty string for none")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one sample, where a step is shorter")
    parser.add_argument("--threads", type=int, default=2, help="of every side")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with torch and the peers")
    parser.add_argument("--check", action="store_true", help="compare meta-gradients and time nothing")
    parser.add_argument("--check-tasks", type=int, default=2, help="tasks on which gradients are compared")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compare.json")
    options = parser.parse_args(arguments)
    for name, known in (("cases", CASES), ("orders", ("second", "first")), ("peers", PEERS)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is not among {', '.join(known)}")
    return options


@contextlib.contextmanager
def started(options: argparse.Namespace):
    """The worker and the versions of the peers, or None where it does not start; it is ended afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        worker, versions = Worker(options.peer_python, Path(directory), options.threads) if options.peers else None, {}
        try:
            versions = worker.ask("versions") if worker else {}
        except PeerError as e:
            print(f"no peers: {e} (--peer-python names a Python that has torch)", file=sys.stderr)
            worker = None
        try:
            yield worker, versions
        finally:
            if worker:
                worker.close()


def main(arguments: Sequence[str] = sys.argv[1:]) -> None:
    options = parse(arguments)
    machine.pin(options.threads)
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    with started(options) as (worker, versions):
        report: dict[str, Any] = {
            "machine": machine.describe(options.threads), "peers": versions, "sgemm_gflops": machine.peaks(worker),
            "rows": [],
        }  # fmt: skip
        if report["machine"]["load"] > 0.5:
            print(
                f"other programs run (load {report['machine']['load']}): the times are not to be trusted",
                file=sys.stderr,
            )
        for name, steps, order in itertools.product(options.cases, options.steps, options.orders):
            row = compare(CASES[name], steps, order, worker, options)
            report["rows"].append(row)
            print(progress(row), file=sys.stderr, flush=True)
            if not options.check:
                save(options.out, report)
    print(table(report))


def progress(row: Mapping[str, Any]) -> str:
    """One line about a finished row."""
    values = {k: f"{s['median_ms']:.4g} ms" for k, s in row.get("sides", {}).items()} or row["float64 differences"]
    return f"{row['case']} {row['steps']} {row['order']}: " + ", ".join(f"{k} {v}" for k, v in values.items())


def save(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
