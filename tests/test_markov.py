"""Sequences of Markov chains, and the transformer that predicts them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml.inner_loop import unroll
from maml.losses import cross_entropy
from maml.models import Transformer, functional
from maml.objectives import query_loss
from maml.tasks import expected_entropy, markov
from tests.helpers import central_difference, random_like

KEY = jax.random.key(0)


def test_labels_are_the_following_symbols_and_tasks_are_chains_of_their_own():
    sampler = markov(shots=3, queries=2, symbols=4, length=200, concentration=0.02)  # nearly certain chains
    tasks = jax.jit(sampler)(jax.random.split(KEY, 5))
    inputs, labels = tasks.support
    assert inputs.shape == labels.shape == (5, 3, 200)
    assert tasks.query[0].shape == (5, 2, 200)
    assert np.issubdtype(inputs.dtype, np.integer)
    np.testing.assert_array_equal(inputs[:, :, 1:], labels[:, :, :-1])
    assert set(np.unique(inputs)) <= set(range(4))
    follows = []
    for i in range(
        5
    ):  # in a task a symbol is nearly always followed by the same, in the query set by the same as in the support
        table = np.zeros((4, 4))
        for x, y in zip(np.ravel(tasks.query[0][i]), np.ravel(tasks.query[1][i]), strict=True):
            table[x, y] += 1
        best = table.argmax(1)
        assert np.mean(best[np.ravel(inputs[i])] == np.ravel(labels[i])) > 0.8
        follows.append(tuple(best))
    assert len(set(follows)) > 1


def test_the_expected_entropy_is_that_of_dirichlet_rows():
    rows = np.random.default_rng(0).dirichlet(np.full(8, 0.3), 20000)
    entropy = -np.sum(np.where(rows > 0, rows * np.log(np.maximum(rows, 1e-300)), 0), 1)
    assert expected_entropy(8, 0.3) == pytest.approx(entropy.mean(), abs=4 * entropy.std() / 20000**0.5)


def test_the_chains_of_the_sampler_have_that_entropy():
    """Of a plug-in estimate from very long sequences of many tasks."""
    tasks = jax.jit(markov(shots=1, queries=1, symbols=3, length=4000, concentration=1.0))(jax.random.split(KEY, 200))
    found = []
    for x, y in zip(np.asarray(tasks.support[0])[:, 0], np.asarray(tasks.support[1])[:, 0], strict=True):
        table = np.zeros((3, 3))
        np.add.at(table, (x, y), 1)
        rows = (table + 1e-12) / (table + 1e-12).sum(1, keepdims=True)
        found.append(np.mean(-np.sum(rows * np.log(rows), 1)))  # over uniform states
    error = np.std(found) / len(found) ** 0.5
    assert expected_entropy(3, 1.0) == pytest.approx(np.mean(found), abs=4 * error + 2e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shots": 0}, "shots=0: give a whole number, 1"),
        ({"symbols": 1}, "symbols=1: give a whole number, 2"),
        ({"length": 0}, "length=0"),
        ({"concentration": 0.0}, "concentration=0.0: give a positive"),
    ],
)
def test_wrong_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        markov(**wrong)


def transformer(**sizes):
    return Transformer((6,), 5, **{"width": 8, "heads": 2, "layers": 2} | sizes, rngs=nnx.Rngs(0))


def test_a_prediction_sees_its_symbol_and_those_before_and_none_after():
    apply, params = functional(transformer())
    symbols = jnp.asarray([[0, 1, 2, 3, 4, 0]])
    base = apply(params, symbols)
    assert base.shape == (1, 6, 5)
    for i in range(6):
        moved = np.abs(apply(params, symbols.at[0, i].set((symbols[0, i] + 1) % 5)) - base)[0].max(-1)
        np.testing.assert_array_equal(moved[:i], 0)
        assert (moved[i:] > 0).all()
    np.testing.assert_allclose(apply(params, symbols[:, :4]), base[:, :4], atol=1e-6)  # shorter sequences too


def test_one_block_by_hand():
    model = transformer(layers=1, heads=1)
    symbols = jnp.asarray([[3, 1, 2]])
    p = {
        "/".join(map(str, k)): np.asarray(v.get_value(), np.float64)
        for k, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }

    def norm(x, i):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"norms/{i}/scale"]
            + p[f"norms/{i}/bias"]
        )

    x = p["symbols"][[3, 1, 2]] + p["positions"][:3]
    q, k, v = np.split(norm(x, 0) @ p["attention/0/inputs/kernel"], 3, -1)
    scores = np.where(np.tril(np.ones((3, 3))) > 0, q @ k.T / 8**0.5, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    x = x + weights @ v @ p["attention/0/outputs/kernel"]
    hidden = norm(x, 1) @ p["inner/0/kernel"] + p["inner/0/bias"]
    hidden = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    x = x + hidden @ p["outer/0/kernel"] + p["outer/0/bias"]
    np.testing.assert_allclose(model(symbols)[0], norm(x, 2) @ p["head/kernel"] + p["head/bias"], atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_its_meta_gradient_is_the_central_difference():
    apply, params = functional(transformer(layers=1))
    params = jax.tree.map(lambda x: x.astype(jnp.float64) + 0.1 * random_like(1, x.astype(jnp.float64)), params)
    task = jax.tree.map(lambda x: x[0], markov(shots=2, queries=2, symbols=5, length=6)(KEY[None]))
    objective = query_loss(cross_entropy(apply), unroll(optax.sgd(0.5), 2))
    value = jax.jit(lambda p: objective(p, task, KEY, 0)[0])
    along = random_like(2, params)
    found = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, jax.jit(jax.grad(value))(params), along))
    assert float(found) == pytest.approx(central_difference(value, params, along), rel=1e-6)


def test_of_a_sequence_the_loss_of_an_example_is_the_mean_over_its_symbols():
    apply, params = functional(transformer())
    loss, batch = cross_entropy(apply), (jnp.asarray([[0, 1, 2], [3, 4, 0]]), jnp.asarray([[1, 2, 3], [4, 0, 1]]))
    each = loss.per_example(params, batch, KEY)
    assert each.shape == (2,)
    assert float(each.mean()) == pytest.approx(float(loss(params, batch, KEY)[0]), rel=1e-6)
    logits = np.asarray(apply(params, batch[0]))
    first = [np.log(np.exp(logits[0, t]).sum()) - logits[0, t, label] for t, label in enumerate((1, 2, 3))]
    assert float(each[0]) == pytest.approx(np.mean(first), rel=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"input_shape=\(28, 28, 1\): a transformer takes sequences"):
        Transformer((28, 28, 1), 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="inputs are float32: a transformer takes symbols"):
        transformer()(jnp.zeros((2, 6)))
    with pytest.raises(ValueError, match="width=7, heads=2"):
        transformer(width=7)
