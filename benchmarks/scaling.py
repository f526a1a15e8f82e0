"""How time and memory of the library's outer step grow with the meta-batch, the inner steps and the width: a Markdown table.

    python -m benchmarks.scaling [--cases C,B]

Second order, medians of interleaved rounds. "linear" is the growth of the time, divided by that of what it should follow: the
tasks; the inner steps (increments, so that the query set drops out); the operations of the algorithm, for the width. Temporaries
are those of the compiled program; with `mixed` and `remat=1` they grow by the parameters of each step.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence

import jax

from benchmarks import machine
from benchmarks.cases import CASES, Case
from benchmarks.jax_sides import Library, temporaries
from maml import derivatives


def grown(case: Case) -> dict[str, list[tuple[int, Case, int]]]:
    """(what it is, the case, inner steps) for each axis of growth."""
    width = {n: tuple(n * w for w in case.widths) for n in (1, 2, 4)}
    return {
        "tasks": [(n, dataclasses.replace(case, tasks=n), 1) for n in (8, 32, 128)],
        "steps": [(n, dataclasses.replace(case, tasks=4), n) for n in (1, 5, 20, 50)],
        "width": [(n, dataclasses.replace(case, tasks=4, widths=width[n]), 1) for n in width],
    }


def measure(case: Case, remat: int | None, derivative: derivatives.Derivative, repeats: int) -> list[tuple]:
    """Rows (axis, size, milliseconds, linear, bytes of temporaries, bytes of parameters)."""
    rows = []
    for axis, points in grown(case).items():
        sides = [Library(c, c.data(), steps, derivative, remat) for _, c, steps in points]
        times = [statistics.median(t) for t in zip(*([s.run(2) for s in sides] for _ in range(repeats)), strict=True)]
        for i, (size, _, _) in enumerate(points):
            parameters = sum(x.nbytes for x in jax.tree.leaves(sides[i].progress.state.params))
            linear = growth(axis, times, [(n, k.flops(s, "second")) for n, k, s in points], i)
            rows.append((axis, size, times[i] * 1e3, linear, temporaries(sides[i]), parameters))
    return rows


def growth(axis: str, times: Sequence[float], points: Sequence[tuple[int, int]], i: int) -> float | None:
    """The time's growth since the first point over that of tasks or operations; of increments, for steps."""
    if i == 0 or (axis == "steps" and i == 1):
        return None
    if axis == "steps":
        rate = [(times[j] - times[j - 1]) / (points[j][0] - points[j - 1][0]) for j in (1, i)]
        return rate[1] / rate[0]
    which = 0 if axis == "tasks" else 1
    return (times[i] / times[0]) / (points[i][which] / points[0][which])


def main(arguments: Sequence[str] = sys.argv[1:]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=["C", "B"])
    parser.add_argument("--derivative", choices=["reverse", "mixed"], default="mixed")
    parser.add_argument("--remat", type=int, default=1, help="inner steps of a block; 0: everything is kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    machine.pin(options.threads)
    print(f"{options.derivative}, remat={options.remat or None}: {machine.describe(options.threads)}\n")
    print("| case | axis | size | ms | linear | temporaries, MB | parameters, MB |\n|---|---|---|---|---|---|---|")
    for name in options.cases:
        derivative = getattr(derivatives, options.derivative)
        for axis, size, ms, linear, used, parameters in measure(
            CASES[name], options.remat or None, derivative, options.repeats
        ):
            ratio = "" if linear is None else f"{linear:.2f}"
            print(
                f"| {name} | {axis} | {size} | {ms:.4g} | {ratio} | {used / 1e6:.1f} | {parameters / 1e6:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
