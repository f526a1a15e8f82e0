"""What is logged during training is what the parameters of the moment give, and it changes no bit of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import build, curvature, diagnostics, pictures, run
from maml import train
from maml.random import keys_for
from maml.tasks import images
from maml.tasks.episodes import ClassImages
from maml.tasks.splits import read_split
from maml.types import as_argument
from tests.programs import SMALL, config, main, metrics_bytes, restored, rows, summary

pytestmark = pytest.mark.usefixtures("compiled_once")

ON = ("diagnostics.per_example.every=2", "diagnostics.per_example.tasks=3", "diagnostics.per_example.outliers=4")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with the diagnostics on, and how it ended."""
    directory = tmp_path_factory.mktemp("done") / "run"
    return directory, main(*SMALL, *ON, f"hydra.run.dir={directory}")


def quick(directory, *overrides: str) -> dict:
    directory.mkdir(parents=True, exist_ok=True)
    return run.run(config(*SMALL, "logger=quiet", *overrides), directory)


def logged(directory, name: str) -> dict:
    """Step -> value."""
    return {row["step"]: row[name] for row in rows(directory) if name in row}


def test_the_numbers_are_those_of_the_saved_parameters(done):
    directory, ended = done
    assert ended.code == 0, ended.err
    cfg = config(*SMALL, *ON)
    learner, state = build.learner(cfg), restored(cfg, directory).state
    tasks = learner.sampler(keys_for(state.key, "diagnostics/tasks", 4, 3))
    objective, found = build.build_objective(cfg, learner.loss), []
    for i in range(3):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        gradient = jax.grad(lambda p, task=task: objective(p, task, jax.random.key(0), 0)[0])(state.params)
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)]).astype(np.float64))
    found = np.stack(found)
    trace = found.var(0, ddof=1).sum()
    signal = (found.mean(0) ** 2).sum() - trace / 3
    at = lambda name: logged(directory, f"diagnostics/task/{name}")[4]  # noqa: E731
    assert at("norm_max") == pytest.approx(np.linalg.norm(found, axis=1).max(), rel=1e-4)
    assert at("noise_trace") == pytest.approx(trace, rel=1e-4)
    assert at("noise_signal") == pytest.approx(signal, rel=1e-3, abs=1e-4 * trace)
    assert at("noise_resolved") == (signal > 0)
    assert at("noise_scale") == (pytest.approx(trace / signal, rel=1e-2) if signal > 0 else None)


def test_json_lines_hold_scalars_histograms_and_tables(done):
    directory, _ = done
    for name in ("task/coherence", "task/layer/layers/0/gsnr", "query/norm_max", "support/influence_max"):
        assert list(logged(directory, f"diagnostics/{name}")) == [2, 4]
    for name, count in (("task/cosine", 3), ("task/log10_norm", 3), ("query/cosine", 15), ("support/influence", 15)):
        for histogram in logged(directory, f"diagnostics/histogram/{name}").values():
            assert sum(histogram["counts"]) == count
            assert len(histogram["bins"]) == len(histogram["counts"]) + 1
    table = logged(directory, "diagnostics/outliers/query")[4]
    assert [set(row) for row in table] == [{"task", "index", "norm", "cosine", "loss"}] * 4
    norms = [row["norm"] for row in table]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] == logged(directory, "diagnostics/query/norm_max")[4]
    worst = logged(directory, "diagnostics/outliers/support")[4][0]
    assert worst["influence"] == logged(directory, "diagnostics/support/influence_max")[4]


def test_tensorboard_holds_them_too(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, _ = done
    events = EventAccumulator(str(directory / "tensorboard"), {"histograms": 0, "tensors": 0})  # all of them
    events.Reload()
    assert [e.step for e in events.Scalars("diagnostics/task/layer/layers/0/norm")] == [2, 4]
    assert [e.step for e in events.Histograms("diagnostics/histogram/query/cosine")] == [2, 4]
    text = events.Tensors("diagnostics/outliers/query/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("| task | index | norm | cosine | loss |\n| --- ")
    assert len(text.splitlines()) == 6


def test_the_console_shows_no_layers(done):
    _, ended = done
    assert "diagnostics/task/coherence" in ended.err
    assert "/layer/" not in ended.err


def test_the_program_of_training_is_the_same_with_and_without(done, tmp_path):
    def text(cfg):
        learner = build.learner(cfg)
        progress = train.begin(learner.state, learner.step, learner.sampler)
        loop = train.compile_loop(learner.step)
        return loop.lower(progress, as_argument(learner.sampler), jnp.int32(1)).as_text()

    assert text(config(*SMALL)) == text(config(*SMALL, *ON, "diagnostics.curvature.every=1"))
    directory, _ = done
    assert quick(tmp_path)["params_sha256"] == summary(directory)["params_sha256"]
    off = config(*SMALL)
    assert diagnostics.callbacks(off, build.learner(off), []) == []


def test_a_resumed_run_logs_the_same(tmp_path):
    each = "diagnostics.per_example.every=1"
    quick(tmp_path / "whole", each)
    quick(tmp_path / "halves", each, "trainer.steps=2")
    quick(tmp_path / "halves", each)
    assert metrics_bytes(tmp_path / "halves") == metrics_bytes(tmp_path / "whole")


def test_learned_step_sizes_are_logged_as_they_are_saved(tmp_path):
    """One for each step: an array; one for the loop: a number, and in the first meta-step Adam moves it by its learning rate."""
    by = ("algorithm=meta_sgd", "algorithm.steps=2", "diagnostics.learned.every=1")
    quick(tmp_path / "step", *by, "algorithm.adapt.adapt.per=loop", "algorithm.adapt.adapt.per_step=true")
    cfg = config(*SMALL, *by, "algorithm.adapt.adapt.per=loop", "algorithm.adapt.adapt.per_step=true")
    sizes = np.ravel(jax.tree.leaves(restored(cfg, tmp_path / "step").state.params.inner))
    assert len(set(sizes)) == 2
    for end, value in (("smallest", sizes.min()), ("mean", sizes.mean()), ("largest", sizes.max())):
        seen = logged(tmp_path / "step", f"diagnostics/learned/value/{end}")
        assert list(seen) == [1, 2, 3, 4]
        assert seen[4] == pytest.approx(value, rel=1e-6)
    quick(tmp_path / "loop", *by, "algorithm.adapt.adapt.per=loop", "algorithm.initial_step_size=0.1")
    moved = logged(tmp_path / "loop", "diagnostics/learned/value")[1] - 0.1
    assert abs(moved) == pytest.approx(cfg.optimizer.learning_rate, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["maml", "reptile", "joint"])
def test_what_learns_nothing_else_has_nothing_to_log(algorithm, tmp_path):
    chosen = (f"algorithm={algorithm}", *(["optimizer=reptile"] if algorithm == "reptile" else []))
    ended = main(*SMALL, *chosen, "diagnostics.learned.every=2", f"hydra.run.dir={tmp_path}")
    assert ended.code == 2
    assert ended.err.startswith(f"error: diagnostics.learned: algorithm {algorithm} learns nothing beside the model's")


class Kept:
    """A logger that keeps everything."""

    def __init__(self):
        self.metrics, self.images = {}, {}

    def __call__(self, step, metrics):
        del step
        self.metrics |= metrics

    def image(self, tag, picture, step):
        self.images[tag] = (picture, step)


def look(*overrides: str) -> Kept:
    """The diagnostics before the first step."""
    cfg, kept = config(*overrides, *ON), Kept()
    learner = build.learner(cfg)
    ((every, callback),) = diagnostics.callbacks(cfg, learner, [kept])
    assert every == 2
    callback(train.begin(learner.state, learner.step, learner.sampler))
    return kept


def test_influence_is_there_under_first_order_too():
    exact, first = look(*SMALL), look(*SMALL, "algorithm=fomaml")
    name = "diagnostics/support/influence_max"
    assert exact.metrics[name] == pytest.approx(first.metrics[name], rel=1e-3)
    assert exact.metrics[name] != 0
    assert exact.images == {}


def measured(part, *overrides: str):
    """The config, the learner, and what a part of the diagnostics sees before the first step."""
    cfg = config(*SMALL, *overrides)
    learner = build.learner(cfg)
    state = learner.state
    seen = part.measurement(cfg, learner)(state.params, as_argument(learner.sampler), state.key, state.step)
    return cfg, learner, seen


def test_before_the_order_is_annealed_what_is_exact_is_exact():
    cfg = config(*SMALL, "+algorithm.first_order_until=1000", "algorithm.steps=3", "algorithm.step_size=0.05")
    learner = build.learner(cfg)
    task = jax.tree.map(lambda x: x[0], learner.sampler(jax.random.split(jax.random.key(1), 1)))
    at = learner.state.params, task, jax.random.key(2), jnp.zeros((), jnp.int32)
    for name in ("reverse", "first_order"):
        one, plain = (
            jax.grad(build.build_objective(build.with_derivative(c, name), learner.loss), has_aux=True)(*at)[0]
            for c in (cfg, config(*SMALL, "algorithm.steps=3", "algorithm.step_size=0.05"))
        )
        jax.tree.map(np.testing.assert_array_equal, one, plain)
    seen = curvature.measurement(cfg, learner)(learner.state.params, as_argument(learner.sampler), *at[2:])
    assert seen.comparison.norm_ratio != 1


def test_what_reptile_carries_is_no_gradient_and_its_queries_have_none():
    """Adam's counter moves by the number of inner steps, alike in all tasks: it would be nearly all of every number."""
    cfg, learner, seen = measured(diagnostics, "algorithm=reptile", "optimizer=reptile")
    state = learner.state
    assert seen.queries is None
    tasks = learner.sampler(keys_for(state.key, "diagnostics/tasks", state.step, 8))
    keys = keys_for(state.key, "diagnostics/objective", state.step, 8)
    objective = build.build_objective(cfg, learner.loss)
    pairs = [jax.tree.map(lambda x, i=i: x[i], (tasks, keys)) for i in range(8)]
    gradients = [jax.grad(objective, has_aux=True)(state.params, *pair, state.step)[0] for pair in pairs]
    norms = [np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(one.params))) for one in gradients]
    np.testing.assert_allclose(seen.norms, norms, rtol=1e-5)
    assert max(norms) < 1 < np.abs(jax.tree.leaves(gradients[0].inner)[0]).max()
    _, metrics = jax.jit(learner.step)(state, as_argument(learner.sampler))
    assert metrics["gradient_norm"] < 1


def test_what_has_a_derivative_of_its_own_is_not_compared_with_first_order():
    cfg, _, seen = measured(curvature, "algorithm=imaml", "algorithm.steps=2")
    assert seen.comparison is None
    assert not [name for name in curvature.scalars(cfg, seen) if "first_order" in name]


def test_a_step_size_in_factors_is_not_compared_with_that_of_the_weights():
    assert curvature.sgd_step_size(config(*SMALL, "algorithm=lora")) is None
    assert curvature.sgd_step_size(config(*SMALL)) == 0.001


def test_of_images_the_worst_are_shown(monkeypatch):
    names = sum(read_split("finn"), ())
    counts = np.full(len(names), 20, np.int32)
    drawn = np.random.default_rng(0).integers(0, 255, (20, 28, 28, 1), np.uint8)
    data = ClassImages(np.tile(drawn, (len(names), 1, 1, 1)), np.cumsum(counts, dtype=np.int32) - counts, counts)
    monkeypatch.setattr(images, "tfds_images", lambda *_, **__: (data, names))
    kept = look("task=omniglot", "model=mlp_batch_norm", "model.hidden=[8]", "evaluation=finn2017", "paper=null")
    assert set(kept.images) == {"diagnostics/outliers/query", "diagnostics/outliers/support"}
    for figure, _ in kept.images.values():
        titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
        assert len(titles) == 4
        assert titles[0].startswith("task ")
    assert kept.metrics["diagnostics/query/norm_max"] > 0


@pytest.mark.parametrize(
    ("override", "words"), [("per_example.tasks=1", "2 or more"), ("per_example.every=-1", "0 or more")]
)
def test_bad_numbers_are_refused(override, words, tmp_path):
    ended = main(*SMALL, f"diagnostics.{override}", f"hydra.run.dir={tmp_path}")
    assert ended.code == 2
    assert ended.err.startswith(f"error: diagnostics.{override}: give a whole number, {words}")
