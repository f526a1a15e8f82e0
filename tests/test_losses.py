"""Losses against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maml.losses import cross_entropy, mse

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
