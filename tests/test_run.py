"""A run from the command line to its directory, and what is in it."""

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from experiments import build, evaluate, pictures, results, reuse, run
from experiments.evaluate import evaluate_run
from maml import train
from maml.checkpoint import Checkpoints, digest
from maml.loggers import read_json_lines
from maml.tasks import image_folder
from maml.types import Padded
from tests.programs import (
    SMALL,
    bits,
    config,
    finish,
    main,
    metrics_bytes,
    restored,
    rows,
    start,
    steps,
    summary,
)

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, and how it ended."""
    directory = tmp_path_factory.mktemp("done") / "run"
    return directory, main(*SMALL, f"hydra.run.dir={directory}")


@pytest.fixture
def no_pictures(monkeypatch):
    """Without the pictures, which take most of the time."""
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})


def quick(directory, *overrides: str):
    """A run without Hydra's part of it."""
    directory.mkdir(parents=True, exist_ok=True)
    return run.run(config(*SMALL, "logger=quiet", *overrides), directory)


# --- what a run leaves ---


def test_a_run_ends_well_and_shows_its_numbers(done):
    directory, ended = done
    assert ended.code == 0
    assert f"protocol {summary(directory)['protocol_hash']}" in ended.out
    assert "meta_test/step_2/loss" in ended.out
    assert "step 4 " in ended.err  # the console's lines


def test_a_run_leaves_the_composed_config(done):
    directory, _ = done
    left = OmegaConf.load(directory / ".hydra" / "config.yaml")
    assert left == config(*SMALL)
    overrides = yaml.safe_load((directory / ".hydra" / "hydra.yaml").read_text())["hydra"]["overrides"]
    assert f"hydra.run.dir={directory}" in overrides["hydra"]


def test_a_run_leaves_metrics(done):
    directory, _ = done
    lines = rows(directory)
    assert [line["step"] for line in lines] == [1, 2, 4]
    names = {"step", *(f"meta_train/{k}" for k in ("objective", "gradient_norm", "query/loss", "support/loss"))}
    assert all(set(line) == names for line in lines)
    assert read_json_lines(directory / "metrics.jsonl") == lines


def test_a_run_leaves_a_summary(done):
    directory, _ = done
    left = summary(directory)
    keys = "metrics protocol protocol_hash params_sha256 seed versions device wall_time_s"
    assert set(keys.split()) <= set(left)
    assert set(left["metrics"]) == {f"meta_test/step_{k}/loss" for k in range(3)}
    for value in left["metrics"].values():
        assert set(value) == {"mean", "ci95", "n"}
        assert value["n"] == 4
        assert value["mean"] > 0
        assert value["ci95"] > 0
    expected = {"split": "meta_test", "tasks": 4, "ways": None, "shots": 5, "queries": 5, "steps": 2, "norm": "batch"}
    assert expected.items() <= left["protocol"].items()
    text = json.dumps(left["protocol"], sort_keys=True)
    assert left["protocol_hash"] == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert left["seed"] == 0
    assert left["versions"]["jax"] == jax.__version__
    assert "cpu" in left["device"].lower() or jax.default_backend() != "cpu"
    assert 0 < left["wall_time_s"] < 600


def test_the_digest_is_that_of_the_saved_parameters(done):
    directory, _ = done
    assert steps(directory) == [2, 4]
    params = restored(config(*SMALL), directory).state.params
    assert summary(directory)["params_sha256"] == digest(params)
    hasher = hashlib.sha256()  # by hand: path, type, shape, bytes
    for path, x in jax.tree.flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        hasher.update(f"{name} {x.dtype} {x.shape}".encode() + np.asarray(x).tobytes())
    assert digest(params) == hasher.hexdigest()


def test_a_run_leaves_tensorboard_events_and_pictures(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, _ = done
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("meta_train/query/loss")] == [1, 2, 4]
    names = {"adaptation", "step_loss", "training_loss"}
    assert {p.stem for p in (directory / "plots").iterdir()} == names
    assert set(events.Tags()["images"]) == names
    for name in names:
        with Image.open(directory / "plots" / f"{name}.png") as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_a_finished_run_is_not_run_again(done, monkeypatch):
    directory, _ = done
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    monkeypatch.setattr(build, "learner", None)  # it would be called
    ended = main(*SMALL, f"hydra.run.dir={directory}")
    assert ended.code == 0
    assert "nothing to do" in ended.out
    after = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}
    ours = {p for p in before if p.name not in ("config.yaml", "hydra.yaml", "overrides.yaml", "run.log")}
    assert ours == ours & set(after)
    assert all(after[p] == before[p] for p in ours)


@pytest.mark.usefixtures("no_pictures")
def test_seeds_and_bits(done, tmp_path):
    directory, _ = done
    quick(tmp_path / "same")
    assert bits(config(*SMALL), tmp_path / "same") == bits(config(*SMALL), directory)
    assert summary(tmp_path / "same")["metrics"] == summary(directory)["metrics"]
    quick(tmp_path / "other", "seed=1")
    assert summary(tmp_path / "other")["params_sha256"] != summary(directory)["params_sha256"]
    assert metrics_bytes(tmp_path / "other") != metrics_bytes(directory)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_first_order_is_another_run(done, tmp_path):
    directory, _ = done
    assert quick(tmp_path / "fomaml", "algorithm=fomaml")["params_sha256"] != summary(directory)["params_sha256"]
    at_first = [rows(d)[0]["meta_train/query/loss"] for d in (directory, tmp_path / "fomaml")]
    assert at_first[0] == at_first[1]  # same tasks, same parameters, same inner step


@pytest.mark.usefixtures("no_pictures")
def test_validation_is_logged_and_changes_nothing(done, tmp_path):
    directory, _ = done
    quick(tmp_path, "trainer.validate_every=2", "trainer.validation_tasks=3")
    valid = [r for r in rows(tmp_path) if "meta_valid/step_2/loss" in r]
    assert [r["step"] for r in valid] == [2, 4]
    assert summary(tmp_path)["params_sha256"] == summary(directory)["params_sha256"]
    left = [r for r in rows(tmp_path) if r not in valid]
    assert left == rows(directory)


@pytest.mark.usefixtures("no_pictures")
def test_no_steps_are_the_initialisation(tmp_path):
    left = quick(tmp_path, "trainer.steps=0")
    assert left["params_sha256"] == digest(build.learner(config(*SMALL)).state.params)
    assert steps(tmp_path) == [0]
    assert rows(tmp_path) == []


@pytest.mark.usefixtures("no_pictures")
def test_debugging_nans_changes_no_bit(done, tmp_path):
    directory, _ = done
    try:
        left = quick(tmp_path, "debug=nans", "trainer.steps=4", "trainer.checkpoint_every=2", "evaluation.tasks=4")
        assert jax.config.jax_debug_nans
    finally:
        jax.config.update("jax_debug_nans", False)
    assert left["params_sha256"] == summary(directory)["params_sha256"]
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4]


def test_how_steps_fall_into_dispatches_changes_no_bit():
    cfg = config(*SMALL)
    results = []
    for seconds in (1e-9, 1e9):
        learner, logged, ticks = build.learner(cfg), [], []
        progress = train.begin(learner.state, learner.step, learner.sampler)
        progress = train.fit(
            progress,
            learner.step,
            learner.sampler,
            steps=50,
            log_every=20,
            log=lambda step, metrics, logged=logged: logged.append((step, dict(metrics))),
            tick=ticks.append,
            dispatch_s=seconds,
        )
        results.append((digest(progress), logged))
        assert (len(ticks) == 50) == (seconds < 1)
    assert results[0] == results[1]
    assert [step for step, _ in results[0][1]] == [1, 20, 40, 50]


# --- evaluation of a run ---


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A finished run on a folder of noise with 6 classes of 8 images, and its overrides."""
    root = tmp_path_factory.mktemp("classifier")
    generator = np.random.default_rng(0)
    for split, names in {"meta_train": "abc", "meta_valid": "de", "meta_test": "fgh"}.items():
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            (root / "images" / name).mkdir()
            for i in range(8):
                pixels = generator.integers(0, 256, (8, 8), np.uint8)
                Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    overrides = [
        *("task=image_folder", f"task.data_dir={root / 'images'}", "task.image_size=8", "task.channels=1"),
        *("task.ways=2", "task.queries=2", f"+task.cache_dir={root / 'cache'}", "model=mlp_batch_norm"),
        *("evaluation=finn2017", "debug=short", "trainer.meta_batch=2", "model.hidden=[8]", "evaluation.steps=2"),
        *("algorithm.step_size=0.5", "evaluation.tasks=5"),
    ]
    (root / "run").mkdir()
    run.run(config(*overrides), root / "run")
    return root / "run"


def test_tasks_of_varied_ways_and_shots(classifier, tmp_path):
    """Trained, looked into and evaluated again under fixed sizes; what compares examples says that it does not take them."""
    images = classifier.parent / "images"
    overrides = [
        *("task=image_folder", f"task.data_dir={images}", "task.image_size=8", "task.channels=1", "model.hidden=[8]"),
        *("task.ways=3", "task.shots=4", "task.queries=2", "task.least_ways=2"),
        f"+task.cache_dir={tmp_path / 'cache'}",
        *("model=mlp_batch_norm", "evaluation=finn2017", "debug=short", "trainer.meta_batch=2", "evaluation.steps=1"),
        *("evaluation.tasks=5", "algorithm.step_size=0.5", "diagnostics.per_example.every=2"),
    ]
    found = run.run(config(*overrides), tmp_path)
    assert "least_ways=2" in found["protocol"]["task"]
    logged = {name for row in rows(tmp_path) for name in row}
    assert "diagnostics/task/norm_mean" in logged
    assert "diagnostics/query/norm_mean" not in logged
    sizes = ["evaluation.ways=2", "evaluation.shots=1", "evaluation.queries=3"]
    again = evaluate.evaluate_run(tmp_path, sizes)
    assert (again["protocol"]["ways"], again["protocol"]["shots"]) == (2, 1)
    assert 0 <= again["metrics"]["meta_test/step_1/accuracy"]["mean"] <= 1
    with pytest.raises(ValueError, match="least_ways=2: layers are compared on tasks of one size"):
        reuse.written(tmp_path, [])
    fixed = evaluate.evaluate_run(tmp_path, ["evaluation.least_ways=0", "evaluation.shots=2"])
    assert "least_ways" not in fixed["protocol"]["task"]
    for own, varies in (("0", False), ("3", True), ("null", True)):
        cfg = config(*overrides, f"evaluation.least_ways={own}")
        tasks = build.protocol_sampler(cfg, build.build_protocol(cfg))(jax.random.split(jax.random.key(0), 1))
        assert isinstance(tasks.support[0], Padded) == varies
        assert not varies or tasks.support[0].ways.min() >= (3 if own == "3" else 2)
    with pytest.raises(ValueError, match="evaluation.ways=2: training has task.ways=3; make them equal"):
        evaluate.evaluate_run(tmp_path, ["evaluation.least_ways=0", "evaluation.ways=2"])


def brightness(apply):
    """A loss that reports the mean of its inputs."""

    def loss(params, batch, key):
        del key
        return jnp.mean(jnp.square(apply(params, batch[0]))), {"brightness": jnp.mean(batch[0])}

    return loss


@pytest.mark.usefixtures("no_pictures")
def test_training_validation_and_test_see_the_classes_of_their_splits_alone(tmp_path):
    shades = {"meta_train": 51, "meta_valid": 102, "meta_test": 204}
    for split, shade in shades.items():
        names = [f"{split}{i}" for i in range(2)]
        for name in names:
            (tmp_path / "images" / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
        (tmp_path / "images" / f"{split}.txt").write_text("\n".join(names) + "\n")
    overrides = [
        *("task=image_folder", f"task.data_dir={tmp_path / 'images'}", "task.image_size=8", "task.channels=1"),
        *("task.ways=2", "task.queries=1", f"+task.cache_dir={tmp_path / 'cache'}", "model.hidden=[8]", "debug=short"),
        *(
            "task.loss._target_=tests.test_run.brightness",
            "evaluation=finn2017",
            "evaluation.steps=1",
            "evaluation.tasks=3",
        ),
        *("trainer.validate_every=2", "trainer.validation_tasks=3", "trainer.meta_batch=2", "algorithm.step_size=0.01"),
    ]
    left = run.run(config(*overrides), tmp_path)
    seen = {name: value for row in rows(tmp_path) for name, value in row.items()}
    seen |= {name: value["mean"] for name, value in left["metrics"].items()}
    names = ("meta_train/query", "meta_train/support", "meta_valid/step_1", "meta_test/step_1")
    found = {name: seen[f"{name}/brightness"] for name in names}
    assert found == pytest.approx({name: shades[name.split("/")[0]] / 255 for name in names}, abs=1e-6)


def test_a_classifier_leaves_accuracies_and_pictures(classifier):
    left = summary(classifier)
    assert {f"meta_test/step_{k}/{m}" for k in range(3) for m in ("loss", "accuracy")} == set(left["metrics"])
    assert left["protocol"]["ways"] == 2
    names = {"episode", "step_loss", "step_accuracy", "training_loss", "training_accuracy"}
    assert {p.stem for p in (classifier / "plots").iterdir()} == names


def test_the_same_protocol_gives_the_same_numbers(classifier, done):
    for directory in (classifier, done[0]):
        again = evaluate_run(directory)
        for key in ("metrics", "protocol", "protocol_hash", "params_sha256", "seed"):
            assert again[key] == summary(directory)[key]
        assert again["step"] == 4


def test_another_protocol_gives_other_numbers_and_another_name(classifier):
    ended = main(str(classifier), "evaluation=strict", "evaluation.tasks=7", "evaluation.queries=3", program=evaluate)
    assert ended.code == 0
    assert ended.err == ""
    (file,) = (classifier / "evaluations").iterdir()
    strict, before = json.loads(file.read_text()), summary(classifier)
    assert strict["protocol_hash"] == file.stem != before["protocol_hash"]
    assert f"protocol {file.stem}" in ended.out
    changed = {"norm": "support", "tasks": 7, "queries": 3}  # the steps are the run's own: it was made for them
    assert strict["protocol"] == before["protocol"] | changed
    assert strict["params_sha256"] == before["params_sha256"]
    assert {v["n"] for v in strict["metrics"].values()} == {7}
    assert summary(classifier) == before


def saved_config(directory: Path):
    return OmegaConf.create(dict(results.saved_config(Checkpoints(directory / "checkpoints"))))


def test_a_protocol_by_name_comes_before_its_keys_and_numbers_are_read_as_hydra_reads_them(classifier):
    cfg = saved_config(classifier)
    keys = ["evaluation.tasks=20", "evaluation.norm=joint", "evaluation.step_size=1e-3"]
    orders = [[*keys, "evaluation=strict"], ["evaluation=strict", *keys]]
    one, other = (evaluate.changed(cfg.copy(), overrides).evaluation for overrides in orders)
    assert one == other
    assert (one.tasks, one.norm, one.step_size, one.queries) == (20, "joint", 0.001, 15)


def test_other_images_are_another_protocol_and_no_rest_of_a_run(classifier, tmp_path):
    """Elsewhere they may lie; with other files or classes numbers do not compare, and nothing goes on."""
    directory, images, moved = (tmp_path / name for name in ("run", "images", "moved"))
    shutil.copytree(classifier, directory)
    shutil.copytree(classifier.parent / "images", moved)
    before = summary(directory)
    assert evaluate_run(directory, [f"task.data_dir={moved}"])["protocol_hash"] == before["protocol_hash"]
    cfg = saved_config(directory)
    cfg.task.data_dir = str(moved)
    assert run.run(cfg, directory)["metrics"] == before["metrics"]
    shutil.copytree(moved, images)
    for name in "abcdefgh":
        shutil.copy(images / name / "0.png", images / name / "8.png")
    other = evaluate_run(directory, [f"task.data_dir={images}"])
    assert other["protocol_hash"] != before["protocol_hash"]
    cfg.task.data_dir = str(images)
    with pytest.raises(ValueError, match=rf"other images or classes were read, from task.data_dir={classifier.parent}"):
        run.run(cfg, directory)
    (moved / "meta_train.txt").write_text("f\ng\nh\n")
    (moved / "meta_test.txt").write_text("a\nb\nc\n")
    cfg.task.data_dir = str(moved)  # the very config of the last run there
    with pytest.raises(ValueError, match="other images or classes were read"):
        run.run(cfg, directory)


def test_lists_of_classes_are_known_by_what_they_say(tmp_path):
    cfg, tasks = config("task=omniglot"), []
    for name, classes in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / name).write_text(f"[meta_train]\n{classes}\n[meta_valid]\nc\n[meta_test]\nd\n")
        cfg.task.class_split = str(tmp_path / name)
        tasks.append(build.build_protocol(cfg).task)
    assert tasks[0] == tasks[1] != tasks[2]


def test_inductive_and_transductive_numbers_differ(classifier):
    norms = [evaluate_run(classifier, [f"evaluation.norm={norm}"])["metrics"] for norm in ("batch", "support")]
    assert norms[0]["meta_test/step_1/loss"] != norms[1]["meta_test/step_1/loss"]


def refusal(directory: Path, override: str) -> str:
    """What `experiments.evaluate` says to an override that it refuses."""
    ended = main(str(directory), override, program=evaluate)
    assert ended.code == 2
    return ended.err


def test_checkpoints_are_chosen_and_several_are_one_named_ensemble(classifier, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(classifier, directory)
    valid = [{"step": 2, "meta_valid/step_2/accuracy": 0.2}, {"step": 4, "meta_valid/step_2/accuracy": 0.1}]
    with (directory / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in valid)
    before, both, best, best_two = (
        evaluate_run(directory, [f"checkpoints={w}"]) for w in ("2", "2,4", "best1", "best2")
    )
    newest = evaluate_run(directory)
    assert (before["step"], newest["step"], best["step"]) == (2, 4, 2)
    assert before["params_sha256"] == best["params_sha256"] != newest["params_sha256"]
    assert before["protocol_hash"] == newest["protocol_hash"] != both["protocol_hash"] == best_two["protocol_hash"]
    assert both["protocol"]["ensemble"] == "mean outputs of meta-steps 2, 4"
    assert both["metrics"] == best_two["metrics"] != newest["metrics"]
    ended = main(str(directory), "checkpoints=2", program=evaluate)
    assert ended.code == 0, ended.err
    assert main(str(directory), "checkpoints=best1", program=evaluate).code == 0
    for name in ("2", "best1"):  # each under its own: a mean over seeds is of those that were chosen alike
        file = directory / "evaluations" / f"{before['protocol_hash']}-{name}.json"
        assert json.loads(file.read_text())["metrics"] == before["metrics"]
    assert "[3] cannot be read; there are [2, 4]" in refusal(directory, "checkpoints=3")
    assert "give meta-steps with commas between, or best5; there are [2, 4]" in refusal(directory, "checkpoints=two")
    assert "2 checkpoints in" in refusal(directory, "checkpoints=best3")
    # evaluation.after was another on the way: step 1 alone is in all rows
    valid = [{"step": 2, "meta_valid/step_1/accuracy": 0.3, "meta_valid/step_2/accuracy": 0.9}]
    valid += [{"step": 4, "meta_valid/step_1/accuracy": 0.4}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in valid))
    assert evaluate_run(directory, ["checkpoints=best1"])["step"] == 4


def test_checkpoints_that_were_validated_under_another_protocol_are_not_ranked(classifier, tmp_path, caplog):
    """A run went on with the statistics of the support set: its accuracies are lower, and do not compare."""
    directory = tmp_path / "run"
    shutil.copytree(classifier, directory)
    cfg = saved_config(directory)
    cfg.trainer.steps, cfg.evaluation.norm, cfg.evaluation.tasks = 6, "support", 3
    run.run(cfg, directory)
    valid = [{"step": step, "meta_valid/step_2/accuracy": 1 / step} for step in (2, 4, 6)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in valid))
    assert evaluate_run(directory, ["checkpoints=best1"])["step"] == 6
    assert "those of meta-steps [2, 4] were validated otherwise and are left out" in caplog.text
    assert "best2: 1 checkpoints in" in refusal(directory, "checkpoints=best2")
    # the size of the test is none of the validation's: what is kept then, 6 and 8, is ranked
    cfg.trainer.steps, cfg.evaluation.tasks = 8, 4
    run.run(cfg, directory)
    valid = [{"step": step, "meta_valid/step_2/accuracy": 1 / step} for step in (4, 6, 8)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in valid))
    assert evaluate_run(directory, ["checkpoints=best1"])["step"] == 6


def test_an_evaluation_may_turn_no_images_and_take_other_minibatches(classifier):
    cfg = OmegaConf.create(json.loads((classifier / "summary.json").read_text())["config"])
    assert "rotations=none" in build.build_protocol(cfg).task
    turned = evaluate_run(classifier, ["evaluation.rotations=per_class"])
    assert "rotations=per_class" in turned["protocol"]["task"]
    assert turned["metrics"] != summary(classifier)["metrics"]
    assert "algorithm maml takes the whole support set" in refusal(classifier, "evaluation.batch=2")
    assert "evaluation.batch=0: give a whole number, 1 or more" in refusal(classifier, "evaluation.batch=0")
    assert "give 'none', 'per_class'" in refusal(classifier, "evaluation.rotations=some")
    other = config(*SMALL, "algorithm=fomaml", "+algorithm.batch=3", "evaluation.batch=2")
    with pytest.raises(ValueError, match="algorithm fomaml takes the whole support set"):
        build.evaluation(other, build.learner(other))
    reptile = config(*SMALL, "algorithm=reptile", "optimizer=reptile", "evaluation.batch=2", "task.shots=5")
    protocol, measure = build.evaluation(reptile, learner := build.learner(reptile))
    whole = build.evaluation(config(*SMALL, "algorithm=reptile", "optimizer=reptile", "task.shots=5"), learner)
    assert protocol.batch == 2
    assert protocol.hash != whole[0].hash
    assert measure(learner.state.params)["step_2/loss"] != whole[1](learner.state.params)["step_2/loss"]


@pytest.mark.slow
def test_evaluation_steps_lengthen_the_curve(done):
    directory, _ = done
    curves = [evaluate_run(directory, [f"evaluation.steps={k}"]) for k in (0, 1, 5)]
    assert [len(c["metrics"]) for c in curves] == [1, 2, 6]
    longest = curves[-1]["metrics"]
    assert len({value["mean"] for value in longest.values()}) == 6
    for curve in curves:  # k steps of evaluation: the same first k numbers
        for name, value in curve["metrics"].items():
            assert value["mean"] == pytest.approx(longest[name]["mean"], rel=1e-6)
    assert len({c["protocol_hash"] for c in curves}) == 3


def test_a_run_may_measure_fewer_inner_steps(done, tmp_path):
    whole = summary(done[0])
    means = [whole["metrics"][f"meta_test/step_{step}/loss"]["mean"] for step in range(3)]
    last = run.run(config(*SMALL, "logger=quiet", "evaluation.after=[2]", "trainer.validate_every=4"), tmp_path)
    assert {name: value["mean"] for name, value in last["metrics"].items()} == pytest.approx(
        {"meta_test/step_2/loss": means[2]}
    )
    assert [last[name] == whole[name] for name in ("protocol_hash", "params_sha256", "config")] == [True, True, False]
    assert [n for row in rows(tmp_path) for n in row if n.startswith("meta_valid")] == ["meta_valid/step_2/loss"]
    again = evaluate_run(tmp_path, ["evaluation.after=[0,1]"])
    assert [value["mean"] for value in again["metrics"].values()] == pytest.approx(means[:2])
    assert not again["overrides"]  # no other configuration
    for after, there in (("[0,1]", [0, 1]), ("[2]", [0, 1, 2])):
        assert main(str(tmp_path), f"evaluation.after={after}", program=evaluate).code == 0
        saved = json.loads((tmp_path / "evaluations" / f"{whole['protocol_hash']}.json").read_text())["metrics"]
        assert list(saved) == [f"meta_test/step_{step}/loss" for step in there]
        assert [value["mean"] for value in saved.values()] == pytest.approx([means[step] for step in there])
    with pytest.raises(ValueError, match=r"evaluation.after=3: give a list of inner steps, 0 to 2, or null for all"):
        evaluate_run(tmp_path, ["evaluation.after=3"])


def test_a_run_from_before_there_were_devices_goes_on(done, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(done[0], directory)
    config_of = Checkpoints.config

    def older(self):
        saved = dict(config_of(self))
        return {**saved, "trainer": {k: v for k, v in saved["trainer"].items() if k != "devices"}}

    monkeypatch.setattr(Checkpoints, "config", older)
    assert evaluate_run(directory)["metrics"] == summary(directory)["metrics"]
    (directory / "summary.json").unlink()
    again = run.run(config(*SMALL, "logger=quiet"), directory)
    assert again["params_sha256"] == summary(done[0])["params_sha256"]


def test_more_tasks_begin_with_the_same_ones(done):
    directory, _ = done
    few, more = (evaluate_run(directory, [f"evaluation.tasks={n}"])["metrics"] for n in (1, 150))
    assert few["meta_test/step_0/loss"]["ci95"] is None
    assert more["meta_test/step_0/loss"]["n"] == 150
    assert few["meta_test/step_0/loss"]["mean"] != more["meta_test/step_0/loss"]["mean"]


def test_a_step_size_of_the_evaluation_that_nothing_reads_is_refused():
    cfg = config(*SMALL, "algorithm=meta_sgd")
    with pytest.raises(ValueError, match=r"evaluation.step_size=0.2: algorithm meta_sgd has no step size of its own"):
        evaluate.changed(cfg, ["evaluation.step_size=0.2"])
    assert evaluate.changed(cfg, ["evaluation.step_size=null"]).evaluation.step_size is None
    assert evaluate.changed(config(*SMALL), ["evaluation.step_size=0.2"]).evaluation.step_size == 0.2


def test_one_class_of_evaluation_cannot_change_what_was_trained(classifier):
    for override, message in {
        "model.hidden=[9]": "give evaluation=NAME",
        "evaluation=nothing": "no such protocol; there are finn2017",
        "evaluation.stepz=2": "give evaluation=NAME",
        "evaluation.tasks=many": "many",
        "evaluation.tasks=0": "evaluation.tasks=0: give",
        "evaluation.ways=3": "evaluation.ways=3",
        "evaluation.queries=99": "make shots",
    }.items():
        ended = main(str(classifier), override, program=evaluate)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert ended.err.startswith("error: ")
        assert message in ended.err
    ended = main(str(classifier / "plots"), program=evaluate)
    assert (ended.code, ended.out) == (2, "")
    assert "no checkpoint in" in ended.err
    assert main(program=evaluate).code == 2
    assert main("--help", program=evaluate).code == 0


def test_image_folders_need_no_more_than_the_config_says(classifier):
    data = summary(classifier)["config"]["task"]["data_dir"]
    sampler = image_folder("meta_test", 2, 1, 2, data_dir=data, image_size=8, channels=1)
    assert sampler(jax.random.split(jax.random.key(0), 1)).support[0].shape == (1, 2, 8, 8, 1)


# --- the command line ---


def test_the_config_is_shown_from_any_directory(tmp_path):
    ended = finish(start("--cfg", "job", "trainer.steps=7", "seed=3", cwd=tmp_path))
    assert ended.code == 0
    shown = OmegaConf.create(yaml.safe_load(ended.out))
    assert shown == config("trainer.steps=7", "seed=3")
    assert list(tmp_path.iterdir()) == []  # nothing is run


def test_help_names_the_groups():
    ended = main("--help")
    assert ended.code == 0
    for group in (
        "fomaml, imaml, joint, learned_hyperparameters, linear_probe",
        "model: conv4",
        "omniglot_20way_1shot_conv",
    ):
        assert group in ended.out


@pytest.mark.usefixtures("no_pictures")
def test_a_multirun_from_another_directory(done, tmp_path, monkeypatch):
    """Hydra runs the jobs one after the other in one process: the second is what it is alone."""
    monkeypatch.chdir(tmp_path)
    sweep = ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${seed}"]
    ended = main("-m", *SMALL, *sweep, "seed=1,0")
    assert ended.code == 0
    first, second = (summary(tmp_path / "sweep" / seed) for seed in "10")
    assert (first["seed"], second["seed"]) == (1, 0)
    assert first["params_sha256"] != second["params_sha256"]
    assert {p.name for p in tmp_path.iterdir()} == {"sweep"}
    assert bits(config(*SMALL), tmp_path / "sweep" / "0") == bits(config(*SMALL), done[0])


def test_runs_go_to_outputs_and_multirun_by_date():
    ended = main("--cfg", "hydra", "--package", "hydra")
    hydra = yaml.safe_load(ended.out)
    assert hydra["run"]["dir"] == "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
    assert hydra["sweep"]["dir"] == "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}"
    assert hydra["sweep"]["subdir"] == "${hydra:job.override_dirname}"


def test_a_second_start_compiles_nothing(tmp_path):
    """Programs are kept on disk; a second process reads them, and writes none."""

    def run_once(name: str) -> set[Path]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAML_CACHE", str(tmp_path / "cache"))
            for variable in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
                patch.delenv(variable, raising=False)
            ended = finish(start(*SMALL, "logger=quiet", f"hydra.run.dir={tmp_path / name}"))
        assert ended.code == 0, ended.err
        return {path for path in (tmp_path / "cache" / "xla").rglob("*") if path.name.endswith("-cache")}

    first = run_once("first")
    assert len(first) > 10  # small ones too: JAX keeps by itself what took it a second
    assert run_once("second") == first
    texts = [
        json.loads((tmp_path / name / "summary.json").read_text())["params_sha256"] for name in ("first", "second")
    ]
    assert texts[0] == texts[1]


def test_a_library_that_is_on_the_path_alone_still_gets_its_summary(monkeypatch):
    """A run from a clone that was never installed would fail after its last meta-step."""
    known = importlib.metadata.version

    def version(name):
        if name == "maml-jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert results.versions()["maml"] == "not installed"
    assert results.versions()["jax"] == jax.__version__
