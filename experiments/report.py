"""One table and the curves of any set of runs.

    python -m experiments.report outputs/2026-11-22/10-00-00 multirun/2026-11-22/sweep

Runs that differ in nothing but the seed make one row, beside the paper's figure where the
experiment names one; what `experiments.evaluate` left in a run's directory makes rows of its own.
Writes report.md, report.csv and the curves as PNG; prints the table.
With --ledger FILE also a table of one line for each number, of experiments of any kind, such as RESULTS.md:
lines that are there already stay, but for those of the same numbers.
"""

import argparse
import csv
import datetime
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.collect import NONE, Row, Run, find, group, load_all, material, measured, setting
from maml.metrics import Interval

_INNER_STEP = re.compile(r"(.+)/step_(\d+)/(.+)")


def main() -> None:
    """Console script: reads the command line, writes the report; exits with 2 if there is none."""
    parser = argparse.ArgumentParser(description="One table and the curves of any set of runs.")
    parser.add_argument("runs", nargs="+", help="run or multirun directories, or globs of them")
    parser.add_argument("--metric", action="append", help="a metric to show; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("report"), help="default: ./report")
    parser.add_argument("--ledger", type=Path, help="a table of one line for each number, to be added to")
    arguments = parser.parse_args()
    try:
        print(report(arguments.runs, arguments.output, arguments.metric, arguments.ledger))
        print(f"\nwritten, with curves: {arguments.output / 'report.md'}")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


def report(
    patterns: Sequence[str], output: Path, metrics: Sequence[str] | None = None, ledger: Path | None = None
) -> str:
    """Writes the report on the runs below `patterns` into `output`, and the `ledger`; returns its table and notes.

    ValueError if there is no finished run, or if a metric is in none of them.
    """
    runs, unfinished, broken = load_all(find(patterns))
    if not runs:
        raise ValueError("; ".join(["no finished run found", *unfinished, *broken]))
    metrics = _known(metrics, runs) if metrics else _default_metrics(runs)
    rows, repeated = group(runs)
    notes = [*_protocol_notes(rows), *_configuration_notes(rows)]
    notes += _list("Left out (a later run has the same configuration and seed)", repeated)
    notes += _list("Unfinished", unfinished) + _list("Broken", broken)
    text = "\n\n".join([markdown(rows, metrics), *notes])
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "report.csv", rows, metrics)
    if ledger is not None:
        ledger.write_text(ledger_of(rows, ledger), encoding="utf-8")
    pictures = [f"![{name}]({file})" for name, file in draw(rows, output, metrics)]
    (output / "report.md").write_text("\n\n".join([text, *pictures]) + "\n", encoding="utf-8")
    return text


def _known(metrics: Sequence[str], runs: Iterable[Run]) -> Sequence[str]:
    known = sorted({name for run in runs for name in run.metrics})
    for name in metrics:
        if name not in known:
            raise ValueError(f"--metric {name}: in none of the runs; there are {', '.join(known)}")
    return metrics


def _default_metrics(runs: Iterable[Run]) -> list[str]:
    """What the papers name; for a run without paper its loss, accuracy or return after the last step."""
    names = {}
    for run in runs:
        names |= dict.fromkeys(run.paper or _after_last_step(run.metrics))
    return list(names)


def _after_last_step(metrics: Iterable[str]) -> list[str]:
    found = [match for match in map(_INNER_STEP.fullmatch, metrics) if match]
    found = [match for match in found if match[3] in ("loss", "accuracy", "return")]
    last = {(m[1], m[3]): m[0] for m in sorted(found, key=lambda m: int(m[2]))}
    return list(last.values())


def markdown(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """The table in Markdown: overrides, our numbers beside the paper's, protocol and cost."""
    lines = []
    for row in rows:
        cells, paper = dict(row.labels), row.runs[0].paper
        for metric in metrics:
            cells[metric] = _ours(measured(row, metric))
            cells[f"paper: {metric}"] = _paper(paper.get(metric))
        lines.append(cells | {"source": row.runs[0].source} | _facts(row) | {"wall time": _time(row)})
    unused = [k for k in lines[0] if all(cells[k] == NONE for cells in lines)]
    columns = [k for k in lines[0] if k not in unused]
    table = [columns, ["---"] * len(columns), *([cells[k] for k in columns] for cells in lines)]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in table)


_LEDGER = ("experiment", "changed", "number", "paper", "source", "ours", "protocol")
_LEDGER += ("seeds", "steps", "device", "wall time", "jax")


def ledger_of(rows: Sequence[Row], before: Path) -> str:
    """Every number that a paper or the protocol names, one line each, those that miss and diverge too.

    Lines of the ledger `before` stay, but for those of the same number (experiment, changes, protocol, steps) from the same seeds
    or fewer.

    Raises:
      ValueError: for a file that is no ledger.
    """
    names, lines = _LEDGER, []
    for row in sorted(rows, key=lambda row: (row.runs[0].choices.get("experiment", NONE), row.name)):
        run = row.runs[0]
        own = {name: setting(run, name) for name in run.overrides if not name.startswith(_UNTOLD)}
        cells = {
            "experiment": run.choices.get("experiment", NONE),
            "changed": ", ".join(f"{name}={value}" for name, value in own.items()) or NONE,
            **_facts(row),
            "wall time": _time(row),
            "jax": _of_all((one.summary.get("versions") or {}).get("jax", NONE) for one in row.runs),
        }
        named = [metric for metric in run.paper if metric in run.metrics]
        for metric in named or _after_last_step(run.metrics):
            source = run.source if metric in run.paper else NONE
            told = {"number": metric, "paper": _paper(run.paper.get(metric)), "source": source}
            told["ours"] = _ours(measured(row, metric))
            lines.append([(cells | told)[name].replace("|", "/") for name in names])
    stay = [line for line in _lines_of(before) if not any(_replaces(new, line) for new in lines)]
    table = [names, ["---"] * len(names), *sorted([*stay, *lines], key=_order)]
    head = (
        "Written by `experiments.report --ledger`, not by hand. ± is the 95 % interval over what stands behind it: the "
        "test tasks of one run, or the means of several seeds, all on the same test tasks.\nA paper's figure stands where the "
        "protocol is the paper's; numbers of different protocols (each run's summary.json spells it out) are not to be compared."
    )
    return f"# Results\n\n{head}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n"


def _number(line: Sequence[str]) -> tuple[str, ...]:
    """Which number a line of the ledger has."""
    names = ["experiment", "changed", "number", "protocol", "steps"]
    if "checkpoints=best" in line[_LEDGER.index("changed")]:  # others of each seed
        names = names[:3]
    return tuple(line[_LEDGER.index(name)] for name in names)


def _order(line: Sequence[str]) -> tuple[str, ...]:
    """step_5 before step_10."""
    return tuple(re.sub(r"\d+", lambda m: m[0].zfill(9), cell) for cell in _number(line))


def _replaces(new: Sequence[str], old: Sequence[str]) -> bool:
    seeds = _LEDGER.index("seeds")
    return _number(new) == _number(old) and set(old[seeds].split(", ")) <= set(new[seeds].split(", "))


def _lines_of(ledger: Path) -> list[list[str]]:
    """The lines of a ledger; none where there is no such file."""
    if not ledger.exists() or not (text := ledger.read_text(encoding="utf-8")).strip():
        return []
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    if not lines or tuple(lines[0]) != _LEDGER or any(len(line) != len(_LEDGER) for line in lines):
        raise ValueError(f"--ledger {ledger}: this file is no ledger, and would be lost; give another name")
    return lines[2:]


_UNTOLD = ("experiment", "seed", "logger", "hydra", "resume", "task.data_dir")
_UNTOLD += ("trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.log_every")
_UNTOLD += ("trainer.validate_every", "trainer.validation_tasks", "evaluation.after")
"""Overrides that change no number, or stand elsewhere."""


def write_csv(path: Path, rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """The table with a column for every number; empty where there is none."""
    kinds = ("", " ci95", " n", " over", " paper", " paper ci95")
    lines = []
    for row in rows:
        cells: dict[str, Any] = dict(row.labels)
        for metric in metrics:
            ours, over = measured(row, metric) or (("", "", ""), "")
            paper = row.runs[0].paper.get(metric, ("", ""))
            cells |= zip((metric + kind for kind in kinds), (*ours, over, *paper), strict=True)
        cells |= {"source": row.runs[0].source} | _facts(row) | {"wall_time_s": _wall_time(row)}
        lines.append(cells | {"directories": " ".join(str(run.directory) for run in row.runs)})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _of_all(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _facts(row: Row) -> dict[str, str]:
    return {
        "protocol": _of_all(run.summary.get("protocol_hash", NONE) for run in row.runs),
        "seeds": _of_all(run.summary["seed"] for run in row.runs),
        "steps": _of_all(_steps(run) for run in row.runs),
        "device": _of_all(run.summary.get("device", NONE) for run in row.runs),
    }


def _steps(run: Run) -> Any:
    """Those of an evaluation's checkpoint, else of the training."""
    logged = run.records[-1]["step"] if run.records else NONE
    return run.summary.get("step", run.settings.get("trainer.steps", logged))


def _wall_time(row: Row) -> float | None:
    """The mean over the row's runs, in seconds."""
    known = [run.summary["wall_time_s"] for run in row.runs if "wall_time_s" in run.summary]
    return float(np.mean(known)) if known else None


def _time(row: Row) -> str:
    seconds = _wall_time(row)
    return NONE if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _ours(value: tuple[Interval, str] | None) -> str:
    if value is None:
        return NONE
    (mean, ci95, n), over = value
    if ci95 is None or not 1e-9 * abs(mean) < ci95 < math.inf:  # none, or equal but for rounding
        return f"{mean:.4g} ({n} {over})"
    decimals = max(0, 1 - math.floor(math.log10(ci95)))  # two digits of the interval
    return f"{mean:.{decimals}f} ± {ci95:.{decimals}f} ({n} {over})"


def _paper(figure: tuple[float, float | None] | None) -> str:
    if figure is None:
        return NONE
    mean, ci95 = figure
    return f"{mean:g}" if ci95 is None else f"{mean:g} ± {ci95:g}"


def _list(title: str, lines: Sequence[str]) -> list[str]:
    return ["\n".join([f"**{title}:**", "", *(f"- {line}" for line in lines)])] if lines else []


def _protocol_notes(rows: Iterable[Row]) -> list[str]:
    summaries = [row.runs[0].summary for row in rows]
    protocols = {str(s.get("protocol_hash", NONE)): s.get("protocol") or {} for s in summaries}
    if len(protocols) < 2:
        return []
    title = "Warning: rows of different protocols stand in this table and cannot be compared"
    return _list(title, _differences(protocols) or ["no difference is recorded"])


def _configuration_notes(rows: Sequence[Row]) -> list[str]:
    """What differs between rows that no override tells apart: a default that was changed."""
    alike: dict[str, dict[str, dict]] = {}
    for row in rows:
        labels = str(row.labels)
        alike.setdefault(labels, {})[str(row.runs[0].directory)] = material(row.runs[0])
    lines = [line for told in alike.values() if len(told) > 1 for line in _differences(told)]
    return _list("Rows that look alike differ in", lines)


def _differences(told: dict[str, dict]) -> list[str]:
    """`key: value (name), ...` for every key whose values differ between the named mappings."""
    keys = dict.fromkeys(key for settings in told.values() for key in settings)
    lines = []
    for key in keys:
        values = {name: str(settings.get(key, NONE)) for name, settings in told.items()}
        if len(set(values.values())) > 1:
            lines.append(f"{key}: " + ", ".join(f"{v} ({name})" for name, v in values.items()))
    return lines


def draw(rows: Sequence[Row], output: Path, metrics: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Writes the curves over meta-steps and over inner steps; yields each one's title and file."""
    from maml import plots  # imports JAX, seconds: not where the command line is refused

    for name in dict.fromkeys(n for row in rows for run in row.runs for r in run.records for n in r):
        if name in metrics or name.endswith(("query/loss", "query/accuracy")):
            curves = _curves(rows, lambda row, name=name: _learning_curve(row, name))
            logy = name.endswith("loss") and all(min(v, default=0) > 0 for _, v in curves.values())
            yield name, _save(plots.learning_curves(curves, name, logy), output, name)
    found = (_INNER_STEP.fullmatch(n) for row in rows for run in row.runs for n in run.metrics)
    for prefix, name in dict.fromkeys((match[1], match[3]) for match in found if match):
        curves = _curves(rows, lambda row, at=(prefix, name): _step_curve(row, *at))
        title = f"{prefix}/steps/{name}"
        yield title, _save(plots.step_curve(curves, f"{prefix}/{name}"), output, title)
    for name in metrics:
        if against := _bits_curves(rows, name):
            title = f"{name}/bits"
            yield title, _save(plots.accuracy_against_bits(against, name), output, title)


_BITS = "quantization.bits"


def _bits_curves(rows: Sequence[Row], name: str) -> dict[str, tuple[list, list, list]]:
    """Bits, means and half-widths, of the rows that the bits tell apart, by what else does."""
    curves: dict[str, tuple[list, list, list]] = {}
    for row in rows:
        if row.labels.get(_BITS, "").isdecimal() and (value := measured(row, name)):
            label = ", ".join(f"{k}={v}" for k, v in row.labels.items() if k != _BITS) or "kernels"
            mean, ci95, _ = value[0]
            for values, one in zip(
                curves.setdefault(label, ([], [], [])), (int(row.labels[_BITS]), mean, ci95), strict=True
            ):
                values.append(np.nan if one is None else one)
    return curves


def _curves(rows: Iterable[Row], curve: Callable[[Row], tuple]) -> dict[str, tuple]:
    seeds = [f"{len(row.runs)} seed{'s' * (len(row.runs) > 1)}" for row in rows]
    curves = {f"{row.name} ({n})": curve(row) for row, n in zip(rows, seeds, strict=True)}
    return {label: points for label, points in curves.items() if len(points[0])}


def _learning_curve(row: Row, name: str) -> tuple[list[int], list[float]]:
    """The mean over the row's seeds, at the steps that all of them logged."""
    logged = [{r["step"]: r[name] for r in run.records if name in r} for run in row.runs]
    steps = sorted(set.intersection(*map(set, logged)))
    values = [[np.nan if one[step] is None else one[step] for one in logged] for step in steps]
    return steps, [float(np.mean(seeds)) for seeds in values]


def _step_curve(row: Row, prefix: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means and half-widths after 0, 1, ... inner steps; NaN where nothing was measured."""
    matches = [match for match in map(_INNER_STEP.fullmatch, row.runs[0].metrics) if match]
    steps = [int(match[2]) for match in matches if (match[1], match[3]) == (prefix, name)]
    means, half_widths = np.full((2, max(steps, default=-1) + 1), np.nan)
    for step in steps:
        if value := measured(row, f"{prefix}/step_{step}/{name}"):
            mean, ci95, _ = value[0]
            means[step], half_widths[step] = mean, np.nan if ci95 is None else ci95
    return means, half_widths


def _save(figure: Any, output: Path, title: str) -> str:
    from maml import plots

    file = re.sub(r"[^\w.-]+", "_", title) + ".png"
    plots.save(figure, output / file)
    return file


if __name__ == "__main__":
    main()
