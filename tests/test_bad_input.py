"""Bad input gets one clear line with argument, value and remedy, exit code 2, and nothing is lost."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from experiments import build, collect, gradcheck, pictures, results, run
from experiments.program import BAD_INPUT
from maml import train
from maml.checkpoint import Checkpoints
from maml.tasks import images
from maml.tasks.episodes import ClassImages
from maml.tasks.splits import read_split
from tests.programs import (
    ROOT,
    SMALL,
    Ended,
    bits,
    config,
    finish,
    main,
    restored,
    rows,
    start,
    steps,
    summary,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})
    monkeypatch.setenv("MAML_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def omniglot(monkeypatch):
    """Omniglot without data, and few drawings of it: 1,623 classes of 20."""
    names = sum(read_split("finn"), ())
    counts = np.full(len(names), 20, np.int32)
    data = ClassImages(
        np.zeros((20 * len(names), 28, 28, 1), np.uint8), np.cumsum(counts, dtype=np.int32) - counts, counts
    )
    monkeypatch.setattr(images, "tfds_images", lambda *_, **__: (data, names))


OMNIGLOT = ("task=omniglot", "model=mlp_batch_norm", "model.hidden=[8]", "evaluation=finn2017", "paper=null")


def refusal(ended: Ended) -> str:
    """The one line that a refused program prints."""
    assert ended.code == BAD_INPUT == 2
    assert ended.err.startswith("error: "), ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.endswith("\n")
    assert "Traceback" not in ended.out
    return ended.err


def refused(tmp_path: Path, *overrides: str) -> str:
    return refusal(main(*SMALL, "logger=quiet", f"hydra.run.dir={tmp_path / 'run'}", *overrides))


# --- names and values ---


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.stepz=5", ["trainer.stepz", "Key 'stepz' not in 'Trainer'"]),
        ("taks=sinusoid", ["taks"]),
        ("task.shotz=5", ["task.shotz"]),
        ("model=nothing", ["model/nothing", "Available options", "conv4_max_pool", "mlp mlp_batch_norm"]),
        (
            "experiment=nothing",
            ["experiment/nothing", "finn2017/sinusoid_oracle", "td0_value_prediction zintgraf2019/sinusoid Config"],
        ),
        (
            "experiment=glob(finn2018/*)",
            ["glob(finn2018/*): finds no file of conf/experiment", "finn2017/sinusoid_oracle"],
        ),
        ("experiment=glob(finn2017/*,exclude=*mlp)", ["exclude=*mlp): give one pattern"]),
        ("trainer.steps=five", ["trainer.steps=five", "'five' of type 'str' could not be converted to Integer"]),
        ("seed=none", ["seed=none", "could not be converted to Integer"]),
        ("debug_nans=perhaps", ["debug_nans=perhaps", "not a valid bool"]),
        ("trainer.steps", ["trainer.steps", "missing EQUAL"]),
    ],
)
def test_names_and_types_that_hydra_refuses(tmp_path, override, words):
    line = refused(tmp_path, override)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+trainer.step=5", ["trainer.step: no such key", "steps, meta_batch"]),
        ("+evaluation.stepz=3", ["evaluation.stepz: no such key"]),
        ("+sed=1", ["error: sed: no such key", "seed"]),
        ("seed=4294967296", ["seed=4294967296: give 0 to 4294967295"]),
        ("evaluation.seed=-1", ["evaluation.seed=-1: give 0 to"]),
        ("+task.split=meta_test", ["+task.split=meta_test: training is on meta_train; give evaluation.split"]),
        (
            ("optimizer=adam_cosine", "optimizer.learning_rate=5e-3"),
            ["optimizer.learning_rate=5e-3: optimizer=adam_cosine has a schedule there", "learning_rate.init_value"],
        ),
        ("+diagnostics.curvature.evry=1", ["diagnostics.curvature.evry: no such key", "every"]),
        ("+quantization.bit=3", ["quantization.bit: no such key", "bits"]),
        (
            "quantization.bits=2",
            ["quantization.bits: neither model maml.models.MLP nor algorithm maml reads it", "mlp_quantized"],
        ),
        (
            ("algorithm=maml_on_grid", "quantization.activations=8"),
            ["quantization.activations: neither model", "maml_on_grid reads it"],
        ),
        ("model.hidden=[8,0]", ["hidden=[8, 0], context=0: give a list of widths of 1 or more"]),
        ("+algorithm.stepsize=0.1", ["algorithm.stepsize: nothing in algorithm maml reads it", "step_size"]),
        (
            ("algorithm=meta_sgd", "+algorithm.step_size=0.1"),
            ["algorithm.step_size: nothing in algorithm meta_sgd reads it"],
        ),
        (
            ("algorithm=imaml", "+algorithm.precision=bfloat16"),
            ["algorithm.precision: nothing in algorithm imaml reads it"],
        ),
        (
            ("algorithm.adapt.adapt.optimizer.learning_rate=0.1", "evaluation.step_size=0.2"),
            ["evaluation.step_size=0.2: algorithm maml has no step size of its own to change"],
        ),
        (
            ("experiment=td0_value_prediction", "algorithm=meta_sgd", "algorithm.step_size=0.2"),
            ["algorithm.step_size=0.2: algorithm meta_sgd has no step size of its own to change"],
        ),
        (
            ("experiment=td0_value_prediction", "algorithm=meta_sgd", "++evaluation.step_size=0.2"),
            ["evaluation.step_size=0.2: algorithm meta_sgd has no step size of its own to change"],
        ),
        (
            ("algorithm=learned_hyperparameters", "algorithm.hyperparameters.momentum=null"),
            ["momentum=None is no number"],
        ),
        (
            ("algorithm=learned_hyperparameters", "+algorithm.hyperparameters.nesterov=true"),
            ["nesterov=True is no number"],
        ),
        (
            ("algorithm=protonet", "task=omniglot", "evaluation.steps=3"),
            ["evaluation.steps=3: the inner steps of algorithm protonet are written in its file; leave it out"],
        ),
        (
            ("algorithm=protonet", "evaluation=protonet", "evaluation.steps=0"),
            ["algorithm protonet does not fit", "labels", "task=omniglot"],
        ),
        (
            "algorithm.derivative._target_=maml.derivatives.truncated",
            ["truncated(3)", "algorithm.derivative._partial_=false"],
        ),
    ],
)
def test_keys_that_nothing_reads_are_refused_where_hydra_takes_them(tmp_path, override, words):
    """`+` puts a key anywhere, and Hydra's own message recommends it."""
    line = refused(tmp_path, *([override] if isinstance(override, str) else override))
    assert all(word in line for word in words), line


def test_every_program_of_a_config_refuses_keys_that_nothing_reads(tmp_path):
    ended = main(*SMALL, "+trainer.step=5", f"hydra.run.dir={tmp_path}", program=gradcheck)
    assert "error: trainer.step: no such key" in refusal(ended)


WHOLE_0, WHOLE_1 = (f"give a whole number, {least} or more" for least in (0, 1))
POSITIVE = "give a positive number"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.meta_batch=0", f"trainer.meta_batch=0: {WHOLE_1}"),
        ("trainer.meta_batch=-5", f"trainer.meta_batch=-5: {WHOLE_1}"),
        ("trainer.log_every=0", f"trainer.log_every=0: {WHOLE_1}"),
        ("trainer.checkpoint_every=0", f"trainer.checkpoint_every=0: {WHOLE_1}"),
        ("trainer.keep_checkpoints=0", f"trainer.keep_checkpoints=0: {WHOLE_1}"),
        ("trainer.validation_tasks=0", f"trainer.validation_tasks=0: {WHOLE_1}"),
        ("trainer.steps=-1", f"trainer.steps=-1: {WHOLE_0}"),
        ("trainer.validate_every=-1", f"trainer.validate_every=-1: {WHOLE_0}"),
        ("trainer.task_chunk=3", "task_chunk=3: give auto, all or a divisor of 4 tasks: [1, 2, 4]"),
        ("task.shots=0", f"task.shots=0: {WHOLE_1}"),
        ("task.shots=abc", f"task.shots='abc': {WHOLE_1}"),
        ("task.shots=1.5", f"task.shots=1.5: {WHOLE_1}"),
        ("task.shots=true", f"task.shots=True: {WHOLE_1}"),
        ("task.shots=null", f"task.shots=None: {WHOLE_1}"),
        ("task.queries=-1", f"task.queries=-1: {WHOLE_1}"),
        ("task.inputs=[5.0,-5.0]", "inputs=(5.0, -5.0): give a range"),
        ("algorithm.steps=-1", f"algorithm.steps=-1: {WHOLE_0}"),
        ("algorithm.steps=0.5", f"algorithm.steps=0.5: {WHOLE_0}"),
        ("algorithm.step_size=-1", f"algorithm.step_size=-1: {POSITIVE}"),
        ("algorithm.step_size=0", f"algorithm.step_size=0: {POSITIVE}"),
        ("algorithm.step_size=abc", f"algorithm.step_size='abc': {POSITIVE}"),
        ("algorithm.step_size=null", f"algorithm.step_size=None: {POSITIVE}"),
        ("algorithm.step_size=nan", f"algorithm.step_size=nan: {POSITIVE}"),
        ("optimizer.learning_rate=0", f"optimizer.learning_rate=0: {POSITIVE}"),
        ("optimizer.learning_rate=null", f"optimizer.learning_rate=None: {POSITIVE}"),
        ("evaluation.step_size=-1.0", f"evaluation.step_size=-1.0: {POSITIVE}"),
        ("evaluation.tasks=0", "evaluation.tasks=0: give a whole number, 1 or more"),
        ("evaluation.shots=0", "evaluation.shots=0: give a whole number, 1 or more"),
        ("evaluation.queries=-3", "evaluation.queries=-3: give a whole number, 1 or more"),
        ("evaluation.steps=-1", "evaluation.steps=-1: give a whole number, 0 or more"),
        ("evaluation.split=test", "evaluation.split=test: give one of meta_train, meta_valid, meta_test"),
        ("evaluation.norm=layer", "norm='layer': give one of batch, support"),
        ("evaluation.least_ways=2", "evaluation.least_ways=2: this task has no ways that could vary; leave it out"),
        (
            "evaluation.ways=5",
            "evaluation.ways=5: this task has no classes; give a task that has, such as task=omniglot",
        ),
    ],
)
def test_values_out_of_range(tmp_path, override, line):
    assert refused(tmp_path, override).startswith(f"error: {line}")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("value", ["false", "False", "no", "off", "0"])
def test_booleans_are_read(value):
    assert config(f"debug_nans={value}").debug_nans is False
    assert config("debug_nans=true").debug_nans is True


def test_the_end_of_memory_is_one_line_with_a_remedy(tmp_path, monkeypatch):
    """8 PB, which no machine has: what the device says comes from JAX itself."""
    monkeypatch.setattr(run, "run", lambda *_: jax.block_until_ready(jnp.zeros(2 * 10**15)))
    line = refused(tmp_path)
    assert line.startswith("error: out of memory: ")
    assert "trainer.memory_gb" in line


# --- data ---


@pytest.mark.usefixtures("omniglot")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.ways=1101"], ["ways=1101", "1100 classes", "give at most"]),
        (["task.ways=0"], ["task.ways=0", "give a whole number, 1 or more"]),
        (["task.ways=abc"], ["task.ways='abc'", "give a whole number, 1 or more"]),
        (["task.shots=abc"], ["task.shots='abc'", "give a whole number, 1 or more"]),
        (["task.shots=11"], ["shots=11, queries=11", "20 examples", "at most 20"]),
        (["task.queries=20"], ["shots=1, queries=20", "make shots + queries at most 20"]),
        (["task.class_split=finnish"], ["class_split='finnish'", "finn, vinyals, lake"]),
        (["task.rotations=all"], ["rotations='all'", "per_class"]),
        (["evaluation.ways=6"], ["evaluation.ways=6", "task.ways=5", "make them equal"]),
        # What only the evaluation asks for is refused before the training:
        (["task.ways=424"], ["ways=424", "423 classes"]),
        (["evaluation.queries=20"], ["shots=1, queries=20", "20 examples"]),
        (["task.class_split=lake", "trainer.validate_every=1"], ["meta_valid", "'lake'", "no classes"]),
        (["task.ways=101", "trainer.validate_every=1"], ["ways=101", "100 classes"]),
    ],
)
def test_sizes_that_the_data_have_not(tmp_path, overrides, words):
    line = refused(tmp_path, *OMNIGLOT, *overrides)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("there", ["missing", "empty", "default"])
def test_no_data_prepared(tmp_path, monkeypatch, there):
    """The three ways are named, in seconds: nobody waits for a network."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name))
    folder = tmp_path / "data"
    if there == "empty":
        folder.mkdir()
    if there == "default":
        monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    argument = [] if there == "default" else [f"task.data_dir={folder}"]
    begin = time.monotonic()
    line = refused(tmp_path, *OMNIGLOT, *argument)
    assert time.monotonic() - begin < 20
    assert f"data_dir='{folder}'" in line
    for way in (
        "python -m experiments.prepare name=omniglot data_dir=DIR",
        "task.data_dir=DIR",
        "DIR/downloads/manual/",
    ):
        assert way in line


@pytest.fixture
def folder(tmp_path):
    """Four classes of four images."""
    root = tmp_path / "photos"
    for split, names in {"meta_train": "ab", "meta_valid": "c", "meta_test": "d"}.items():
        root.mkdir(exist_ok=True)
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (root / name).mkdir()
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
                Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def folder_job(root) -> tuple[str, ...]:
    size = ("task.image_size=8", "task.channels=1", "task.ways=1", "task.queries=2", "evaluation=finn2017")
    return "task=image_folder", f"task.data_dir={root}", *size, "model=mlp_batch_norm", "model.hidden=[8]"


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [half, lambda f: f.write_text("a letter"), lambda f: f.write_bytes(b"")])
@pytest.mark.parametrize("name", ["a", "d"])
def test_a_file_that_is_no_image(tmp_path, folder, spoil, name):
    """Named before the training, also where only the evaluation reads it (d)."""
    spoil(folder / name / "1.png")
    line = refused(tmp_path, *folder_job(folder))
    assert f"cannot read the image {folder / name / '1.png'}" in line
    assert "replace or remove it" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_folder_that_fits_is_no_fault(tmp_path, folder):
    assert main(*SMALL, "logger=quiet", f"hydra.run.dir={tmp_path / 'run'}", *folder_job(folder)).code == 0


def test_folders_that_do_not_fit(tmp_path, folder):
    job = folder_job(folder)
    assert "task.data_dir has no value: give task.data_dir=..." in refused(tmp_path, job[0], *job[2:])
    assert "data_dir='/no/where': no such folder; give one" in refused(
        tmp_path, job[0], "task.data_dir=/no/where", *job[2:]
    )
    (tmp_path / "empty").mkdir()
    line = refused(tmp_path, job[0], f"task.data_dir={tmp_path / 'empty'}", *job[2:])
    assert "write meta_train.txt, meta_valid.txt and meta_test.txt" in line
    assert "ways=2: this split has 1 classes" in refused(tmp_path, *job, "task.ways=2")
    shutil.rmtree(folder / "b")
    assert "no images of the class 'b'" in refused(tmp_path, *job)


# --- numbers that are none ---


def test_after_a_divergence_no_step_size_is_named_that_nothing_reads(tmp_path):
    cfg = config("experiment=td0_value_prediction", "algorithm=meta_sgd", "debug=short")
    assert cfg.algorithm.step_size == 0.03
    left = results.after_divergence(cfg, Checkpoints(tmp_path))
    assert left.endswith(f"start again with a lower optimizer.learning_rate={cfg.optimizer.learning_rate}")


@pytest.mark.parametrize("override", ["algorithm.step_size=1e6", "optimizer.learning_rate=1e30"])
def test_a_loss_that_is_not_finite(tmp_path, override):
    """After a good beginning: the last good checkpoint is named, and is there."""
    line = refused(tmp_path, override)
    name, value = override.split("=")
    assert "not finite at meta-step " in line
    assert f"{name}={float(value)}" in line
    assert "algorithm.step_size=" in line
    assert "optimizer.learning_rate=" in line
    assert "no checkpoint was saved" in line
    assert steps(tmp_path / "run") == []
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_last_good_checkpoint_is_named_and_good(tmp_path, monkeypatch):
    """The loss is made NaN at the seventh meta-step: `fit` stops there, and not at the end of the dispatch."""
    make = build.learner

    def poisoned(cfg):
        learner = make(cfg)

        def step(state, sampler):
            new, metrics = learner.step(state, sampler)
            bad = jax.numpy.where(state.step == 6, jax.numpy.nan, 0.0)
            return new, metrics | {"objective": metrics["objective"] + bad}

        return build.Learner(learner.apply, learner.loss, learner.sampler, step, learner.state)

    whole = [*SMALL, "logger=quiet", "trainer.steps=20", "trainer.checkpoint_every=3", "trainer.log_every=100"]
    with monkeypatch.context() as patch:
        patch.setattr(build, "learner", poisoned)
        line = refusal(main(*whole, f"hydra.run.dir={tmp_path / 'run'}"))
    assert "not finite at meta-step 7;" in line
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '6'};" in line
    assert steps(tmp_path / "run") == [3, 6]
    assert [r["step"] for r in rows(tmp_path / "run")] == [1]
    state = restored(config(*whole), tmp_path / "run").state
    assert int(state.step) == 6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert main(*whole, f"hydra.run.dir={tmp_path / 'run'}").code == 0  # and it can be continued


def test_an_update_that_overflows_is_never_saved():
    """The loss of the step before is finite: the parameters tell."""
    cfg = config(*SMALL, "optimizer.learning_rate=1e38")
    learner, saved = build.learner(cfg), []

    def step(state, sampler):
        new, metrics = learner.step(state, sampler)
        return new._replace(params=jax.tree.map(lambda x: x / 0, new.params)), metrics

    progress = train.begin(learner.state, step, learner.sampler)
    with pytest.raises(train.NonFinite, match="at meta-step 1"):
        train.fit(progress, step, learner.sampler, steps=3, log_every=1, log=saved.append, every=[(1, saved.append)])
    assert saved == []


def test_debugging_nans_stops_in_the_operation(tmp_path):
    with pytest.raises(FloatingPointError):
        main(*SMALL, "debug=nans", "algorithm.step_size=1e20", f"hydra.run.dir={tmp_path}")


def test_an_evaluation_that_is_not_finite_is_null(tmp_path):
    ended = main(*SMALL, "logger=quiet", "evaluation.step_size=1e30", f"hydra.run.dir={tmp_path}")
    assert ended.code == 0
    last = summary(tmp_path)["metrics"]["meta_test/step_2/loss"]
    assert last == {"mean": None, "ci95": None, "n": 4}


def test_a_checkpoint_of_another_config(tmp_path):
    assert main(*SMALL, "logger=quiet", f"hydra.run.dir={tmp_path / 'run'}").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()}
    line = refused(tmp_path, "optimizer.learning_rate=0.5", "seed=1")
    assert "of another config: optimizer.learning_rate was 0.001, is 0.5; seed was 0, is 1." in line
    assert "Give the old values or another directory" in line
    assert {p: p.read_bytes() for p in before} == before
    named = collect.load(tmp_path / "run").overrides  # the refused command has renamed nothing
    assert "trainer.meta_batch" in named
    assert "optimizer.learning_rate" not in named


# --- places to write ---


@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_directory_that_cannot_be_made(tmp_path, mode):
    (tmp_path / "file").write_text("precious")
    sweep = ["-m"] if mode == "sweep" else []
    line = refusal(main(*sweep, *SMALL, f"hydra.{mode}.dir={tmp_path / 'file' / 'run'}"))
    assert f"hydra.{mode}.dir" in line
    assert str(tmp_path / "file") in line
    assert "give a directory that can be written" in line
    assert (tmp_path / "file").read_text() == "precious"


def test_a_directory_that_cannot_be_written():
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    line = refusal(main(*SMALL, "hydra.run.dir=/proc/self"))
    assert "hydra.run.dir" in line
    assert "/proc/self" in line


JOB = (*SMALL, "logger=quiet", "trainer.steps=6", "trainer.checkpoint_every=2")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        pytest.param(ValueError("RESOURCE_EXHAUSTED: Failed writing"), marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_while_saving(tmp_path, monkeypatch, error):
    """Orbax reports it in either way."""
    save = ocp.CheckpointManager.save

    def full(manager, step, *args, **kwargs):
        if step == 4:
            raise error
        return save(manager, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        line = refusal(main(*JOB, f"hydra.run.dir={tmp_path / 'run'}"))
    assert f"could not save step 4 in {tmp_path / 'run' / 'checkpoints'}" in line
    assert str(error).split(":")[0] in line
    assert "those of steps [2] stay" in line
    assert int(restored(config(*JOB), tmp_path / "run").state.step) == 2
    assert main(*JOB, f"hydra.run.dir={tmp_path / 'run'}").code == 0
    run.run(config(*JOB), tmp_path)
    assert bits(config(*JOB), tmp_path / "run") == bits(config(*JOB), tmp_path)


def test_a_disk_without_room_is_seen_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        line = refusal(main(*JOB, f"hydra.run.dir={tmp_path / 'run'}"))
    assert "could not save step 2 in" in line
    assert "No space left on device (1000 bytes are free, " in line
    assert steps(tmp_path / "run") == []


LIMITED = """
import resource
from experiments import run
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
run.main()
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow(tmp_path):
    """A real refusal by the system, of checkpoints alone: they are larger than every other file."""
    job = [*JOB, "model.hidden=[80,80]", f"hydra.run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", LIMITED, *job]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = finish(process)
    assert ended.code == BAD_INPUT
    # Orbax's threads print beside it, at times without an end of line before ours.
    assert ended.err.count("error: could not save step 2 in") == 1
    assert "File too large" in ended.err
    assert "none was saved before" in ended.err
    assert steps(tmp_path / "run") == []
    assert main(*job).code == 0
    assert steps(tmp_path / "run") == [2, 4, 6]
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


def test_a_full_disk_under_the_metrics(tmp_path, monkeypatch):
    """/dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    line = refusal(main(*JOB, f"hydra.run.dir={tmp_path / 'run'}"))
    assert "No space left on device" in line
    assert str(tmp_path / "run" / "metrics.jsonl") in line


# --- other programs and many jobs ---


@pytest.mark.slow
def test_a_bad_job_does_not_stop_the_others(tmp_path):
    """In a process of its own, as people run it."""
    sweep = [f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}"]
    job = [*SMALL, "logger=quiet", *sweep, "trainer.meta_batch=0,4,-1", "seed=3"]
    ended = finish(start("-m", *job, cwd=ROOT))
    assert ended.code == BAD_INPUT
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: trainer.meta_batch={n}: give a whole number, 1 or more" for n in (0, -1)]
    assert "Traceback" not in ended.err
    assert summary(tmp_path / "1")["seed"] == 3
    assert not (tmp_path / "0" / "summary.json").exists()


def test_the_line_of_a_real_process(tmp_path):
    ended = finish(start("trainer.meta_batch=0", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path))
    assert refusal(ended) == "error: trainer.meta_batch=0: give a whole number, 1 or more\n"
    assert ended.out == ""


def test_hydras_own_variable_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="trainer.meta_batch=0"):
        main("trainer.meta_batch=0", f"hydra.run.dir={tmp_path}")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_environment_is_left_as_it_was(tmp_path):
    refused(tmp_path, "trainer.meta_batch=0")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_fault_of_the_program_shows_its_traceback(tmp_path, monkeypatch):
    """Only bad input is one line."""

    def broken(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(build, "learner", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        main(*SMALL, f"hydra.run.dir={tmp_path}")
    assert sys.exc_info() == (None, None, None)
