"""Curvature logged during training, and the report on a run: against dense Hessians and gradients taken here."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build, curvature, diagnose, pictures, run
from maml import train
from maml.curvature import hessian, paths, update_singular_values
from maml.inner_loop import unroll
from maml.losses import mse, semi_gradient, td0
from maml.random import keys_for
from maml.types import as_argument
from tests.programs import SMALL, config, main, restored, rows, summary

pytestmark = pytest.mark.usefixtures("compiled_once")

ON = (
    *("diagnostics.curvature.every=2", "diagnostics.curvature.tasks=3", "diagnostics.curvature.lanczos=30"),
    *("algorithm.steps=2", "algorithm.step_size=0.1", "model.kernel_init.stddev=0.5"),
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    directory = tmp_path_factory.mktemp("done") / "run"
    ended = main(*SMALL, *ON, f"hydra.run.dir={directory}")
    assert ended.code == 0, ended.err
    return directory


@pytest.fixture(scope="module")
def known(done):
    """By hand at the last checkpoint: gradients by order, and the largest eigenvalues and first steps of the tasks."""
    cfg = config(*SMALL, *ON)
    learner, state = build.learner(cfg), restored(cfg, done).state
    tasks = learner.sampler(keys_for(state.key, "diagnostics/curvature", 4, 3))
    flat, unravel = jax.flatten_util.ravel_pytree(state.params)
    loss, gradients, eigenvalues, kappas = mse(learner.apply), {}, [], []
    names = [name.rpartition("/")[0] for name, x in paths(state.params).items() for _ in range(x.size)]
    blocks = {layer: [i for i, name in enumerate(names) if name == layer] for layer in names}
    of_layers = {layer: [] for layer in blocks}
    for name in ("reverse", "first_order"):
        objective = build.build_objective(build.with_derivative(cfg, name), loss)

        def mean(x, objective=objective):
            each = [
                objective(unravel(x), jax.tree.map(lambda t, i=i: t[i], tasks), jax.random.key(0), 0)[0]
                for i in range(3)
            ]
            return jnp.stack(each).mean()

        gradients[name] = np.asarray(jax.jit(jax.grad(mean))(flat), np.float64)
    for i in range(3):
        support = jax.tree.map(lambda t, i=i: t[i], tasks.support)

        def f(x, support=support):
            return loss(unravel(x), support, jax.random.key(0))[0]

        matrix, g = (np.asarray(jax.jit(d(f))(flat), np.float64) for d in (jax.hessian, jax.grad))
        eigenvalues.append(np.linalg.eigvalsh(matrix)[-1])
        for layer, at in blocks.items():
            of_layers[layer].append(np.linalg.eigvalsh(matrix[np.ix_(at, at)])[-1])
        kappas.append(g @ matrix @ g / (g @ g))
    return gradients, np.array(eigenvalues), np.array(kappas), {k: np.array(v) for k, v in of_layers.items()}


def last(directory) -> dict:
    found = [row for row in rows(directory) if "diagnostics/curvature/first_order_cosine" in row]
    assert [row["step"] for row in found] == [2, 4]
    return {k.removeprefix("diagnostics/curvature/"): v for k, v in found[-1].items()}


def test_the_logged_numbers_are_those_of_dense_matrices(done, known):
    gradients, eigenvalues, kappas, _ = known
    full, cut = gradients["reverse"], gradients["first_order"]
    logged = last(done)
    assert logged["stable_step_size_min"] == pytest.approx(2 / eigenvalues.max(), rel=1e-4)
    assert logged["stable_step_size_median"] == pytest.approx(np.median(2 / eigenvalues), rel=1e-4)
    assert logged["beyond_stable"] == pytest.approx((2 / eigenvalues < 0.1).mean())
    assert logged["step_1/curvature"] == pytest.approx(kappas.mean(), rel=1e-3)
    cosine = full @ cut / np.linalg.norm(full) / np.linalg.norm(cut)
    assert cosine < 0.9999
    assert logged["first_order_cosine"] == pytest.approx(cosine, rel=1e-4)
    assert logged["first_order_norm_ratio"] == pytest.approx(np.linalg.norm(cut) / np.linalg.norm(full), rel=1e-4)


def test_it_changes_no_bit_of_the_run(done, tmp_path):
    run.run(config(*SMALL, *ON, "diagnostics.curvature.every=0", "logger=quiet"), tmp_path)
    assert summary(tmp_path)["params_sha256"] == summary(done)["params_sha256"]


def test_the_report_of_a_run(done, known):
    gradients, eigenvalues, _, of_layers = known
    ended = main(f"run={done}", "diagnostics.per_example.tasks=3", program=diagnose)
    assert ended.code == 0, ended.err
    text = (done / "diagnosis" / "report.md").read_text()
    assert text in ended.out
    report = json.loads((done / "diagnosis" / "report.json").read_text())
    assert report["meta_step"] == 4
    assert report["left_out"] == []
    for name, (title, _) in diagnose.SECTIONS.items():
        if name in ("solve", "learned"):  # of other algorithms
            continue
        assert f"## {title}" in text
        assert name in report
    for name in ("spectra", "first_order", "path"):
        assert f"![{name}]({name}.png)" in text
        assert (done / "diagnosis" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [row["meta_step"] for row in report["first_order"]] == [2, 4]
    assert report["first_order"][-1]["cosine"] == pytest.approx(last(done)["first_order_cosine"], rel=1e-5)
    before = next(row for row in report["spectra"] if row["loss"] == "support/before")
    assert before["largest"] == pytest.approx(eigenvalues.mean(), rel=1e-4)
    np.testing.assert_allclose(report["stable_step_size"]["step_size"], 2 / eigenvalues, rtol=1e-4)
    assert [row["step"] for row in report["path"]] == [1, 2]
    layers = {row["layer"]: row["step_size"] for row in report["stable_step_size_of_layers"]}
    assert layers == pytest.approx({layer: np.median(2 / values) for layer, values in of_layers.items()}, rel=1e-4)


def test_a_damaged_checkpoint_is_left_out_of_the_report(done, tmp_path, caplog):
    shutil.copytree(done, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "2").rglob("*"):
        if path.is_file() and "meta" not in path.parts:
            path.write_bytes(b"")
    cfg, learner, kept, logged = diagnose.load(tmp_path / "run", ["diagnostics.curvature.tasks=3"])
    assert list(kept) == [4]
    assert "damaged, skipped" in caplog.text
    rows = diagnose._curvature(cfg, learner, kept, logged)[0]["first_order"]
    assert [row["meta_step"] for row in rows] == [2, 4]  # what was logged is there
    null = {"step": 3, "diagnostics/curvature/first_order_cosine": None}
    found = diagnose._first_order([*logged, null])  # JSON's NaN
    assert np.isnan(found[3]["cosine"])
    assert found[2]["cosine"] == rows[0]["cosine"]
    assert set(rows[0]) == {"meta_step", "cosine", "norm_ratio"}


def test_what_the_report_refuses(done, tmp_path):
    for arguments, message in (
        ([f"run={tmp_path}"], "no checkpoint in"),
        ([str(done), "trainer.steps=5"], "trainer.steps=5: give diagnostics"),
        ([str(done), "diagnostics.curvature.task=5"], "diagnostics.curvature.task=5: give diagnostics"),
        ([str(done), "diagnostics.curvature.every=5"], "diagnostics.curvature.every=5: give diagnostics"),
    ):
        ended = main(*arguments, program=diagnose)
        assert ended.code == 2
        assert message in ended.err
        assert ended.err.count("\n") == 1


def test_curvature_needs_an_inner_loop_that_follows_a_gradient(tmp_path):
    ended = main(*SMALL, "algorithm=joint", "diagnostics.curvature.every=2", f"hydra.run.dir={tmp_path / 'joint'}")
    assert ended.code == 2
    assert "algorithm joint takes no inner steps; set every=0" in ended.err
    cfg = config(*SMALL, "diagnostics.curvature.lanczos=10000")
    learner = build.learner(cfg)
    with pytest.raises(ValueError, match="k=10000: there are"):
        curvature.callback(cfg, learner, [])
    for field in (semi_gradient(lambda p, t, b, k: (jnp.zeros(()), {})), td0(learner.apply, target="stop")):  # noqa: ARG005
        with pytest.raises(ValueError, match="semi-gradient"):
            curvature.measurement(cfg, learner.__class__(**{**vars(learner), "loss": field}))
    tasks = learner.sampler(jax.random.split(jax.random.key(0), 1))
    with pytest.raises(ValueError, match="moves no parameter"):
        curvature.moved_names(unroll(optax.sgd(0.0), 1), learner.loss, learner.state.params, tasks, jax.random.key(0))


def test_a_parameter_that_an_exact_zero_keeps_still_is_one_that_moves():
    """A head of zeros: at the start no gradient reaches the body, and one meta-step later it does."""
    learner = build.learner(config(*SMALL))
    params = jax.tree.map(jnp.zeros_like, learner.state.params)
    tasks = learner.sampler(jax.random.split(jax.random.key(0), 1))
    adapt = curvature.inner_loop(config(*SMALL))
    assert curvature.moved_names(adapt, learner.loss, params, tasks, learner.state.key) == tuple(paths(params))


def test_spectra_are_those_over_what_the_inner_loop_moves():
    """The head's 9 parameters of 97 (a plain mask would leave 88 eigenvalues of zero), with more Lanczos steps than that."""
    cfg = config(*SMALL, *ON, "algorithm=anil", "diagnostics.curvature.tasks=2")
    learner = build.learner(cfg)
    params, key = learner.state.params, learner.state.key
    tasks, adapt = learner.sampler(keys_for(key, "diagnostics/curvature", 0, 2)), curvature.inner_loop(cfg)
    moved = curvature.moved_names(adapt, learner.loss, params, tasks, key)
    found = curvature.moved_spectra(adapt, learner.loss, params, tasks, key, moved, 30)["support/before"].values
    measured = curvature.measurement(cfg, learner)(params, as_argument(learner.sampler), key, jnp.int32(0))
    assert found.shape == (2, 9)
    assert set(moved) == {"head/kernel", "head/bias"}
    for i in range(2):
        support = jax.tree.map(lambda x, i=i: x[i], tasks.support)
        dense = hessian(lambda p, s=support: learner.loss(p, s, key)[0], params).block("^head/")
        eigenvalues = np.linalg.eigvalsh(np.asarray(dense))
        np.testing.assert_allclose(found[i], eigenvalues, rtol=1e-3, atol=1e-5)
        assert measured.stable.step_size[i] == pytest.approx(2 / eigenvalues[-1], rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("algorithm=fomaml", "algorithm.step_size=0.1"), marks=pytest.mark.slow),
        ("algorithm=meta_sgd",),
    ],
)
def test_the_meta_hessian_and_the_update_are_those_of_dense_matrices(overrides):
    """The Hessian is that of the whole objective, also of a first-order algorithm, the update that of the model's parameters."""
    cfg = config(*SMALL, *overrides, "algorithm.steps=2", "model.hidden=[3]", "model.kernel_init.stddev=0.5")
    learner = build.learner(cfg)
    state = learner.state
    tasks = learner.sampler(keys_for(state.key, "any", 0, 2))
    at = cfg, learner.loss, state.params, tasks, state.key
    flat, unravel = jax.flatten_util.ravel_pytree(state.params)
    exact = build.with_derivative(cfg, "reverse")
    objective, adapt = build.build_objective(exact, learner.loss), build.inner_loop(exact)
    each = [jax.tree.map(lambda x, i=i: x[i], tasks) for i in range(2)]

    def mean(x):
        return sum(objective(unravel(x), task, state.key, 0)[0] for task in each) / 2

    dense = np.linalg.eigvalsh(np.asarray(jax.jit(jax.hessian(mean))(flat), np.float64))
    found = curvature.meta_spectrum(*at, jnp.int32(0), k=flat.size)
    assert found.values[-1] == pytest.approx(dense[-1], rel=1e-4)
    assert found.values[0] == pytest.approx(dense[0], rel=1e-3)
    model = getattr(state.params, "params", state.params)

    def update(loss, p, support, key):
        return adapt(loss, state.params._replace(params=p) if model is not state.params else p, support, key)

    for task, ours in zip(each, curvature.update_values(*at, k=10), strict=True):
        values = update_singular_values(update, learner.loss, model, task.support, state.key)
        np.testing.assert_allclose(ours[:3], values[:3], rtol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), 0.1),
        (("algorithm=reptile", "optimizer=reptile"), None),
        (("algorithm=meta_sgd",), None),
        # a step size that it does not read
        (("experiment=td0_value_prediction", "algorithm=learned_hyperparameters"), None),
        (("algorithm.adapt.adapt.optimizer.learning_rate=0.1",), None),
        # other bounds: 2 (1 + β)/λmax, and 2/(λmax + λ)
        (("+algorithm.adapt.adapt.optimizer.momentum=0.9",), None),
        (("+algorithm.adapt.adapt.optimizer.momentum=null",), 0.1),
        (("algorithm=imaml",), None),
    ],
)
def test_the_bound_is_compared_with_the_step_size_of_sgd_alone(overrides, size):
    own = ["algorithm.step_size=0.1"] if size else []
    assert curvature.sgd_step_size(config(*SMALL, *own, *overrides)) == size


@pytest.mark.slow
def test_of_imaml_there_is_the_update_and_no_meta_hessian():
    """∂θ_K/∂θ₀ of the proximal optimum is (I + H/λ)⁻¹: its largest singular value from the dense Hessian there."""
    small = ("model.hidden=[3]", "model.kernel_init.stddev=0.5", "algorithm.cg_steps=30", "algorithm.steps=400")
    cfg = config(*SMALL, "algorithm=imaml", "algorithm.step_size=0.05", *small)
    learner = build.learner(cfg)
    state = learner.state
    tasks = learner.sampler(keys_for(state.key, "any", 0, 1))
    found = curvature.update_values(cfg, learner.loss, state.params, tasks, state.key, k=10)[0]
    task = jax.tree.map(lambda x: x[0], tasks)
    optimum = build.inner_loop(cfg)(learner.loss, state.params, task.support, state.key).params
    matrix = np.asarray(hessian(lambda p: learner.loss(p, task.support, state.key)[0], optimum).values)
    expected = np.sort(1 / np.abs(1 + np.linalg.eigvalsh(matrix) / cfg.algorithm.strength))[::-1]
    np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-3)

    # Damping is of the solve alone: the optimum is the same.
    cfg = config(*SMALL, "algorithm=imaml", "algorithm.step_size=0.05", "algorithm.damping=0.5", *small)
    left = curvature.solve_residuals(cfg, learner.loss, state.params, tasks, state.key, list(paths(state.params)))[0]
    assert left.shape == (31,)
    v = jax.flatten_util.ravel_pytree(jax.grad(lambda p: learner.loss(p, task.query, state.key)[0])(optimum))[0]
    system, v = matrix + (cfg.algorithm.strength + 0.5) * np.eye(len(v)), np.asarray(v)
    first = (v @ v) / (v @ system @ v) * v
    assert left[0] == pytest.approx(1)
    assert left[1] == pytest.approx(np.linalg.norm(system @ first - v) / np.linalg.norm(v), rel=1e-3)
    assert left[-1] < 1e-4
    with pytest.raises(ValueError, match="has no derivative of its own"):
        curvature.meta_spectrum(cfg, learner.loss, state.params, tasks, state.key, jnp.int32(0), k=2)
    reptile = config(*SMALL, "algorithm=reptile_sgd", "optimizer=reptile")
    for measure in (curvature.update_values, lambda *at: curvature.meta_spectrum(*at[:-1], jnp.int32(0), at[-1])):
        with pytest.raises(ValueError, match="algorithm reptile_sgd"):
            measure(reptile, learner.loss, state.params, tasks, state.key, 2)


def test_a_report_leaves_out_what_there_is_not(tmp_path):
    run.run(config(*SMALL, "algorithm=joint", "logger=quiet"), tmp_path)
    report = diagnose.diagnose(*diagnose.load(tmp_path, ["diagnostics.per_example.tasks=2"]))
    assert "takes no inner steps" in report["left_out"][0]
    assert "gradients" in report
    assert "path" not in report
    assert "Left out: diagnostics.curvature" in diagnose.markdown(report, [])


def begun(*overrides):
    """A run before its first meta-step, as `diagnose` takes it."""
    cfg = config(
        *overrides,
        "diagnostics.curvature.lanczos=5",
        "diagnostics.curvature.tasks=2",
        "diagnostics.per_example.tasks=2",
    )
    learner = build.learner(cfg)
    return cfg, learner, {0: train.begin(learner.state, learner.step, learner.sampler)}


def test_the_report_of_imaml_has_its_solve_and_that_of_maml_none():
    solve = ("algorithm.steps=3", "algorithm.cg_steps=2", "algorithm.damping=0.5")
    report, _ = diagnose._curvature(*begun(*SMALL, "algorithm=imaml", *solve), [])
    assert [row["step"] for row in report["solve"]] == [0, 1, 2]
    assert report["solve"][0]["largest"] == pytest.approx(1)
    assert 0 < report["solve"][2]["median over tasks"] < 1
    assert diagnose._learned(*begun(*SMALL, "algorithm=imaml", *solve), []) == ({}, {})


def test_the_solve_of_a_strength_that_a_node_makes_is_that_of_the_number():
    def left(strength):
        solve = ("algorithm.steps=3", "algorithm.cg_steps=2", "algorithm.damping=0.5", f"algorithm.strength={strength}")
        cfg, learner, kept = begun(*SMALL, "algorithm=imaml", *solve)
        _, *at = diagnose._at(cfg, learner, kept[0].state)
        return curvature.solve_residuals(cfg, *at, moved=list(paths(kept[0].state.params)))

    np.testing.assert_allclose(left("{_target_:jax.numpy.asarray,_args_:[2.0]}"), left(2.0), rtol=1e-4)


def test_the_report_shows_what_the_inner_loop_has_learned():
    """At the start, where all step sizes are 0.1."""
    per_step = ("algorithm.adapt.adapt.per=tensor", "algorithm.adapt.adapt.per_step=true", "algorithm.steps=2")
    cfg, learner, kept = begun(*SMALL, "algorithm=meta_sgd", "algorithm.initial_step_size=0.1", *per_step)
    report, _ = diagnose._learned(cfg, learner, kept, [])
    rows = {row["name"]: row for row in report["learned"]}
    assert set(rows) == set(paths(learner.state.params.params))
    for row in rows.values():
        assert row["values"] == "0.1, 0.1"
        assert row["smallest"] == row["largest"] == pytest.approx(0.1)
    text = diagnose.markdown({"algorithm": "meta_sgd", "meta_step": 0, "left_out": []} | report, [])
    assert "## Learned by the inner loop" in text


def test_the_report_says_that_examples_are_left_out():
    report, _ = diagnose._per_example(*begun("experiment=td0_value_prediction", "debug=short"), [])
    assert "gradients" in report
    assert "worst_query" not in report
    assert report["left_out"][0].startswith("gradients of single examples")
