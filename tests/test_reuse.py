"""The report on feature reuse: against the run's own evaluation, frozen layers and outputs made by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import build, pictures, reuse
from maml.evaluate import evaluate
from maml.inner_loop import only, unroll
from maml.losses import td0
from maml.models import blocks
from maml.random import keys_for
from maml.types import Transitions
from tests.programs import SMALL, config, main, restored, summary

pytestmark = pytest.mark.usefixtures("compiled_once")

ON = (*SMALL, "algorithm.step_size=0.05", "model.kernel_init.stddev=0.5")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run, its report and what the program printed."""
    directory = tmp_path_factory.mktemp("done") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", lambda *_: {})
        patch.setattr(pictures, "training_curves", lambda *_: {})
        ended = main(*ON, f"hydra.run.dir={directory}")
    assert ended.code == 0, ended.err
    ended = main(f"run={directory}", "tasks=3", "queries=40", program=reuse)
    assert ended.code == 0, ended.err
    return directory, json.loads((directory / "reuse" / "reuse.json").read_text()), ended.out


@pytest.fixture(scope="module")
def learner():
    return build.learner(config(*ON))


def test_the_report_has_all_layers_in_order(done, learner):
    directory, report, out = done
    inputs = jax.ShapeDtypeStruct((5, 1), jnp.float32)
    layers = list(blocks(build.build_module(config(*ON), learner.sampler, jax.random.key(0)), inputs))
    assert [row["layer"] for row in report["similarity"]] == layers
    assert [(row["positions"], row["features"]) for row in report["similarity"]] == [(40, 8), (40, 8), (40, 1)]
    assert [row["frozen"] for row in report["frozen"]] == [0, 1, 2, 3]
    assert [row["last_frozen"] for row in report["frozen"]] == [None, *layers]
    assert report["meta_step"] == 4
    text = (directory / "reuse" / "reuse.md").read_text()
    assert text in out
    for name in ("similarity", "frozen"):
        assert f"![{name}]({name}.png)" in text
        assert (directory / "reuse" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_none_frozen_is_the_run_and_all_frozen_is_its_start(done):
    directory, report, _ = done
    left = summary(directory)
    assert report["protocol_hash"] == left["protocol_hash"]
    for row, step in ((report["frozen"][0], 2), (report["frozen"][-1], 0)):
        expected = left["metrics"][f"meta_test/step_{step}/loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert len({row["loss"]["mean"] for row in report["frozen"]}) == 4


def test_frozen_layers_are_those_that_only_would_leave(done, learner):
    directory, report, _ = done
    row, cfg = report["frozen"][2], config(*ON)
    layers = tuple(f"{row['layer']}/" for row in report["similarity"][:2])
    adapt = only(lambda path, _: not "/".join(map(str, path)).startswith(layers), unroll(optax.sgd(0.05), 2))
    protocol, params = build.build_protocol(cfg), restored(cfg, directory).state.params
    result = evaluate(params, build.protocol_sampler(cfg, protocol), learner.loss, adapt, protocol)
    assert row["loss"]["mean"] == pytest.approx(result["step_2/loss"].mean, rel=1e-5)


def test_the_similarity_of_outputs_is_their_correlation(done, learner):
    """The last layer has one feature, and its outputs are the predictions."""
    directory, report, _ = done
    cfg = config(*ON)
    params = restored(cfg, directory).state.params
    protocol = build.build_protocol(cfg, queries=40)
    keys = jax.vmap(jax.random.split, (0, None))(keys_for(jax.random.key(0), "meta_test", 0, 3), 3)[:, 0]
    tasks = build.protocol_sampler(cfg, protocol)(keys)
    gradient, found = jax.jit(jax.grad(lambda p, b: learner.loss(p, b, jax.random.key(0))[0])), []
    for i in range(3):
        support, query = jax.tree.map(lambda x, i=i: x[i], tasks)
        adapted = params
        for _ in range(2):
            adapted = jax.tree.map(lambda p, g: p - 0.05 * g, adapted, gradient(adapted, support))
        before, after = (np.asarray(learner.apply(p, query[0]), np.float64)[:, 0] for p in (params, adapted))
        found.append(abs(np.corrcoef(before, after)[0, 1]))
    last = report["similarity"][-1]
    assert last["cca"]["mean"] == pytest.approx(np.mean(found), rel=1e-4)
    assert last["cka"]["mean"] == pytest.approx(np.mean(np.square(found)), rel=1e-4)
    assert last["cca"]["n"] == 3


def test_of_too_few_examples_cca_is_left_out(done):
    directory, _, _ = done
    cfg, learner, found = reuse.load(directory)
    (params,) = found.values()
    rows = reuse.similarity(cfg, learner, params, build.build_protocol(cfg, tasks=2, queries=5))
    assert [row["cca"]["mean"] is None for row in rows] == [True, True, False]
    assert all(0 < row["cka"]["mean"] <= 1.0001 for row in rows)
    assert reuse._cell(rows[0]["cca"]) == "–"


def test_freeze_goes_around_a_semi_gradient_and_an_inner_only():
    params = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1)), "c": jnp.ones(())}
    loss = td0(lambda p, x: p["c"] * (x @ p["a"]) @ p["b"], 0.9)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2)), jnp.float32)
    batch, steps = Transitions(x[0], jnp.ones((5, 1)), x[1]), unroll(optax.sgd(0.1), 3)
    without_c = only(lambda path, _: path != ("c",), steps)
    found = reuse.freeze(lambda path: path == "b", without_c)(loss, params, batch, jax.random.key(0))
    expected = only(lambda path, _: path == ("a",), steps)(loss, params, batch, jax.random.key(0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)
    assert not np.array_equal(found.params["a"], params["a"])
    still = reuse.freeze(lambda _: True, without_c)(loss, params, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, still.params, params)


def test_what_the_report_refuses(done, tmp_path):
    directory, _, _ = done
    for arguments, message in (
        ([f"run={tmp_path}"], "no checkpoint in"),
        ([str(directory), "tasks=0"], "tasks=0: give a whole number"),
        ([str(directory), "queries=many"], "queries=many: give a whole number"),
        ([str(directory), "trainer.steps=5"], "trainer.steps=5: give evaluation=NAME"),
    ):
        ended = main(*arguments, program=reuse)
        assert ended.code == 2
        assert message in ended.err
        assert ended.err.count("\n") == 1
    assert main(program=reuse).code == 2
