"""The report: its numbers against hand-computed ones, and nothing lost in silence."""

import csv
import hashlib
import json
import math
import os
import sys

import pytest
import yaml
from PIL import Image

from experiments import report

STEP_0, STEP_1 = "meta_test/step_0/accuracy", "meta_test/step_1/accuracy"
CONFIG = {"algorithm": {"name": "maml", "steps": 1}, "trainer": {"steps": 200, "log_every": 100}}
FIGURES = {"maml": {STEP_1: [0.987, 0.004]}, "fomaml": {STEP_1: {"mean": 0.97}}}
PAPER = {"source": "Finn et al. 2017, Table 1", "figures": FIGURES}
PROTOCOL = {"protocol": {"tasks": 600, "queries": 15}, "protocol_hash": "aaaa"}


def make_run(directory, seed=0, accuracy=0.9, ci95=0.01, overrides=(), choices=None, config=None, **summary):
    """A run directory as the run program and Hydra leave it."""
    hydra = directory / ".hydra"
    hydra.mkdir(parents=True)
    config = CONFIG | {"seed": seed, "paper": PAPER} | (config or {})
    choices = {"hydra": {"runtime": {"choices": choices or {"algorithm": "maml", "debug": None}}}}
    (hydra / "config.yaml").write_text(yaml.safe_dump(config))
    (hydra / "overrides.yaml").write_text(yaml.safe_dump([*overrides, f"seed={seed}"]))
    (hydra / "hydra.yaml").write_text(yaml.safe_dump(choices))
    metrics = {
        STEP_0: {"mean": 0.2, "ci95": 0.02, "n": 600},
        STEP_1: {"mean": accuracy, "ci95": ci95, "n": 600},
        "meta_test/step_1/loss": {"mean": 1 - accuracy, "ci95": None, "n": 1},
    }
    default = {"metrics": metrics, "seed": seed, "device": "1 × cpu", "wall_time_s": 90.0}
    (directory / "summary.json").write_text(json.dumps(default | PROTOCOL | summary))
    lines = [{"step": k, "meta_train/query/loss": accuracy / k} for k in (100, 200)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def made(tmp_path, *paths, metrics=None):
    """The report's text, its rows by column from the Markdown, and those from the CSV file."""
    output = tmp_path / "report"
    text = report.report([str(path) for path in paths or [tmp_path / "runs"]], output, metrics)
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    with (output / "report.csv").open(newline="", encoding="utf-8") as file:
        return text, rows, list(csv.DictReader(file))


@pytest.fixture
def sweep(tmp_path):
    """MAML with three seeds and FOMAML with one."""
    for seed, accuracy in enumerate((0.96, 0.98, 0.97)):
        make_run(tmp_path / f"runs/maml{seed}", seed, accuracy, wall_time_s=60.0 * (seed + 1))
    config, choices = {"algorithm": {"name": "fomaml", "steps": 1}}, {"algorithm": "fomaml"}
    directory, overrides = tmp_path / "runs/sweep/9", ["algorithm=fomaml"]
    make_run(directory, 0, 0.9512, 0.0123, overrides, choices, config)
    return tmp_path


def test_mean_and_student_interval_over_three_seeds(sweep):
    _, (maml, fomaml), (csv_maml, csv_fomaml) = made(sweep)
    # mean 0.97, s = 0.01, t(0.975, 2) = 4.302653, half-width 4.302653 * 0.01 / sqrt(3) = 0.0248414
    assert maml[STEP_1] == "0.970 ± 0.025 (3 seeds)"
    assert float(csv_maml[STEP_1]) == pytest.approx(0.97, abs=1e-12)
    assert float(csv_maml[f"{STEP_1} ci95"]) == pytest.approx(0.0248414, abs=1e-7)
    assert (csv_maml[f"{STEP_1} n"], csv_maml[f"{STEP_1} over"]) == ("3", "seeds")
    assert fomaml[STEP_1] == "0.951 ± 0.012 (600 tasks)"  # one seed: the summary's own
    assert (csv_fomaml[f"{STEP_1} ci95"], csv_fomaml[f"{STEP_1} over"]) == ("0.0123", "tasks")


def test_the_ledger_has_a_line_for_each_number_and_those_that_diverge(sweep):
    choices = {"algorithm": "maml", "experiment": "finn2017/omniglot"}
    make_run(sweep / "runs/wild", 3, math.nan, None, ["task.shots=5", "logger=quiet"], choices, {"task": {"shots": 5}})
    path = sweep / "RESULTS.md"
    report.report([str(sweep / "runs")], sweep / "report", None, path)
    text = path.read_text()
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert str(sweep) not in text
    wild = next(row for row in rows if row["experiment"] == "finn2017/omniglot")
    assert (wild["changed"], wild["number"], wild["seeds"], wild["paper"]) == (
        "task.shots=5",
        STEP_1,
        "3",
        "0.987 ± 0.004",
    )
    assert wild["ours"].startswith("nan (600 tasks)")
    others = {row["changed"]: row for row in rows if row is not wild}
    assert set(others) == {"–", "algorithm=fomaml"}
    assert others["–"]["ours"] == "0.970 ± 0.025 (3 seeds)"
    assert others["algorithm=fomaml"]["paper"] == "0.97"
    assert (others["–"]["protocol"], others["–"]["seeds"], others["–"]["wall time"]) == ("aaaa", "0, 1, 2", "0:02:00")


def test_a_ledger_is_added_to_and_other_files_are_left_alone(sweep):
    """Runs that are not at hand any more keep their lines; those that were run again have new ones."""
    path = sweep / "RESULTS.md"

    def lines(*runs):
        report.report([str(sweep / "runs" / run) for run in runs], sweep / "report", None, path)
        return [line for line in path.read_text().splitlines() if STEP_1 in line]

    (alone,) = lines("maml0")
    both = lines("sweep")
    assert alone in both
    assert len(both) == 2
    after = lines("maml*")
    assert len(after) == 2
    assert alone not in after
    assert any("0.970 ± 0.025 (3 seeds)" in line for line in after)
    fewer = lines("maml1")  # a line of three seeds is not lost to one
    assert len(fewer) == 3
    assert set(after) < set(fewer)
    path.write_text("# Shopping\n")
    with pytest.raises(ValueError, match=r"RESULTS.md: this file is no ledger"):
        lines("maml0")
    assert path.read_text() == "# Shopping\n"


def test_a_ledger_keeps_numbers_that_differ_in_a_decimal(tmp_path):
    path = tmp_path / "RESULTS.md"
    for size in (0.1, 0.01, 0.001):
        config = {"algorithm": {"name": "maml", "step_size": size}}
        make_run(tmp_path / f"runs/{size}", overrides=[f"algorithm.step_size={size}"], config=config)
        report.report([str(tmp_path / f"runs/{size}")], tmp_path / "report", None, path)
    found = [line.split(" | ")[1] for line in path.read_text().splitlines() if STEP_1 in line]
    assert sorted(found) == [f"algorithm.step_size={size}" for size in (0.001, 0.01, 0.1)]


def test_a_seed_without_a_later_key_stands_in_the_row_of_those_that_have_it_at_null(tmp_path):
    make_run(tmp_path / "runs/0", seed=0)
    make_run(tmp_path / "runs/1", seed=1, config={"task": {"least_ways": None}})
    assert [row["seeds"] for row in made(tmp_path)[1]] == ["0, 1"]


def test_columns_of_identity_and_cost(sweep):
    _, (maml, fomaml), (csv_maml, _) = made(sweep)
    assert [maml["algorithm"], fomaml["algorithm"]] == ["maml", "fomaml"]
    assert maml["seeds"] == "0, 1, 2"
    assert [maml[name] for name in ("steps", "device", "protocol")] == ["200", "1 × cpu", "aaaa"]
    assert maml["wall time"] == "0:02:00"  # the mean of 1, 2 and 3 minutes
    assert float(csv_maml["wall_time_s"]) == 120.0
    assert csv_maml["directories"].split() == [str(sweep / f"runs/maml{seed}") for seed in range(3)]


def test_the_papers_figure_is_that_of_the_runs_algorithm(sweep):
    _, (maml, fomaml), (csv_maml, csv_fomaml) = made(sweep)
    assert maml[f"paper: {STEP_1}"] == "0.987 ± 0.004"
    assert fomaml[f"paper: {STEP_1}"] == "0.97"
    assert maml["source"] == "Finn et al. 2017, Table 1"
    assert (csv_maml[f"{STEP_1} paper"], csv_maml[f"{STEP_1} paper ci95"]) == ("0.987", "0.004")
    assert (csv_fomaml[f"{STEP_1} paper"], csv_fomaml[f"{STEP_1} paper ci95"]) == ("0.97", "")
    assert STEP_0 not in maml  # the paper does not name it


def test_figures_for_every_algorithm_and_none_for_others(tmp_path):
    metrics, figures = {STEP_0: {"mean": 0.5, "ci95": 0.1}}, {"x": {STEP_1: 1}}
    paper = {"source": "A", "metrics": metrics, "figures": figures}
    make_run(tmp_path / "runs/0", config={"paper": paper})
    make_run(tmp_path / "runs/1", overrides=["a=1"], config={"paper": None, "a": 1})
    _, (first, second), _ = made(tmp_path)
    assert first[f"paper: {STEP_0}"] == "0.5 ± 0.1"
    assert second[f"paper: {STEP_0}"] == "–"
    assert second["source"] == "–"
    assert [first["a"], second["a"]] == ["–", "1"]


def test_without_paper_the_metrics_after_the_last_step(tmp_path):
    make_run(tmp_path / "runs/0", config={"paper": None})
    path = tmp_path / "runs/0/summary.json"
    summary = json.loads(path.read_text())
    summary["metrics"]["meta_test/step_10/loss"] = {"mean": None, "ci95": None, "n": 600}
    path.write_text(json.dumps(summary))
    _, (row,), _ = made(tmp_path)
    assert row["meta_test/step_10/loss"] == "nan (600 tasks)"  # 10 comes after 1, and null is NaN
    assert row[STEP_1] == "0.900 ± 0.010 (600 tasks)"
    assert STEP_0 not in row
    assert not [name for name in row if name.startswith("paper")]


def test_chosen_metrics(sweep):
    _, (maml, _), _ = made(sweep, metrics=[STEP_0])
    assert maml[STEP_0] == "0.2 (3 seeds)"
    assert STEP_1 not in maml
    with pytest.raises(ValueError, match="--metric typo: in none of the runs; there are .*step_0"):
        made(sweep, metrics=["typo"])


def test_only_overrides_that_differ_are_columns(tmp_path):
    for steps in (1, 5):
        config = {"algorithm": {"name": "maml", "steps": steps}, "model": {"width": 64}}
        overrides = [f"algorithm.steps={steps}", "+model.width=64", "logger=quiet"]
        make_run(tmp_path / f"runs/{steps}", overrides=overrides, config=config)
    make_run(tmp_path / "runs/default", seed=1, config={"model": {"width": 64}})
    _, rows, _ = made(tmp_path)
    assert [row["algorithm.steps"] for row in rows] == ["1", "5"]  # the default is 1: another seed
    assert [row["seeds"] for row in rows] == ["0, 1", "0"]
    assert not {"model.width", "seed"} & set(rows[0])


def test_repeated_seed_is_no_second_value(tmp_path):
    for name, accuracy in (("10", 0.8), ("9", 0.7)):
        make_run(tmp_path / "runs" / name, accuracy=accuracy)
    for last, first in (("10", "9"), ("9", "10")):
        os.utime(tmp_path / "runs" / first / "summary.json", (1e9, 1e9))
        os.utime(tmp_path / "runs" / last / "summary.json", (2e9, 2e9))
        text, (row,), _ = made(tmp_path)
        assert row[STEP_1] == f"{ {'10': '0.800', '9': '0.700'}[last] } ± 0.010 (600 tasks)"
        assert f"- {tmp_path / 'runs' / first}\n" in text.split("Left out")[1] + "\n"


def test_different_protocols_are_not_averaged_and_warned_of(tmp_path):
    make_run(tmp_path / "runs/0", seed=0)
    other = {"tasks": 600, "queries": 1}
    make_run(tmp_path / "runs/1", seed=1, protocol=other, protocol_hash="bbbb")
    text, rows, _ = made(tmp_path)
    assert [row["protocol"] for row in rows] == ["aaaa", "bbbb"]
    assert "Warning: rows of different protocols" in text
    assert "- queries: 15 (aaaa), 1 (bbbb)" in text
    assert "tasks: 600" not in text
    alone, _, _ = made(tmp_path, tmp_path / "runs/0")
    assert "Warning" not in alone


def test_rows_that_only_a_default_tells_apart_are_explained(tmp_path):
    make_run(tmp_path / "runs/0", seed=0)
    make_run(tmp_path / "runs/1", seed=1, config={"algorithm": {"name": "maml", "steps": 5}})
    text, rows, _ = made(tmp_path)
    assert len(rows) == 2
    assert f"- algorithm.steps: 1 ({tmp_path / 'runs/0'}), 5 ({tmp_path / 'runs/1'})" in text


def test_what_changes_no_number_does_not_split_a_row(tmp_path):
    make_run(tmp_path / "runs/0", seed=0, config={"logger": {"a": 1}, "resume": None})
    make_run(tmp_path / "runs/1", seed=1, config={"logger": {"b": 2}, "resume": "runs/0"})
    _, (row,), _ = made(tmp_path)
    assert row["seeds"] == "0, 1"


def test_resolved_config_of_the_summary_goes_before_hydras(tmp_path):
    make_run(tmp_path / "runs/0", config={"trainer": {"steps": "${missing}"}})
    assert made(tmp_path)[1][0]["steps"] == "${missing}"
    path = tmp_path / "runs/0/summary.json"
    summary = json.loads(path.read_text()) | {"config": {"trainer": {"steps": 7}}}
    path.write_text(json.dumps(summary))
    assert made(tmp_path)[1][0]["steps"] == "7"


def test_unfinished_runs_are_listed(sweep):
    (sweep / "runs/maml1/summary.json").unlink()
    with (sweep / "runs/maml1/metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "me')  # killed here
    text, (maml, _), _ = made(sweep)
    assert maml["seeds"] == "0, 2"
    line = f"- {sweep / 'runs/maml1'}: no summary.json, last logged step 200"
    assert line in text.split("**Unfinished:**")[1]


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("summary.json", '{"metrics": {', "summary.json: Expecting"),
        ("summary.json", '{"seed": 0}', "summary.json: lacks 'metrics'"),
        ("summary.json", '{"metrics": {"a": 1}, "seed": 0}', "summary.json: 'int' object"),
        ("summary.json", "[]", "summary.json: list indices"),
        (".hydra/config.yaml", "a: [", ".hydra: while parsing"),
        (".hydra/config.yaml", "paper: 3", "the node `paper` of the config: 'int' object"),
        ("metrics.jsonl", 'rubbish\n{"step": 1}\n', "metrics.jsonl, line 1"),
    ],
)
def test_broken_runs_are_named(sweep, file, content, named):
    (sweep / "runs/maml1" / file).write_text(content)
    text, (maml, _), _ = made(sweep)
    assert maml["seeds"] == "0, 2"
    (line,) = text.split("**Broken:**")[1].strip().splitlines()
    assert line.startswith(f"- {sweep / 'runs/maml1'}: ")
    assert named in line


def evaluated(run, overrides, accuracy, step=200, **protocol):
    """What `experiments.evaluate` leaves in a run's directory."""
    protocol = PROTOCOL["protocol"] | protocol
    own = protocol == PROTOCOL["protocol"]
    digest = PROTOCOL["protocol_hash"] if own else hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:8]
    summary = {
        "metrics": {STEP_1: {"mean": accuracy, "ci95": 0.01, "n": 6000}},
        "seed": int(run.name[-1]),
        "step": step,
    }
    summary |= {
        "protocol": protocol,
        "protocol_hash": digest,
        "overrides": overrides,
        "wall_time_s": 1.0,
        "device": "2 × gpu",
        "versions": {"jax": "2.0"},
    }
    (run / "evaluations").mkdir(exist_ok=True)
    (run / f"evaluations/{digest}.json").write_text(json.dumps(summary))


def test_evaluations_make_rows_of_their_own(sweep):
    for seed, accuracy in enumerate((0.5, 0.7, 0.6)):
        run = sweep / f"runs/maml{seed}"
        evaluated(run, ["evaluation=strict", "evaluation.tasks=6000"], accuracy, tasks=6000)
        evaluated(run, [], 0.1)  # the run's own protocol again: no second value
        best = f"mean outputs of meta-steps {seed}, 200"
        evaluated(run, ["checkpoints=best2"], 0.99 + accuracy / 100, step=200 + seed, ensemble=best)
    text, rows, lines = made(sweep)
    maml, strict, best, _ = rows
    assert maml[STEP_1] == "0.970 ± 0.025 (3 seeds)"
    assert strict[STEP_1] == "0.60 ± 0.25 (3 seeds)"  # mean and 4.303·0.1/√3 by hand
    assert best[STEP_1] == "0.9960 ± 0.0025 (3 seeds)"
    assert [row["evaluation"] for row in rows] == ["–", "strict", "–", "–"]
    assert [row["checkpoints"] for row in rows] == ["–", "–", "best2", "–"]
    assert strict["wall time"] == maml["wall time"] == "0:02:00"  # of the training, not of the evaluation
    assert strict["device"] == "1 × cpu"
    assert best["steps"] == "200, 201, 202"
    assert len(best["protocol"].split(", ")) == 3
    assert lines[1][f"{STEP_1} over"] == "seeds"
    assert [row[f"paper: {STEP_1}"] for row in rows] == ["0.987 ± 0.004", "–", "0.987 ± 0.004", "0.97"]
    assert "- tasks: 600 (aaaa), 6000" in text


def test_a_paper_may_have_figures_under_other_protocols_too(tmp_path):
    """Beside them stand those, and beside a change that they do not name none."""
    also = {"source": "Table 4", "protocol": {"queries": 3}, "figures": {"maml": {STEP_1: [0.5, 0.1]}}}
    make_run(tmp_path / "runs/0", config={"paper": PAPER | {"protocol": {"queries": 15}, "also": [also]}})
    evaluated(tmp_path / "runs/0", ["evaluation.queries=3"], 0.5, queries=3)
    evaluated(tmp_path / "runs/0", ["evaluation.queries=4"], 0.5, queries=4)
    evaluated(tmp_path / "runs/0", ["evaluation.queries=3", "evaluation.tasks=7"], 0.5, queries=3, tasks=7)
    _, rows, _ = made(tmp_path)
    shown = [(row[f"paper: {STEP_1}"], row["source"]) for row in rows]
    assert shown.pop(0) == ("0.987 ± 0.004", "Finn et al. 2017, Table 1")
    assert sorted(shown) == [("0.5 ± 0.1", "Table 4"), ("–", "–"), ("–", "–")]
    report.report([str(tmp_path / "runs")], tmp_path / "report", None, tmp_path / "RESULTS.md")
    lines = [line[2:-2].split(" | ") for line in (tmp_path / "RESULTS.md").read_text().splitlines()]
    assert {tuple(line[3:5]) for line in lines if len(line) == 12 and line[2] == STEP_1} == {
        ("0.987 ± 0.004", "Finn et al. 2017, Table 1"),
        ("0.5 ± 0.1", "Table 4"),
        ("–", "–"),
    }


def test_a_ledger_tells_where_and_with_what_a_run_was_trained(tmp_path):
    """Not half of it from the evaluation, which was made elsewhere."""
    make_run(tmp_path / "runs/0", versions={"jax": "1.0"})
    evaluated(tmp_path / "runs/0", ["evaluation=strict"], 0.5, tasks=6000)
    report.report([str(tmp_path / "runs")], tmp_path / "report", None, tmp_path / "RESULTS.md")
    lines = [line[2:-2].split(" | ") for line in (tmp_path / "RESULTS.md").read_text().splitlines()]
    ends = [(line[1], *line[-3::2]) for line in lines if STEP_1 in line]
    assert sorted(ends) == [("evaluation=strict", "1 × cpu", "1.0"), ("–", "1 × cpu", "1.0")]
    make_run(tmp_path / "runs/1", seed=1, versions={"jax": "0.9"})
    report.report([str(tmp_path / "runs")], tmp_path / "report", None, tmp_path / "both.md")
    assert "| 1 × cpu | 0:01:30 | 1.0, 0.9 |" in (tmp_path / "both.md").read_text()


def test_an_unfinished_run_that_was_evaluated_has_a_row(tmp_path):
    make_run(tmp_path / "runs/0")
    (tmp_path / "runs/0/summary.json").unlink()
    evaluated(tmp_path / "runs/0", [], 0.75, step=150, queries=1)
    text, (row,), _ = made(tmp_path)
    assert (row[STEP_1], row["steps"]) == ("0.750 ± 0.010 (6000 tasks)", "150")
    assert "wall time" not in row
    assert "Unfinished" in text


def test_evaluations_of_other_meta_steps_are_no_second_seed_and_a_broken_one_is_named(sweep):
    for seed, step in ((0, 100), (1, 200)):
        evaluated(sweep / f"runs/maml{seed}", ["evaluation=strict"], 0.5 + seed, step=step, tasks=6000)
    (sweep / "runs/maml0/evaluations/broken.json").write_text("{")
    text, rows, _ = made(sweep)
    strict = [row for row in rows if row["evaluation"] == "strict"]
    assert [(row["seeds"], row["steps"]) for row in strict] == [("0", "100"), ("1", "200")]
    assert f"- {sweep / 'runs/maml0'}: evaluations/broken.json: " in text.split("**Broken:**")[1]


def test_an_evaluation_of_other_parameters_under_the_same_protocol_is_a_row(tmp_path):
    """A finished run that was continued, and evaluated on the way: its wall time is of neither."""
    make_run(tmp_path / "runs/maml0", params_sha256="a")
    evaluated(tmp_path / "runs/maml0", [], 0.7, step=300)
    _, (own, later), _ = made(tmp_path)
    assert (own[STEP_1], later[STEP_1], later["steps"]) == (
        "0.900 ± 0.010 (600 tasks)",
        "0.700 ± 0.010 (6000 tasks)",
        "300",
    )
    assert (own["wall time"], later["wall time"]) == ("0:01:30", "–")


def test_of_ensembles_that_are_asked_for_alike_the_later_counts(tmp_path):
    make_run(tmp_path / "runs/maml0")
    for step, accuracy in ((200, 0.8), (150, 0.6)):
        evaluated(tmp_path / "runs/maml0", ["checkpoints=best2"], accuracy, step, ensemble=f"meta-steps 100, {step}")
    _, (_, best), _ = made(tmp_path)
    assert (best[STEP_1], best["steps"]) == ("0.800 ± 0.010 (6000 tasks)", "200")


def test_seeds_whose_best_checkpoint_is_the_last_stay_in_the_mean_of_the_best(tmp_path):
    """`best1` of one seed is its last, of another an earlier one: three values, and one row."""
    runs = [tmp_path / f"runs/{seed}" for seed in range(3)]
    for seed, (directory, best, step) in enumerate(zip(runs, (0.7, 0.8, 0.9), (200, 100, 150), strict=True)):
        make_run(directory, seed, 0.7, params_sha256="last")
        evaluated(directory, ["checkpoints=best1"], best, step)
        path = directory / "evaluations/aaaa.json"
        text = json.loads(path.read_text()) | {"params_sha256": "last" if step == 200 else "other"}
        path.write_text(json.dumps(text))
    _, rows, _ = made(tmp_path)
    assert sorted(row[STEP_1].split(" ")[0] for row in rows) == ["0.7", "0.80"]
    assert [row[STEP_1].endswith("(3 seeds)") for row in rows] == [True, True]


def test_what_an_evaluation_measured_later_is_the_runs_too(tmp_path):
    make_run(tmp_path / "runs/0", params_sha256="last")
    evaluated(tmp_path / "runs/0", [], 0.9)
    path = tmp_path / "runs/0/evaluations/aaaa.json"
    later = json.loads(path.read_text()) | {"params_sha256": "last"}
    path.write_text(json.dumps(later | {"metrics": later["metrics"] | {"meta_test/step_5/accuracy": {"mean": 0.95}}}))
    _, (row,), _ = made(tmp_path, metrics=["meta_test/step_5/accuracy"])
    assert row["meta_test/step_5/accuracy"].startswith("0.95 ")


def test_a_command_that_was_refused_in_a_finished_run_renames_nothing(tmp_path):
    told = {"choices": {"algorithm": "maml"}, "overrides": ["algorithm=maml", "seed=0"]}
    make_run(tmp_path / "runs/0", overrides=["algorithm=fomaml"], choices={"algorithm": "fomaml"}, hydra=told)
    make_run(tmp_path / "runs/1", accuracy=0.8, overrides=["algorithm=fomaml"], choices={"algorithm": "fomaml"})
    (tmp_path / "runs/1/summary.json").write_text(
        (tmp_path / "runs/1/summary.json").read_text().replace('"seed": 0', '"seed": 0, "config": {"a": 1}')
    )
    _, rows, _ = made(tmp_path)
    assert [row["algorithm"] for row in rows] == ["maml", "fomaml"]


def test_the_last_checkpoint_by_number_is_the_one_that_is_taken_without(tmp_path):
    for seed, asked in ((0, ["checkpoints=200"]), (1, [])):
        run = tmp_path / f"runs/maml{seed}"
        make_run(run, seed, config={"trainer": {"steps": 200}})
        evaluated(run, ["evaluation=strict", *asked], 0.5, tasks=6000)
    _, (own, strict), _ = made(tmp_path)
    assert (own["seeds"], strict["seeds"]) == ("0, 1", "0, 1")


def test_no_papers_figure_stands_beside_another_head_other_rotations_or_minibatches(tmp_path):
    """What papers do not name in their protocol, and nobody may change under their figure."""
    head = {"protocol": PROTOCOL["protocol"] | {"prototypes": "cosine"}}
    cases = [("evaluation.rotations=none", {}), ("+evaluation.batch=3", {}), ("evaluation.prototypes=cosine", head)]
    # No head of prototypes is the paper's, and another seed draws other tasks of the same protocol.
    cases += [("evaluation.prototypes=null", {}), ("evaluation.seed=3", {})]
    shown = []
    for i, (change, summary) in enumerate(cases):
        make_run(tmp_path / f"{i}", overrides=[change], **summary)
        (row,) = made(tmp_path, tmp_path / f"{i}")[1]
        shown.append(f"paper: {STEP_1}" in row)
    assert shown == [False, False, False, True, True]


@pytest.mark.parametrize("part", ["task", "evaluation"])
def test_no_papers_figure_stands_beside_tasks_of_varied_sizes(tmp_path, part):
    make_run(tmp_path / "runs/0", config={part: {"least_ways": 5}})
    _, (row,), _ = made(tmp_path)
    assert f"paper: {STEP_1}" not in row


def test_globs_and_runs_given_twice(sweep):
    runs = sweep / "runs"
    _, rows, _ = made(sweep, runs / "maml*", runs / "maml0", runs / "maml0/summary.json")
    assert [row["seeds"] for row in rows] == ["0, 1, 2"]


def test_curves_are_drawn(sweep, monkeypatch):
    from maml import plots

    drawn, (learning_curves, step_curve) = {}, (plots.learning_curves, plots.step_curve)

    def record(draw):
        return lambda curves, label, *rest: draw(drawn.setdefault(label, curves), label, *rest)

    monkeypatch.setattr(plots, "learning_curves", record(learning_curves))
    monkeypatch.setattr(plots, "step_curve", record(step_curve))
    made(sweep)
    learning = drawn["meta_train/query/loss"]
    assert list(learning) == ["algorithm=maml (3 seeds)", "algorithm=fomaml (1 seed)"]
    steps, values = learning["algorithm=maml (3 seeds)"]
    assert steps == [100, 200]
    assert values == pytest.approx([0.97 / 100, 0.97 / 200])
    means, half_widths = drawn["meta_test/accuracy"]["algorithm=maml (3 seeds)"]
    assert means == pytest.approx([0.2, 0.97])
    assert half_widths == pytest.approx([0.0, 0.0248414], abs=1e-7)
    assert math.isnan(drawn["meta_test/loss"]["algorithm=fomaml (1 seed)"][0][0])
    text = (sweep / "report/report.md").read_text()
    for name in ("meta_train_query_loss", "meta_test_steps_accuracy", "meta_test_steps_loss"):
        assert f"({name}.png)" in text
        with Image.open(sweep / f"report/{name}.png") as image:
            assert image.width > 700
            assert len(set(image.convert("L").tobytes())) > 10


def test_learning_curve_of_steps_that_all_seeds_logged_and_null(tmp_path):
    make_run(tmp_path / "runs/0", seed=0)
    make_run(tmp_path / "runs/1", seed=1)
    logged = {200: None, 300: 1.0}
    lines = [{"step": step, "meta_train/query/loss": value} for step, value in logged.items()]
    lines = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "runs/1/metrics.jsonl").write_text(lines)
    runs, _, _ = report.load_all(report.find([str(tmp_path / "runs")]))
    (row,), _ = report.group(runs)
    steps, values = report._learning_curve(row, "meta_train/query/loss")
    assert steps == [200]
    assert math.isnan(values[0])
    made(tmp_path)  # and NaN is drawn without complaint


def test_accuracy_against_bits_is_drawn_by_what_else_differs(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("maml.plots.accuracy_against_bits", lambda curves, name: drawn.update({name: curves}))
    monkeypatch.setattr("maml.plots.save", lambda *_: None)
    names = ("quantization.bits", "quantization.activations")
    for i, (bits, activations) in enumerate([(8, None), (4, None), (8, 8), (4, 8)]):
        quantization = {"quantization": {"bits": bits, "activations": activations}}
        overrides = [f"{k}={v}" for k, v in zip(names, (bits, activations), strict=True)]
        make_run(tmp_path / f"runs/{i}", 0, 0.9 + i / 100, 0.01 * (i + 1), overrides, config=quantization)
    made(tmp_path, metrics=[STEP_1])
    (curves,) = drawn.values()
    assert list(drawn) == [STEP_1]
    assert curves == {
        "quantization.activations=None": ([8, 4], [0.9, 0.91], [0.01, 0.02]),
        "quantization.activations=8": ([8, 4], [0.92, 0.93], [0.03, 0.04]),
    }


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        arguments = ["report", *arguments, "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        try:
            report.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_command_prints_the_table_that_it_writes(sweep, command):
    code, out, err = command(sweep / "runs", "--metric", STEP_0, "--metric", STEP_1)
    assert (code, err) == (0, "")
    table, _, last = out.strip().rpartition("\n\n")
    assert (sweep / "out/report.md").read_text().startswith(table)
    assert last == f"written, with curves: {sweep / 'out/report.md'}"
    assert STEP_0 in out
    assert (sweep / "out/report.csv").exists()


def test_no_runs_is_one_line_and_code_2(tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty") == (2, "", "error: no finished run found\n")
    code, _, err = command(tmp_path / "nowhere*")
    assert code == 2
    assert err == f"error: {tmp_path / 'nowhere*'}: no such run; give run or multirun directories\n"
    make_run(tmp_path / "runs/0")
    (tmp_path / "runs/0/summary.json").unlink()
    code, _, err = command(tmp_path / "runs")
    assert (code, err.count("\n")) == (2, 1)
    assert "no finished run found; " in err
    assert "last logged step 200" in err
    assert not (tmp_path / "out").exists()
