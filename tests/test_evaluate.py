"""Evaluation: known answers per step, protocols, purity."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from maml.evaluate import Protocol, ensemble_adapt, ensemble_apply, evaluate
from maml.inner_loop import unroll
from maml.losses import mse
from maml.models import MLP, functional
from maml.tasks import sinusoid
from maml.types import Task


def line_loss():
    return mse(lambda w, x: w * x)


def lines(keys):
    """y = a·x with a from the key; support and query x are ±1, so a step of size α gives w + 2α(a - w)."""
    a = jax.vmap(lambda k: jax.random.normal(k))(keys)[:, None, None]
    x = jnp.broadcast_to(jnp.array([[[1.0], [-1.0]]]), (len(keys), 2, 1))
    return Task((x, a * x), (x, a * x))


PROTOCOL = Protocol(tasks=250, shots=2, queries=2, steps=3, seed=7)


def test_each_step_has_its_known_answer():
    result = evaluate(jnp.array([[0.0]]), lines, line_loss(), unroll(optax.sgd(0.1), 3), PROTOCOL)
    assert sorted(result) == [f"step_{i}/loss" for i in range(4)]
    first = result["step_0/loss"]
    assert first.n == 250
    assert first.mean == pytest.approx(1.0, abs=0.3)  # the mean of squares of normals
    for i in range(4):  # the error shrinks by (1 - 2α) a step, on every task
        assert result[f"step_{i}/loss"].mean == pytest.approx(first.mean * 0.8 ** (2 * i), rel=1e-4)
        assert result[f"step_{i}/loss"].ci95 == pytest.approx(first.ci95 * 0.8 ** (2 * i), rel=1e-4)


@pytest.mark.parametrize("chunk", [7, 100])
def test_chunks_do_not_change_the_numbers(chunk):
    parts = jnp.array([[0.3]]), lines, line_loss(), unroll(optax.sgd(0.1), 3), PROTOCOL
    one, other = evaluate(*parts, chunk=1), evaluate(*parts, chunk=chunk)
    for name, value in one.items():
        assert other[name].mean == pytest.approx(value.mean, rel=1e-5)


@pytest.mark.parametrize("chunk", [0, -1, True])
def test_a_chunk_is_a_number_of_tasks(chunk):
    with pytest.raises(ValueError, match=f"chunk={chunk!r}: give a whole number of tasks"):
        evaluate(jnp.array([[0.0]]), lines, line_loss(), unroll(optax.sgd(0.1), PROTOCOL.steps), PROTOCOL, chunk)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_fewer_steps_can_be_measured_and_the_numbers_stay(norm):
    apply, params = functional(MLP((1,), 1, hidden=(8,), norm=nnx.BatchNorm, rngs=nnx.Rngs(0)))
    protocol = Protocol(tasks=20, shots=5, queries=5, steps=3, norm=norm)
    parts = params, sinusoid(shots=5, queries=5), mse(apply), unroll(optax.sgd(0.1), 3), protocol
    every, some = evaluate(*parts), evaluate(*parts, after=(3, 0))
    assert list(some) == ["step_0/loss", "step_3/loss"]
    for name, value in some.items():
        assert value == pytest.approx(every[name], rel=1e-5)
    assert some["step_3/loss"].mean != pytest.approx(some["step_0/loss"].mean, rel=1e-2)


@pytest.mark.parametrize("after", [[], [4], [-1], [True], [1.0], 3, "last"])
def test_steps_that_a_protocol_has_not_are_not_measured(after):
    parts = jnp.array([[0.0]]), lines, line_loss(), unroll(optax.sgd(0.1), PROTOCOL.steps), PROTOCOL
    with pytest.raises(ValueError, match="give a list of inner steps, 0 to 3, or null for all"):
        evaluate(*parts, after=after)


def test_an_ensemble_is_the_mean_of_outputs_and_each_model_adapts_by_itself():
    """Of lines through 0 it is the line of the mean slope: of slopes 1 and -1, which are both wrong, that of slope 0."""
    loss, adapt = line_loss(), unroll(optax.sgd(0.1), 3)
    of_all = mse(ensemble_apply(lambda w, x: w * x))
    stacked = jnp.array([[[1.0]], [[-1.0]], [[0.6]]])
    found = evaluate(stacked, lines, of_all, ensemble_adapt(adapt, loss), PROTOCOL, chunk=10)
    expected = evaluate(jnp.array([[0.2]]), lines, loss, adapt, PROTOCOL, chunk=10)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].mean == pytest.approx(value.mean, rel=1e-5)


@pytest.mark.parametrize("norm", ["batch", "support", "joint"])
def test_an_ensemble_of_equal_networks_is_that_network(norm):
    apply, params = functional(MLP((1,), 1, hidden=(4,), norm=nnx.BatchNorm, rngs=nnx.Rngs(0)))
    adapt, sampler = unroll(optax.sgd(0.1), 1), sinusoid(shots=3, queries=3)
    protocol = Protocol(tasks=4, shots=3, queries=3, steps=1, norm=norm)
    one = evaluate(params, sampler, mse(apply), adapt, protocol, chunk=4)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    two = evaluate(stacked, sampler, mse(ensemble_apply(apply)), ensemble_adapt(adapt, mse(apply)), protocol, chunk=4)
    for name, value in one.items():
        assert two[name].mean == pytest.approx(value.mean, rel=1e-5)


def test_tasks_depend_on_seed_split_and_index_alone():
    def means(**changes):
        protocol = dataclasses.replace(PROTOCOL, **changes)
        adapt = unroll(optax.sgd(0.1), protocol.steps)
        return evaluate(jnp.array([[0.0]]), lines, line_loss(), adapt, protocol)["step_0/loss"].mean

    assert means() == means()
    assert means(seed=8) != means()
    assert means(split="meta_valid") != means()
    assert means(steps=1) == means()


def test_zero_steps_are_the_meta_parameters_themselves():
    protocol = dataclasses.replace(PROTOCOL, steps=0)
    result = evaluate(jnp.array([[0.5]]), lines, line_loss(), unroll(optax.sgd(0.1), 0), protocol)
    assert list(result) == ["step_0/loss"]


def test_the_hash_names_the_protocol():
    hashes = {Protocol().hash, PROTOCOL.hash} | {
        dataclasses.replace(PROTOCOL, **change).hash
        for change in (
            {"tasks": 6000},
            {"queries": 15},
            {"norm": "support"},
            {"steps": 4},
            {"seed": 0},
            {"ways": 5},
            {"prototypes": "cosine"},
        )
    }
    assert len(hashes) == 9
    assert Protocol(**dataclasses.asdict(PROTOCOL)).hash == PROTOCOL.hash
    assert len(PROTOCOL.hash) == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": 0},
        {"tasks": True},
        {"batch": True},
        {"shots": -1},
        {"queries": 0},
        {"steps": -1},
        {"norm": "running"},
        {"prototypes": "l1"},
    ],
)
def test_a_wrong_protocol_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Protocol(**wrong)


def test_no_second_order_graph_is_kept_at_test_time():
    """Compiled temporaries of 50 inner steps stay near those of one: nothing is stored for an outer derivative."""
    from maml import evaluate as module

    def temporaries(steps):
        protocol = Protocol(tasks=1, shots=5, queries=5, steps=steps)
        adapt = unroll(optax.sgd(1e-3), steps)
        loss = mse(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
        params = {"a": jnp.ones((1, 300)), "b": jnp.ones((300, 1))}
        one = lambda p, k: module._curve(p, sinusoid(shots=5, queries=5), loss, adapt, protocol, k, range(steps + 1))  # noqa: E731
        return jax.jit(one).lower(params, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    # The path of parameters is kept (600 numbers a step): anything like activations and their tangents would be more.
    assert temporaries(50) - temporaries(1) < 50 * 600 * 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [({"shots": 3}, "shots"), ({"queries": 1}, "queries"), ({"steps": 2}, "steps"), ({"ways": 2}, "shots")],
)
def test_tasks_and_loops_of_another_protocol_are_refused(change, message):
    protocol = dataclasses.replace(PROTOCOL, **change)
    with pytest.raises(ValueError, match=message):
        evaluate(jnp.array([[0.0]]), lines, line_loss(), unroll(optax.sgd(0.1), 3), protocol)
