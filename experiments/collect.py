"""What lies in the directories of runs: read, and grouped by configuration apart from the seed."""

import glob
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from maml.loggers import read_json_lines
from maml.metrics import Interval, interval

NONE = "–"

_ERRORS = (LookupError, TypeError, AttributeError, ValueError, YAMLError, OmegaConfBaseException)

_IMMATERIAL = ("seed", "resume", "logger", "paper", "debug_nans", "task.data_dir", "task.cache_dir")
_IMMATERIAL += ("algorithm.needs", "algorithm.adapt.strict")
_IMMATERIAL += ("trainer.log_every", "trainer.checkpoint_every", "trainer.keep_checkpoints")
_IMMATERIAL += ("trainer.validate_every", "trainer.validation_tasks", "evaluation.after")
"""Keys, or the groups above them, in which the seeds of one row may differ."""


class Run(NamedTuple):
    """A finished run, or what `experiments.evaluate` made of one."""

    directory: Path
    summary: dict[str, Any]
    metrics: dict[str, Interval]
    settings: dict[str, str]  # the config's leaves by dotted name, as text
    choices: dict[str, str]  # the config's groups: algorithm -> maml
    overrides: list[str]  # names of what the command line set
    source: str  # where the paper's figures stand
    paper: dict[str, tuple[float, float | None]]  # its figures: mean and half-width, by metric
    records: list[dict[str, Any]]  # what was logged on the way
    written: float  # when, in seconds since 1970


class Row(NamedTuple):
    """Runs of one configuration and protocol, one per seed; labels: the overrides that differ."""

    name: str
    labels: dict[str, str]
    runs: list[Run]


def find(patterns: Iterable[str]) -> list[Path]:
    """The run directories below directories or globs; ValueError if one of these is not there."""
    found = set()
    for pattern in patterns:
        roots = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        if not roots:
            raise ValueError(f"{pattern}: no such run; give run or multirun directories")
        for root in map(Path, roots):
            root = root if root.is_dir() else root.parent
            found |= {path.parent for path in root.rglob("summary.json")}
            found |= {path.parent.parent for path in root.rglob(".hydra/config.yaml")}
    distinct = {path.resolve(): path for path in sorted(found)}.values()
    return sorted(distinct, key=lambda path: re.sub(r"\d+", lambda m: m[0].zfill(9), str(path)))  # 2 before 10


def load_all(directories: Iterable[Path]) -> tuple[list[Run], list[str], list[str]]:
    """The finished runs and all evaluations, and a line for each unfinished and for each broken one."""
    runs, unfinished, broken = [], [], []
    for directory in directories:
        try:
            run = None
            if (directory / "summary.json").exists():
                runs.append(run := load(directory))
            else:
                logged = records(directory)
                last = f"last logged step {logged[-1]['step']}" if logged else "nothing logged"
                unfinished.append(f"{directory}: no summary.json, {last}")
            for path in sorted((directory / "evaluations").glob("*.json")):
                try:
                    runs += _evaluation(directory, path, run)
                except (ValueError, OSError) as error:
                    broken.append(f"{directory}: {error}")
        except (ValueError, OSError) as error:
            broken.append(f"{directory}: {error}")
    return runs, unfinished, broken


def _evaluation(directory: Path, path: Path, run: Run | None) -> list[Run]:
    """What `experiments.evaluate` left; nothing if it only repeats the run, which gets what that had not measured.

    Device and versions are those of the training, and so is the wall time, which an earlier checkpoint has not. The paper's
    figures stand beside the run's own protocol, of one checkpoint or several, and beside others that they name.
    """
    one = load(directory, f"evaluations/{path.name}", run)
    of_training = {}
    if run is not None:
        same = all(one.summary.get(name) == run.summary.get(name) for name in ("protocol_hash", "params_sha256"))
        if same and not _chosen(one):
            run.metrics.update({name: value for name, value in one.metrics.items() if name not in run.metrics})
            return []
        whole = str(one.summary.get("step")) == run.settings.get("trainer.steps")
        names = ("device", "versions", *(("wall_time_s",) if whole else ()))
        of_training = {k: v for k, v in run.summary.items() if k in names}
    own = {k: v for k, v in one.summary.items() if k != "wall_time_s"}
    return [one._replace(summary=own | of_training)]


def _chosen(run: Run) -> bool:
    """Whether its checkpoints were chosen by validation."""
    return run.settings.get("checkpoints", "").startswith("best")


def _changed(summary: dict[str, Any], run: Run | None) -> set[str]:
    """In what the protocol of an evaluation is not that of its run, apart from an ensemble."""
    before, after = (run and run.summary.get("protocol")) or {}, summary.get("protocol") or {}
    return {name for name in (before | after if run else ()) if before.get(name) != after.get(name)} - {"ensemble"}


def load(directory: Path, file: str = "summary.json", run: Run | None = None) -> Run:
    """Reads a run, or one of its evaluations, of `run`; ValueError, with the file, or OSError if it is broken."""
    try:
        at = file
        summary = json.loads((directory / file).read_text(encoding="utf-8"))
        metrics = {name: _measured(value) for name, value in summary["metrics"].items()}
        seed = summary["seed"]
        at = ".hydra"
        config = summary.get("config") or _yaml(directory / ".hydra/config.yaml")
        told = (run.summary if run else summary).get("hydra")  # the directory's is that of the last command there
        choices, overrides = _named(told or _in_directory(directory))
        given = dict(text.split("=", 1) for text in summary.get("overrides", ()))  # those of an evaluation
        at = "the node `paper` of the config"
        known = [config, choices, [*overrides, *given], summary.get("protocol") or {}, _changed(summary, run)]
        source, paper = next((found for one in _papers(config) if (found := _figures(one, *known))[1]), (NONE, {}))
    except _ERRORS as error:
        problem = f"lacks {error}" if isinstance(error, LookupError) else str(error).splitlines()[0]
        raise ValueError(f"{at}: {problem}") from error
    if given.get("checkpoints") == str((config.get("trainer") or {}).get("steps")):
        del given["checkpoints"]  # the last one, which is taken where none is asked for
    choices |= {name: value for name, value in given.items() if name == "evaluation"}
    settings = _flat(config) | {"seed": str(seed)} | {k: v for k, v in given.items() if k == "checkpoints"}
    overrides += [name for name in given if name not in overrides]
    logged = records(directory) if file == "summary.json" else []  # on the way to an evaluation nothing was
    written = (directory / file).stat().st_mtime
    return Run(directory, summary, metrics, settings, choices, overrides, source, paper, logged, written)


def _measured(value: dict[str, Any]) -> Interval:
    mean = math.nan if value["mean"] is None else float(value["mean"])  # null is JSON's NaN
    return Interval(mean, value.get("ci95"), value.get("n", 1))


def _yaml(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def _in_directory(directory: Path) -> dict[str, Any]:
    """The groups and the overrides that Hydra has noted."""
    paths = directory / ".hydra/hydra.yaml", directory / ".hydra/overrides.yaml"
    hydra, overrides = (_yaml(path) if path.exists() else None for path in paths)
    return {"choices": hydra["hydra"]["runtime"]["choices"] if hydra else {}, "overrides": overrides or []}


def _named(told: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The groups by name, and the names of what the command line set."""
    choices = {name: str(choice) for name, choice in told["choices"].items() if choice}
    return choices, [text.lstrip("+~").split("=")[0] for text in told["overrides"]]


def records(directory: Path) -> list[dict[str, Any]]:
    """What a run logged; nothing where it has not begun."""
    path = directory / "metrics.jsonl"
    return read_json_lines(path) if path.exists() else []


def _papers(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The node `paper`, and the figures that it has `also`, under other protocols."""
    paper = config.get("paper") or {}
    return [paper, *(paper | other for other in paper.get("also") or ())]


def _figures(
    paper: dict[str, Any],
    config: dict[str, Any],
    choices: dict[str, str],
    overrides: list[str],
    protocol: dict[str, Any],
    changed: set[str],
) -> tuple[str, dict[str, Any]]:
    """The source, and the figures by metric: of `metrics` and of the run's algorithm.

    None where the run is of another task or protocol than the figures: `task` and `protocol` say of which they are. Under a
    protocol that was `changed` after the training they have to name what was changed.
    """
    varied = [(config.get(part) or {}).get("least_ways") for part in ("task", "evaluation")]
    asked = {"evaluation.rotations", "evaluation.batch"} & set(overrides)
    of = paper.get("protocol") or {}
    other_head = protocol.get("prototypes") != of.get("prototypes")
    if any(varied) or asked or other_head:  # no paper's figure is of tasks of varied sizes, nor of these changes
        return NONE, {}
    same_task = (config.get("task") or {}).get("_target_") == paper.get(
        "task", (config.get("task") or {}).get("_target_")
    )
    if not same_task or any(protocol.get(k) != v for k, v in of.items()) or not changed <= set(of):
        return NONE, {}
    algorithm = (config.get("algorithm") or {}).get("name", choices.get("algorithm"))
    own = (paper.get("figures") or {}).get(algorithm) or {}
    figures = {k: _figure(v) for k, v in ((paper.get("metrics") or {}) | own).items()}
    return paper.get("source", NONE) if figures else NONE, figures


def _figure(value: Any) -> tuple[float, float | None]:
    if isinstance(value, dict):
        value = [value["mean"], value.get("ci95")]
    mean, ci95 = value if isinstance(value, list) else (value, None)
    return float(mean), None if ci95 is None else float(ci95)


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {path: str(tree)}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat


def material(run: Run) -> dict[str, str]:
    """The settings on which the numbers depend, apart from the seed. A key that is null is as one that an older run had not."""
    skipped = tuple(f"{name}." for name in _IMMATERIAL)
    return {k: v for k, v in run.settings.items() if v != "None" and not f"{k}.".startswith(skipped)}


def group(runs: Iterable[Run]) -> tuple[list[Row], list[str]]:
    """Rows of runs that differ in the seed alone, and the runs that only repeat another's seed.

    A repeated seed is no independent value: the run of more meta-steps is taken, else the one that was written last.
    """
    groups, repeated = {}, []
    for run in runs:
        key = json.dumps([material(run), _protocol(run)], sort_keys=True)
        same, seed = groups.setdefault(key, {}), run.settings["seed"]
        if (before := same.get(seed)) is not None:
            before, run = sorted((before, run), key=lambda one: (one.summary.get("step", 0), one.written))
            repeated.append(str(before.directory))
        same[seed] = run
    return _rows([list(same.values()) for same in groups.values()]), repeated


def _protocol(run: Run) -> Any:
    """What two runs of a row have in common: `checkpoints=best5` are others of each seed."""
    protocol = run.summary.get("protocol") or {}
    if _chosen(run) or ("ensemble" in protocol and "checkpoints" in run.settings):
        return {**protocol, "ensemble": run.settings["checkpoints"]}
    return [run.summary.get("protocol_hash"), run.summary.get("step")]


def _rows(groups: Sequence[list[Run]]) -> list[Row]:
    names = dict.fromkeys(name for runs in groups for run in runs for name in run.overrides)
    told = {name: [setting(runs[0], name) for runs in groups] for name in names if name != "seed"}
    differ = {name: values for name, values in told.items() if len(set(values)) > 1}
    rows, taken = [], set()
    for i, runs in enumerate(groups):
        labels = {name: values[i] for name, values in differ.items()}
        name = ", ".join(f"{key}={value}" for key, value in labels.items())
        if not name or name in taken:
            name = f"{name} ({runs[0].directory})".strip()
        taken.add(name)
        rows.append(Row(name, labels, runs))
    return rows


def setting(run: Run, name: str) -> str:
    """What an override of a run was given."""
    return run.settings.get(name) or run.choices.get(name) or NONE


def measured(row: Row, metric: str) -> tuple[Interval, str] | None:
    """A row's mean and interval with what it is over: seeds, or the tasks of a single run."""
    found = [run.metrics[metric] for run in row.runs if metric in run.metrics]
    if len(found) > 1:
        return interval([one.mean for one in found]), "seeds"
    return (found[0], "tasks") if found else None
