"""Networks: sizes of the papers, batch norm modes, max-pool and its derivatives."""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from maml.inner_loop import unroll
from maml.losses import mse
from maml.models import MLP, Conv4, functional
from maml.models.conv import _max_pool
from maml.models.functional import pure
from maml.objectives import query_loss
from maml.types import Conditioned, Joint, Task
from tests.helpers import central_difference, dot, random_like, twins

offset = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)


def count(model) -> int:
    return sum(x.size for x in jax.tree.leaves(functional(model)[1]))


@pytest.mark.parametrize(
    ("model", "size"),
    [  # PAPERS: Finn et al. 2017 and the reference code; the second number are the norms' offsets
        (lambda r: MLP((1,), 1, hidden=(40, 40), rngs=r), 1761),
        (
            lambda r: MLP((28, 28, 1), 5, hidden=(256, 128, 64, 64), norm=offset, rngs=r),
            246_597 + 512,
        ),
        (lambda r: Conv4((28, 28, 1), 5, norm=offset, rngs=r), 111_749 + 256),
        (lambda r: Conv4((28, 28, 1), 20, norm=offset, rngs=r), 112_724 + 256),
        (
            lambda r: Conv4((84, 84, 3), 5, filters=32, pool="max", spatial="flatten", norm=offset, rngs=r),
            32_773,
        ),
        (lambda r: Conv4((28, 28, 1), 5, spatial="flatten", rngs=r), 111_749 + 5 * 192),
    ],
)
def test_parameter_counts_are_those_of_the_papers(model, size):
    assert count(model(nnx.Rngs(0))) == size


def test_without_hidden_layers_a_network_is_linear():
    apply, params = functional(MLP((3,), 2, hidden=(), kernel_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    head = params["head"]
    np.testing.assert_allclose(apply(params, x), x @ head["kernel"][...] + head["bias"][...][None], rtol=1e-5)


def test_max_pool_is_the_window_maximum_and_cuts_odd_borders():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32)
    np.testing.assert_array_equal(_max_pool(x), nnx.max_pool(x, (2, 2), (2, 2)))


def test_of_equal_values_the_first_is_the_maximum_and_a_nan_is():
    x = jnp.zeros((1, 2, 4, 1)).at[0, :, 2:, 0].set(jnp.array([[1.0, 3.0], [jnp.nan, 3.0]]))
    np.testing.assert_array_equal(_max_pool(x)[0, 0, :, 0], [0.0, jnp.nan])
    gradient = jax.grad(lambda x: _max_pool(x).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(gradient, [[1, 0, 0, 0], [0, 0, 1, 0]])


class NormPool(nnx.Module):
    def __init__(self, rngs, *, last: bool):
        self.norm, self.last = nnx.BatchNorm(3, rngs=rngs), last

    def __call__(self, x):
        x = self.norm(x)
        return nnx.relu(_max_pool(x)) if self.last else _max_pool(nnx.relu(x))


@pytest.mark.usefixtures("x64")
def test_the_second_derivative_of_max_pool_after_batch_norm_is_the_central_difference():
    """Under jit, where a compiler may compute the normalised values twice, and differently; ReLU on either side of the pool."""
    x, along, toward = (random_like(i, jnp.zeros((4, 7, 4, 3))) for i in (1, 2, 3))
    weights, results = random_like(0, jnp.zeros((4, 3, 2, 3))), []
    for last in (False, True):
        apply, params = functional(NormPool(nnx.Rngs(0), last=last))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)

        def slope(x, apply=apply, params=params):
            gradient = jax.grad(lambda x: jnp.sum(weights * jnp.sin(apply(params, x))))
            return jnp.vdot(toward, gradient(x))

        forward, gradient = jax.jit(lambda x, f=slope: (jax.jvp(f, (x,), (along,))[1], jax.grad(f)(x)))(x)
        expected = central_difference(jax.jit(slope), x, along, epsilon=1e-6)
        assert float(forward) == pytest.approx(expected, rel=1e-6)
        assert dot(gradient, along) == pytest.approx(expected, rel=1e-6)
        results.append(gradient)
    np.testing.assert_allclose(*results, atol=1e-10)


def models(norm):
    return {
        "mlp": MLP(
            (6, 6, 1),
            3,
            hidden=(8, 4),
            norm=norm,
            kernel_init=nnx.initializers.normal(0.3),
            rngs=nnx.Rngs(0),
        ),
        "conv": Conv4((16, 16, 1), 3, filters=8, norm=norm, rngs=nnx.Rngs(0)),
        "conv_max": Conv4((16, 16, 1), 3, filters=8, pool="max", spatial="flatten", norm=norm, rngs=nnx.Rngs(0)),
    }


def batch_for(name: str, n: int, seed: int = 0):
    size = 6 if name == "mlp" else 16
    return jax.random.uniform(jax.random.key(seed), (n, size, size, 1))


@pytest.mark.parametrize("name", ["mlp", "conv", "conv_max"])
def test_transductive_batch_norm_uses_the_batch_at_hand(name):
    apply, params = functional(models(offset)[name])
    apply, x = jax.jit(apply), batch_for(name, 6)
    assert np.abs(apply(params, x)[:3] - apply(params, x[:3])).max() > 1e-4
    np.testing.assert_array_equal(apply(params, x), apply(params, x))  # no running state


@pytest.mark.parametrize("name", twins(("mlp", "conv_max"), ("mlp", "conv", "conv_max")))
@pytest.mark.parametrize("norm", twins((offset, nnx.BatchNorm), (offset, nnx.BatchNorm, nnx.LayerNorm, None)))
def test_inductive_predictions_do_not_change_by_a_bit(name, norm):
    apply, params = functional(models(norm)[name])
    support, query = batch_for(name, 5), batch_for(name, 7, seed=1)
    predict = jax.jit(lambda q: apply(Conditioned(params, support), q))
    whole = np.asarray(predict(query))
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_array_equal(predict(query[order]), whole[order])
    for keep in ([0], [2, 5], [1, 2, 3, 4, 5, 6]):
        np.testing.assert_array_equal(predict(query[np.array(keep)]), whole[keep])


def test_joint_statistics_are_those_of_the_reference_and_the_one_input():
    """Reptile without transduction: each input is the last of a batch with the reference, and sees no other input."""
    model = MLP((3,), 2, hidden=(4,), norm=offset, kernel_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(1))
    apply, params = functional(model)
    support, query = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    predict = jax.jit(lambda q: apply(Joint(params, support), q))
    expected = [apply(params, np.concatenate([support, x[None]]))[-1] for x in query]
    np.testing.assert_allclose(predict(query), expected, atol=1e-5)
    np.testing.assert_array_equal(predict(query[::-1])[::-1], predict(query))
    np.testing.assert_array_equal(predict(query[2:3])[0], predict(query)[2])


def test_inductive_statistics_are_those_of_the_reference():
    model = MLP(
        (3,),
        2,
        hidden=(4,),
        norm=offset,
        kernel_init=nnx.initializers.normal(1.0),
        rngs=nnx.Rngs(1),
    )
    apply, params = functional(model)
    support, query = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    kernels = [np.asarray(layer.kernel[...], np.float64) for layer in (model.layers[0], model.head)]
    hidden = support @ kernels[0]
    mean, var = hidden.mean(0), hidden.var(0)
    expected = np.maximum((query @ kernels[0] - mean) / np.sqrt(var + 1e-3), 0) @ kernels[1]
    np.testing.assert_allclose(apply(Conditioned(params, support), query), expected, atol=1e-5)
    np.testing.assert_allclose(apply(Conditioned(params, support), support), apply(params, support), atol=1e-5)


class Twice(nnx.Module):
    """Calls one batch norm at two places."""

    def __init__(self, rngs):
        self.layer, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.layer(self.norm(inputs)))


def test_support_statistics_of_a_norm_that_is_called_twice_are_refused():
    """They would be those of the last call, at both places."""
    apply, params = functional(Twice(nnx.Rngs(0)))
    support, query = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    for _ in range(2):  # what was refused leaves nothing behind
        with pytest.raises(ValueError, match="calls a batch norm twice"):
            apply(Conditioned(params, support), query)
    joint = apply(Joint(params, support), query[:1])
    np.testing.assert_allclose(joint[0], apply(params, np.concatenate([support, query[:1]]))[-1], atol=1e-6)


def test_support_statistics_pass_through_rematerialised_layers():
    class Remat(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, inputs):
            return nnx.remat(lambda parts, x: parts[1](parts[0](x)))((self.layer, self.norm), inputs)

    apply, params = functional(Remat(nnx.Rngs(0)))
    support = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.testing.assert_allclose(apply(Conditioned(params, support), support), apply(params, support), atol=1e-5)


def test_the_module_is_left_as_it_was():
    model = MLP((3,), 2, hidden=(4,), norm=nnx.BatchNorm, rngs=nnx.Rngs(1))
    before = jax.tree.map(np.asarray, nnx.state(model))
    apply, params = functional(model)
    apply(Conditioned(params, jnp.ones((4, 3))), jnp.ones((2, 3)))
    assert model.norms[0].momentum == 0.99
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_conv4_refuses_what_it_cannot_be():
    for kwargs in ({"pool": "average"}, {"spatial": "sum"}):
        with pytest.raises(ValueError, match="pool is stride or max"):
            Conv4((28, 28, 1), 5, rngs=nnx.Rngs(0), **kwargs)
    with pytest.raises(ValueError, match="too small"):
        Conv4((8, 8, 1), 5, pool="max", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="takes images"):
        Conv4((1,), 5, rngs=nnx.Rngs(0))


def test_what_is_no_nnx_module_is_refused():
    """A Linen module would pass as one without parameters. (`pure` has no annotation that the tests check before it does.)"""
    module: Any = linen.Dense(1)
    with pytest.raises(ValueError, match="Dense is no NNX module; a Linen module serves by its own apply"):
        inspect.unwrap(pure)(module, None)


def test_a_recurrent_network_has_a_meta_gradient():
    """Its cells hold random state, for the start of the carry, which is zero."""

    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(2, 3, param_dtype=jnp.float64, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x)[:, -1])

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        apply, params = functional(Recurrent(nnx.Rngs(0)))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        x, y = jax.random.normal(jax.random.key(1), (4, 5, 2)), jnp.linspace(-1, 1, 4)[:, None]
        np.testing.assert_array_equal(apply(params, x), apply(params, x))
        objective, task = query_loss(mse(apply), unroll(optax.sgd(0.1), 2)), Task((x, y), (-x, y))
        f = lambda p: objective(p, task, jax.random.key(0), 0)[0]  # noqa: E731
        direction = random_like(2, params)
        found = dot(jax.grad(f)(params), direction)
        assert found == pytest.approx(central_difference(f, params, direction), rel=1e-6)


def test_random_state_is_refused_since_apply_has_no_key():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.dropout = nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(x))

    with pytest.raises(ValueError, match="random state"):
        functional(Noisy(nnx.Rngs(0)))
