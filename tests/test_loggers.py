"""Loggers: what is written is read back; resuming leaves the record of an uninterrupted run."""

import errno
import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maml.loggers import Console, JsonLines, TensorBoard, read_json_lines

LOSS = "meta_train/query/loss"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write(logger, steps):
    for step in steps:
        logger(step, {LOSS: 1.0 / step, "meta_train/support/loss": step / 7})
    logger.close()


# JsonLines


def test_floats_round_trip_to_the_bit(tmp_path):
    values = [0.1 + 0.2, 1e-310, float(np.float32(1.1)), -0.0, 123456789.123456789]
    logger = JsonLines(tmp_path, steps=10)
    logger(3, {f"m{i}": value for i, value in enumerate(values)})
    logger.close()
    (record,) = read_json_lines(tmp_path / "metrics.jsonl")
    read = [record[f"m{i}"] for i in range(len(values))]
    assert [struct.pack("d", v) for v in read] == [struct.pack("d", v) for v in values]
    assert record["step"] == 3


def test_line_has_the_documented_form_and_is_there_before_close(tmp_path):
    logger = JsonLines(tmp_path, steps=10, filename="m.jsonl")
    logger(1000, {LOSS: 1.234})
    text = (tmp_path / "m.jsonl").read_text()
    logger.close()
    assert text == '{"step": 1000, "meta_train/query/loss": 1.234}\n'


def test_not_finite_is_null_in_valid_json(tmp_path):
    logger = JsonLines(tmp_path, steps=1)
    logger(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    logger.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert read == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}


@pytest.mark.parametrize("torn", ["", '{"step": 9, "meta_tr', '{"step": 4', "\0\0\0"])
def test_resumed_file_equals_uninterrupted_file(tmp_path, torn):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write(JsonLines(whole, steps=12), range(1, 13))
    write(JsonLines(cut, steps=12), range(1, 9))  # killed at step 8, and again in a write
    with (cut / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(JsonLines(cut, steps=12, resume_step=5), range(6, 13))  # the last checkpoint is 5
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in cut.iterdir()] == ["metrics.jsonl"]


def test_resume_step_zero_starts_afresh(tmp_path):
    write(JsonLines(tmp_path, steps=9), [1, 2, 3])
    write(JsonLines(tmp_path, steps=9), [1, 2])
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_resume_without_a_file_begins_one(tmp_path):
    write(JsonLines(tmp_path / "new", steps=9, resume_step=5), [6])
    assert len(read_json_lines(tmp_path / "new/metrics.jsonl")) == 1


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"loss": 1.0}', '{"step": "1"}'])
def test_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        JsonLines(tmp_path, steps=9, resume_step=3)
    assert path.read_text().endswith('{"step": 3}\n')  # and nothing is lost


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_full_disk_names_the_file(tmp_path):
    logger = JsonLines(tmp_path, steps=9)
    logger._file.close()
    logger._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="metrics.jsonl") as caught:
        logger(1, {LOSS: 1.0})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="metrics.jsonl"):
        logger.close()


@pytest.mark.parametrize("make", [JsonLines, TensorBoard])
def test_directory_that_cannot_be_made_is_named(tmp_path, make):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        make(tmp_path / "taken", 9)


# Console


def test_without_terminal_only_lines(capsys):
    logger = Console("unused", steps=2000)
    for step in range(1, 1001):
        logger.progress(step)
    logger(1000, {LOSS: 1.2341, "meta_train/support/loss": 2.3})
    logger.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "step 1000  meta_train/query/loss 1.234  meta_train/support/loss 2.3\n"


def test_rate_is_that_since_the_last_line(capsys, monkeypatch):
    clock = iter([10.0, 10.2, 15.2])  # one for each line with a rate, and the first
    monkeypatch.setattr("maml.loggers.time.perf_counter", lambda: next(clock))
    logger = Console("unused", steps=2000, resume_step=500)
    logger(501, {})  # the first: it would be the rate of compilation
    logger(1001, {})
    logger(1001, {"meta_valid/loss": 1.0})  # the same step again: no rate
    logger(1101, {})
    logger.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 501",
        "step 1001  (2500 steps/s)",
        "step 1001  meta_valid/loss 1",
        "step 1101  (20 steps/s)",
    ]


def test_only_the_last_inner_step_is_printed(capsys):
    logger = Console("unused", steps=10)
    steps = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]  # JAX sorts names as text
    metrics = {f"meta_test/step_{k}/{name}": k / 10 for k in steps for name in ("loss", "acc")}
    logger(5, metrics | {"meta_test/loss": 3.0})
    logger.close()
    err = capsys.readouterr().err
    shown = "meta_test/step_10/loss 1  meta_test/step_10/acc 1  meta_test/loss 3\n"
    assert shown in err
    assert err.count("step_") == 2


def test_bar_on_a_terminal_shows_progress_and_loss(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = Console("unused", steps=100, resume_step=40)
    logger(50, {LOSS: 0.125})
    logger.progress(60)
    logger.close()
    text = terminal.getvalue()
    assert "40/100" in text
    assert "60/100" in text
    assert "loss 0.125" in text.split("60/100")[1]
    assert "meta_train/query/loss 0.125" in text


# TensorBoard


def events(directory):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = module.EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_scalars_back(tmp_path):
    write(TensorBoard(tmp_path, steps=5), range(1, 6))
    scalars = events(tmp_path / "tensorboard").Scalars(LOSS)
    assert [(s.step, s.value) for s in scalars] == [(k, np.float32(1 / k)) for k in range(1, 6)]


def test_tensorboard_forgets_what_comes_after_the_resume_step(tmp_path):
    first = TensorBoard(tmp_path, steps=9)
    for step in range(1, 9):
        first(step, {LOSS: float(step)})  # and never closed, as after a kill
    second = TensorBoard(tmp_path, steps=9, resume_step=5)
    for step in range(6, 10):
        second(step, {LOSS: 100.0 + step})
    scalars = events(tmp_path / "tensorboard").Scalars(LOSS)
    first.close()
    second.close()
    assert [(s.step, s.value) for s in scalars] == [(k, k if k <= 5 else 100.0 + k) for k in range(1, 10)]


def test_tensorboard_reads_pictures_and_histograms_back(tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image

    picture = np.zeros((3, 5, 3), np.uint8)
    picture[1, 2] = (10, 200, 30)
    logger = TensorBoard(tmp_path, steps=5, subdirectory="events")
    logger.image("picture", picture, 1)
    logger.image("figure", Figure(figsize=(2, 1), dpi=50), 1)
    logger.histogram("norms", np.array([[1.0, 2.0], [3.0, np.nan]]), 2)
    logger.histogram("nothing", np.array([np.inf]), 2)
    logger.close()
    read = events(tmp_path / "events")
    (image,) = read.Images("picture")
    decoded = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(decoded, picture)
    (figure,) = read.Images("figure")
    assert (figure.width, figure.height) == (100, 50)
    (norms,) = read.Histograms("norms")
    assert (norms.histogram_value.num, norms.histogram_value.sum) == (3, 6.0)
    assert read.Tags()["histograms"] == ["norms"]


def test_picture_of_another_type_is_refused(tmp_path):
    logger = TensorBoard(tmp_path, steps=5)
    with pytest.raises(ValueError, match="uint8"):
        logger.image("picture", np.zeros((3, 5, 3), np.float32), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_full_disk_stops_the_run_and_names_the_directory(tmp_path):
    logger = TensorBoard(tmp_path, steps=9)
    logger(1, {LOSS: 1.0})
    logger._writer._py_recordio_writer._writer.close()
    with open("/dev/full", "wb", buffering=0) as full:
        logger._writer._py_recordio_writer._writer = full
        with pytest.raises(OSError, match="tensorboard"):
            logger(2, {LOSS: 1.0})


# All


def test_importing_and_making_loggers_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from maml.loggers import Console, JsonLines, TensorBoard\n"
        f"[make({str(tmp_path)!r}, 9).close() for make in (Console, JsonLines, TensorBoard)]\n"
        "print([m for m in ('tensorboardX', 'matplotlib', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", ["default", "quiet"])
def test_configured_loggers_take_the_same_arguments(tmp_path, name):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(Path(__file__).parents[1] / f"conf/logger/{name}.yaml")
    for make in instantiate(config).values():
        logger = make(tmp_path, 9, 3)
        logger(4, {LOSS: 1.0})
        logger.close()
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 1
    assert (tmp_path / "tensorboard").exists() == (name == "default")
