"""The inner loop in bfloat16, with everything that the outer loop sees in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from maml import train
from maml.derivatives import mixed, reverse
from maml.inner_loop import unroll
from maml.losses import cross_entropy, mse
from maml.models import Conv4, functional
from maml.objectives import query_loss
from maml.types import Task

KEY = jax.random.key(0)


def smooth_problem():
    """A network without kinks: its meta-gradient moves with its parameters' rounding, and not by jumps."""

    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    keys = jax.random.split(jax.random.key(1), 4)
    params = {"w": jax.random.normal(keys[0], (3, 32)), "v": 0.2 * jax.random.normal(keys[1], (32, 2))}
    sides = [(x := jax.random.normal(k, (16, 3)), jnp.sin(x[:, :2])) for k in keys[2:]]
    return mse(apply), params, Task(*sides)


@pytest.mark.parametrize("derivative", [reverse, mixed])
def test_the_meta_gradient_is_that_of_float32_up_to_rounding(derivative):
    loss, params, task = smooth_problem()

    def gradient(precision):
        adapt = unroll(optax.sgd(0.1), 3, derivative, precision=precision)
        grads = jax.jit(jax.grad(lambda p: query_loss(loss, adapt)(p, task, KEY, 0)[0]))(params)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
        return ravel_pytree(grads)[0]

    low, full = gradient("bfloat16"), gradient("float32")
    assert low @ full / jnp.linalg.norm(low) / jnp.linalg.norm(full) > 0.999
    assert np.abs(low - full).max() > 1e-6  # it is in bfloat16


def test_the_adapted_parameters_move_by_less_than_bfloat16_can_tell():
    loss, params, task = smooth_problem()
    adapt = unroll(optax.sgd(1e-5), 1, precision="bfloat16")
    moved = jax.tree.map(jnp.subtract, adapt(loss, params, task.support, KEY).params, params)
    expected = jax.tree.map(lambda g: -1e-5 * g, jax.grad(loss, has_aux=True)(params, task.support, KEY)[0])
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05 * scale)


@pytest.mark.slow
@pytest.mark.usefixtures("full_compiler")
def test_a_thousand_meta_steps_of_a_convolutional_network_stay_finite_and_learn():
    norm = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)
    apply, params = functional(Conv4((16, 16, 1), 3, filters=4, norm=norm, rngs=nnx.Rngs(0)))
    loss = cross_entropy(apply)
    objective = query_loss(loss, unroll(optax.sgd(0.4), 1, mixed, precision="bfloat16"))

    def sampler(keys):
        def draw(key):
            patterns, noise = jax.random.split(key)
            images = jax.random.bernoulli(patterns, 0.3, (3, 16, 16, 1)).astype(jnp.float32)
            x = jnp.tile(images, (2, 1, 1, 1)) + 0.1 * jax.random.normal(noise, (6, 16, 16, 1))
            return Task((x[:3], jnp.arange(3)), (x[3:], jnp.arange(3)))

        return jax.vmap(draw)(keys)

    optimizer = optax.adam(3e-3)
    step = train.meta_step(objective, optimizer, meta_batch=2)
    logged = {}
    start = train.begin(train.init(params, optimizer, KEY), step, sampler)
    # `fit` raises NonFinite at the first meta-step whose loss, gradient or update is not finite.
    train.fit(start, step, sampler, steps=1000, log_every=500, log=lambda n, m: logged.update({n: m["query/loss"]}))
    assert logged[1000] < 0.8 * logged[1]


@pytest.mark.usefixtures("x64")
def test_float64_is_rounded_too():
    loss, params, task = jax.tree.map(lambda x: x.astype(jnp.float64) if hasattr(x, "astype") else x, smooth_problem())
    low, full = (
        ravel_pytree(unroll(optax.sgd(0.1), 3, precision=p)(loss, params, task.support, KEY).params)[0]
        for p in ("bfloat16", "float32")
    )
    assert low.dtype == full.dtype == jnp.float64
    assert 1e-6 < np.abs(low - full).max() < 1e-2


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="precision='float16': give float32 or bfloat16"):
        unroll(optax.sgd(0.1), 1, precision="float16")
