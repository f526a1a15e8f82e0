"""An interrupted run, continued, is the uninterrupted run: bit for bit."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import pictures, results, run
from experiments.program import BAD_INPUT, INTERRUPTED
from maml.checkpoint import Checkpoints, Damaged, digest
from tests.helpers import twins
from tests.programs import (
    ROOT,
    bits,
    config,
    finish,
    main,
    metrics_bytes,
    restored,
    rows,
    signal_at,
    start,
    steps,
    summary,
)

pytestmark = pytest.mark.usefixtures("compiled_once")

RUN = (
    *("trainer.steps=40", "trainer.meta_batch=4", "model.hidden=[8,8]", "paper=null", "logger=quiet"),
    *("trainer.log_every=6", "trainer.checkpoint_every=8", "trainer.keep_checkpoints=9"),  # neither divides the other
    *("evaluation.tasks=2", "evaluation.steps=1"),
)
SAVED = [8, 16, 24, 32, 40]
LOGGED = [1, 6, 12, 18, 24, 30, 36, 40]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})


def go(directory: Path, *overrides: str) -> dict:
    """A run in this process."""
    directory.mkdir(parents=True, exist_ok=True)
    return run.run(config(*RUN, *overrides), directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", lambda *_: {})
        patch.setattr(pictures, "training_curves", lambda *_: {})
        go(directory)
    assert steps(directory) == SAVED
    assert [r["step"] for r in rows(directory)] == LOGGED
    return directory


def same(directory: Path, other: Path, *overrides: str) -> bool:
    cfg = config(*RUN, *overrides)
    return bits(cfg, directory) == bits(cfg, other)


@pytest.fixture
def left_at(whole, tmp_path):
    """What a kill leaves that comes after meta-step `step` was saved, here with all that was logged later."""

    def make(step: int) -> Path:
        directory = tmp_path / f"left_{step}"
        shutil.copytree(whole / "checkpoints", directory / "checkpoints")
        for later in SAVED:
            if later > step:
                shutil.rmtree(directory / "checkpoints" / str(later))
        shutil.copy(whole / "metrics.jsonl", directory)
        return directory

    return make


# --- the same bits ---


def test_a_killed_run_continues_to_the_same_bits(whole, tmp_path):
    directory = tmp_path / "run"
    killed = finish(start(*RUN, f"hydra.run.dir={directory}", signal_at(27, signal.SIGKILL), cwd=ROOT))
    assert killed.code == -signal.SIGKILL
    assert steps(directory) == [8, 16, 24]
    assert not (directory / "summary.json").exists()
    ended = main(*RUN, f"hydra.run.dir={directory}")
    assert ended.code == 0
    assert f"continuing {directory} after meta-step 24" in ended.out
    assert rows(directory) == rows(whole)  # says more than the line below, should it fail
    assert same(directory, whole)
    assert summary(directory)["metrics"] == summary(whole)["metrics"]


@pytest.mark.parametrize("step", [8, 24])
def test_any_checkpoint_continues_to_the_same_bits(whole, left_at, step):
    """24 is a multiple of both periods, 8 of one: the window of the metrics is saved full."""
    directory = left_at(step)
    assert [r["step"] for r in rows(directory)] == LOGGED  # a kill may come long after the last save
    go(directory)
    assert same(directory, whole)


def test_a_torn_last_line_of_the_metrics_is_mended(whole, left_at):
    directory = left_at(16)
    complete = metrics_bytes(directory).splitlines(keepends=True)
    (directory / "metrics.jsonl").write_bytes(b"".join(complete[:4]) + complete[4][:20])
    go(directory)
    assert same(directory, whole)


def test_the_checks_can_fail(whole, tmp_path):
    """The comparison sees one step more, another seed, and a window that was dropped."""
    go(tmp_path / "seed", "seed=1")
    assert not same(tmp_path / "seed", whole)
    progress = restored(config(*RUN), whole)
    dropped = progress._replace(window=progress.window._replace(count=progress.window.count + 1))
    assert digest(dropped) != digest(progress)
    assert int(progress.state.step) == 40
    assert int(progress.state.opt_state[0].count) == 40  # Adam's, so the optimizer's state is compared


@pytest.mark.parametrize("number", twins((signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT)))
def test_a_signal_saves_and_the_same_command_continues(whole, tmp_path, number):
    directory, before = tmp_path / "run", signal.getsignal(number)
    stopped = main(*RUN, f"hydra.run.dir={directory}", signal_at(20, number))
    assert stopped.code == INTERRUPTED == 75
    at = steps(directory)[-1]
    assert 20 <= at < 24  # at once, not at the next interval
    assert f"stopped by a signal at meta-step {at} and saved" in stopped.out
    assert stopped.err == ""
    assert not (directory / "summary.json").exists()
    assert signal.getsignal(number) == before
    ended = main(*RUN, f"hydra.run.dir={directory}")
    assert ended.code == 0
    assert same(directory, whole)


def test_a_program_that_is_told_to_stop_exits_with_75(tmp_path):
    """SIGTERM from outside, as batch systems send it, in the middle of training."""
    forever = [*RUN, "trainer.steps=100000000", "trainer.log_every=1000", "trainer.checkpoint_every=100000000"]
    process = start(*forever, f"hydra.run.dir={tmp_path / 'run'}")
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, 30)
    assert ended.code == INTERRUPTED
    (step,) = steps(tmp_path / "run")
    assert step >= 1000
    assert "Traceback" not in ended.err


def wait_for_lines(path: Path, count: int, timeout: float = 120) -> None:
    until = time.monotonic() + timeout
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < until, f"no {count} lines in {path}"
        time.sleep(0.01)


def test_resume_into_a_new_directory(whole, left_at, tmp_path):
    old, new = left_at(16), tmp_path / "new"
    before = metrics_bytes(old)
    go(new, f"resume={old}")
    assert same(new, whole)
    assert steps(new) == SAVED[2:]
    assert (steps(old), metrics_bytes(old)) == ([8, 16], before)  # the old one is left alone
    go(new, f"resume={old}")  # finished
    shutil.rmtree(new / "checkpoints" / "40")
    (new / "summary.json").unlink()
    go(new, f"resume={old}")  # its own checkpoints go first
    assert same(new, whole)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_wall_time_is_that_of_all_sessions(left_at, tmp_path, elsewhere):
    """An hour until checkpoint 16; in the directory itself, or from `resume`."""
    old, new = left_at(16), tmp_path / "new"
    (old / "wall_time.json").write_text('{"wall_time_s": 3600}')
    left = go(new, f"resume={old}") if elsewhere else go(old)
    noted = json.loads(((new if elsewhere else old) / "wall_time.json").read_text())["wall_time_s"]
    assert 3600 < noted <= left["wall_time_s"] < 4200
    assert json.loads((old / "wall_time.json").read_text())["wall_time_s"] == (3600 if elsewhere else noted)


def test_what_was_no_session_of_the_run_is_not_counted(whole, tmp_path):
    (tmp_path / "wall_time.json").write_text('{"wall_time_s": 3600}')  # without a checkpoint: the run begins anew
    assert go(tmp_path, "trainer.steps=24")["wall_time_s"] < 600
    for rubbish in ("rubbish", "[1]", '{"wall_time_s": null}', '{"wall_time_s": NaN}'):
        (tmp_path / "wall_time.json").write_text(rubbish)
        assert results.spent(tmp_path) == 0
    assert go(tmp_path)["wall_time_s"] < 600
    assert same(tmp_path, whole)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (tmp_path / "wall_time.json").unlink()  # as of a run from before there was one
    (fresh / "wall_time.json").write_text('{"wall_time_s": 3600}')
    assert go(fresh, f"resume={tmp_path}")["wall_time_s"] < 600


def test_more_steps_after_the_end(whole, tmp_path):
    directory = tmp_path / "run"
    go(directory, "trainer.steps=24")
    assert summary(directory)["params_sha256"] != summary(whole)["params_sha256"]
    go(directory)
    assert same(directory, whole)


@pytest.mark.slow
def test_more_steps_after_an_end_between_log_lines(whole, tmp_path):
    """The end is logged wherever it is; the line stays, and the next mean goes on from the line before."""
    directory = tmp_path / "run"
    go(directory, "trainer.steps=20")
    go(directory)
    assert summary(directory)["params_sha256"] == summary(whole)["params_sha256"]
    extra = [r for r in rows(directory) if r not in rows(whole)]
    assert [r["step"] for r in extra] == [20]
    assert [r for r in rows(directory) if r not in extra] == rows(whole)


# --- damage ---


def data_files(step: Path) -> list[Path]:
    return [f for f in (step / "state").rglob("*") if f.is_file() and f.stat().st_size > 100]


def flip(step: Path) -> None:
    for file in data_files(step):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(bytes(content))


def truncate(step: Path) -> None:
    for file in data_files(step):
        os.truncate(file, file.stat().st_size // 2)


def empty(step: Path) -> None:
    for file in step.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def no_metadata(step: Path) -> None:
    (step / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(step / "meta")


def hollow(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize("spoil", twins((flip, hollow), (flip, truncate, empty, no_metadata, hollow)))
def test_a_damaged_newest_checkpoint_is_named_skipped_and_replaced(whole, left_at, caplog, spoil):
    directory = left_at(24)
    spoil(directory / "checkpoints" / "24")
    with caplog.at_level(logging.INFO):
        go(directory)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(str(directory / "checkpoints" / "24") in w and "damaged, skipped" in w for w in warnings)
    assert f"continuing {directory} after meta-step 16" in caplog.text
    assert same(directory, whole)
    caplog.clear()
    shutil.rmtree(directory / "checkpoints" / "40")
    shutil.rmtree(directory / "checkpoints" / "32")
    assert int(restored(config(*RUN), directory).state.step) == 24  # whole again
    assert caplog.text == ""


def test_a_damaged_last_checkpoint_is_made_again(whole, left_at):
    directory = left_at(40)
    flip(directory / "checkpoints" / "40")
    go(directory)
    assert same(directory, whole)


def test_one_bit_is_damage(left_at):
    """Where the storage's own checks would not see it, the sha256 does."""
    directory = left_at(8)
    checkpoints = Checkpoints(directory / "checkpoints")
    progress = restored(config(*RUN), directory)
    checkpoints.save(9, progress, {})
    checkpoints.close()
    meta = directory / "checkpoints" / "9" / "meta" / "metadata"
    text = meta.read_text()
    sha = text.index('"sha256": "') + len('"sha256": "')
    meta.write_text(text[:sha] + ("0" if text[sha] != "0" else "1") + text[sha + 1 :])
    step, _ = Checkpoints(directory / "checkpoints").restore(progress)
    assert step == 8


def test_when_every_checkpoint_is_damaged_nothing_is_done(left_at):
    directory = left_at(16)
    for step in SAVED[:2]:
        truncate(directory / "checkpoints" / str(step))
    before = metrics_bytes(directory)
    with pytest.raises(Damaged, match=f"no checkpoint in {directory / 'checkpoints'} can be read: delete"):
        go(directory)
    assert metrics_bytes(directory) == before
    assert steps(directory) == [8, 16]


def test_what_a_kill_during_a_save_leaves_is_ignored(whole, left_at):
    directory = left_at(16)
    half = directory / "checkpoints" / "24.orbax-checkpoint-tmp"
    shutil.copytree(whole / "checkpoints" / "24", half)
    truncate(half)
    go(directory)
    assert same(directory, whole)
    assert not half.exists()


SAVING = """
import sys, numpy as np
from maml.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=3)
for step in range(100000):
    checkpoints.save(step, {"a": np.full((300, 300), step, np.float32), "b": np.full(5, step, np.int32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 10))])
def test_a_kill_during_a_save_leaves_the_one_before(tmp_path, seed):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.kill()
    told = [2, *map(int, process.communicate()[0].split())][-1]
    template = {"a": np.zeros((300, 300), np.float32), "b": np.zeros(5, np.int32)}
    step, tree = Checkpoints(tmp_path).restore(template) or (-1, {})
    assert step in (told, told + 1)  # all that it said were saved, and perhaps the next
    assert (np.asarray(tree["a"]) == step).all()
    assert (np.asarray(tree["b"]) == step).all()


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    """In training and in saves, of which there is one every 50 meta-steps; the run is seconds long."""
    job = [*RUN, "trainer.steps=3000", "trainer.checkpoint_every=50", "trainer.log_every=35"]
    cfg = config(*job)
    (tmp_path / "whole").mkdir()
    run.run(cfg, tmp_path / "whole")
    expected, generator, equal = bits(cfg, tmp_path / "whole"), random.Random(0), []
    lines = len(rows(tmp_path / "whole"))
    for i in range(20):
        directory = tmp_path / str(i)
        process = start(*job, f"hydra.run.dir={directory}", cwd=ROOT)
        wait_for_lines(directory / "metrics.jsonl", generator.randrange(2, lines - 1))
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        assert finish(process).code == -signal.SIGKILL
        at = steps(directory)[-1:]
        half = [p.name for p in directory.glob("checkpoints/*tmp*")]
        run.run(cfg, directory)
        equal.append(bits(cfg, directory) == expected)
        print(f"kill {i}: saved {at}, half saved {half}: {'equal' if equal[-1] else 'DIFFERENT'}")
    print(f"{sum(equal)} of 20 bit-identical")
    assert all(equal)


# --- what may change, and what not ---


@pytest.mark.parametrize(
    ("override", "was", "now"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate was 0.001", "is 0.5"),
        ("seed=1", "seed was 0", "is 1"),
        ("trainer.meta_batch=8", "trainer.meta_batch was 4", "is 8"),
        ("algorithm=fomaml", "algorithm.name was maml", "is fomaml"),
        ("model.hidden=[9]", "model.hidden was [8, 8]", "is [9]"),
        ("trainer.task_chunk=1", "trainer.task_chunk was auto", "is 1"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(left_at, override, was, now):
    directory = left_at(16)
    before = metrics_bytes(directory)
    with pytest.raises(ValueError, match="another config") as error:
        go(directory, override)
    message = str(error.value)
    assert was in message
    assert now in message
    assert str(directory / "checkpoints") in message
    assert "trainer.steps" not in message  # only what differs
    assert (steps(directory), metrics_bytes(directory)) == ([8, 16], before)


def test_a_refused_resume_leaves_nothing_behind(left_at, tmp_path):
    with pytest.raises(ValueError, match="another config: seed was 0, is 1"):
        go(tmp_path / "new", f"resume={left_at(16)}", "seed=1")
    assert list((tmp_path / "new").iterdir()) == []


def test_fewer_steps_than_are_done_are_refused(left_at):
    with pytest.raises(ValueError, match=r"trainer.steps=10: .* has done 16; give more"):
        go(left_at(16), "trainer.steps=10")


@pytest.mark.parametrize("there", ["nothing", "a run that saved nothing"])
def test_resume_without_checkpoint_is_refused(tmp_path, there):
    old = tmp_path / "old"
    if there != "nothing":
        (old / "checkpoints").mkdir(parents=True)
    ended = main(*RUN, f"hydra.run.dir={tmp_path / 'new'}", f"resume={old}")
    assert ended.code == BAD_INPUT
    assert f"error: resume={old}: no checkpoint in {old / 'checkpoints'}; give a run directory" in ended.err
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_what_changes_no_parameter_may_change(whole, left_at):
    directory = left_at(16)
    changes = (
        *("trainer.log_every=5", "trainer.checkpoint_every=7", "trainer.keep_checkpoints=2"),
        *(
            "trainer.validate_every=20",
            "trainer.validation_tasks=3",
            "evaluation.tasks=3",
            "evaluation.steps=2",
            "logger=default",
        ),
        *("paper={source: mine, figures: {}}", "debug_nans=false"),
    )
    go(directory, *changes)
    assert summary(directory)["params_sha256"] == summary(whole)["params_sha256"]
    new = restored(config(*RUN, *changes), directory).state
    old = restored(config(*RUN), whole).state
    assert digest(new) == digest(old)  # the optimizer's state too
    logged = [r["step"] for r in rows(directory) if "meta_train/objective" in r]
    assert logged == [1, 6, 12, 20, 25, 30, 35, 40]
    assert summary(directory)["metrics"]["meta_test/step_2/loss"]["n"] == 3
