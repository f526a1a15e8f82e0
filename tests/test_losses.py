"""Losses against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maml.derivatives import mixed, reverse
from maml.inner_loop import unroll
from maml.losses import cross_entropy, mse, semi_gradient

KEY = jax.random.key(0)


def identity(params, inputs):
    return params * inputs


def test_mse_is_the_mean_of_squares():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    value, metrics = mse(identity)(jnp.array(2.0), (x, y), KEY)
    assert float(value) == pytest.approx(((2 * x - y) ** 2).mean(), rel=1e-6)
    assert metrics["loss"] == value


def test_mse_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(5, 1\).*\(5,\)"):
        mse(identity)(jnp.array(1.0), (jnp.ones((5, 1)), jnp.ones(5)), KEY)


def test_cross_entropy_is_the_mean_negative_log_probability():
    logits = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    labels = np.array([0, 3, 2, 1, 1, 0])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    value, metrics = cross_entropy(identity)(jnp.array(1.0), (logits, labels), KEY)
    assert float(value) == pytest.approx(-log_p[np.arange(6), labels].mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx((logits.argmax(1) == labels).mean())


def test_cross_entropy_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match="do not fit labels"):
        cross_entropy(identity)(jnp.array(1.0), (jnp.ones((5, 2)), jnp.zeros((5, 1), int)), KEY)


def test_the_second_derivative_of_cross_entropy_is_the_softmax_covariance():
    """log_softmax holds a stop_gradient; the Hessian must be diag(p) - ppᵀ all the same."""
    logits, label = jnp.array([0.3, -1.0, 2.0]), jnp.array([1])

    def loss(z):
        return cross_entropy(lambda p, x: p[None] + 0 * x)(z, (jnp.zeros((1, 3)), label), KEY)[0]

    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(jax.hessian(loss)(logits), np.diag(p) - np.outer(p, p), atol=1e-6)


def test_a_semi_gradient_is_the_partial_derivative_and_its_value_stops_the_target():
    def two(params, target, batch, key):
        del key
        value = (batch * params**2 + 3.0 * params * target + target**2).sum()
        return value, {"loss": value}

    loss, point = semi_gradient(two), jnp.array([1.0, -2.0])
    grads = jax.grad(loss, has_aux=True)(point, jnp.float32(0.5), KEY)[0]
    np.testing.assert_allclose(grads, point + 3.0 * point, rtol=1e-6)  # 2 batch θ + 3 target
    adapted = unroll(optax.sgd(0.1), 1)(loss, point, jnp.float32(0.5), KEY).params
    np.testing.assert_allclose(adapted, 0.6 * point, rtol=1e-6)
    for derivative in (
        reverse,
        mixed,
    ):  # the Jacobian of the step is 1 - 0.1 (2 batch + 3), with both arguments differentiated
        adapt = unroll(optax.sgd(0.1), 1, derivative)
        moved = jax.jacrev(lambda p, adapt=adapt: adapt(loss, p, jnp.float32(0.5), KEY).params)(point)
        np.testing.assert_allclose(moved, 0.6 * np.eye(2), atol=1e-6)


@pytest.mark.parametrize("make", [mse, cross_entropy])
def test_the_loss_of_bfloat16_outputs_is_float32(make):
    inputs = jnp.linspace(-1, 1, 6).reshape(3, 2)
    targets = jnp.array([0, 1, 1]) if make is cross_entropy else 2 * inputs
    value, _ = make(lambda p, x: (p * x).astype(jnp.bfloat16))(jnp.float32(3.0), (inputs, targets), KEY)
    assert value.dtype == jnp.float32
