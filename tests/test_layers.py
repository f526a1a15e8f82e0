"""The layers of a module: their outputs, their order, and what goes with them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maml.models import MLP, Conv4, activations, blocks, functional, quantize
from maml.quantization import kernel_quantizer
from maml.types import Conditioned

offset = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)


class Odd(nnx.Module):
    """Runs norms/0, z, norms/1, inner/m (twice), a: not in the order of names, nor of construction."""

    def __init__(self, rngs):
        self.a = nnx.Linear(3, 2, rngs=rngs)
        self.inner = nnx.Dict(m=nnx.Linear(3, 3, rngs=rngs))
        self.norms = nnx.List(offset(n, rngs=rngs) for n in (4, 3))
        self.z = nnx.Linear(4, 3, rngs=rngs)
        self.unused = nnx.Linear(1, 1, rngs=rngs)

    def __call__(self, inputs):
        x = self.norms[1](self.z(self.norms[0](inputs)))
        return self.a(self.inner["m"](self.inner["m"](x)))


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_outputs_are_those_of_the_layers_in_order_of_execution():
    model, x = Odd(nnx.Rngs(0)), inputs(5, 4)
    f, (apply, params) = activations(model), functional(model)
    outputs = jax.jit(f)(params, x)
    assert list(outputs) == list(f(params, x)) == ["z", "inner/m", "inner/m:2", "a"]
    normal = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-3)
    np.testing.assert_allclose(outputs["z"], model.z(normal), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["inner/m:2"], model.inner["m"](outputs["inner/m"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outputs["a"], apply(params, x), rtol=1e-5, atol=1e-6)


def test_the_module_and_its_apply_are_left_as_they_were():
    model = Odd(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model))
    apply, params = functional(model)
    activations(model)(params, inputs(5, 4))
    assert type(model.z) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert apply(params, inputs(5, 4)).shape == (5, 2)


@pytest.mark.parametrize(
    ("model", "shape", "layers"),
    [
        (partial(MLP, hidden=(6, 6), norm=offset), (4, 4, 1), 3),
        (partial(Conv4, filters=4, norm=offset, pool="max"), (16, 16, 1), 5),
    ],
    ids=["mlp", "conv4"],
)
def test_of_our_networks_with_either_batch_norm(model, shape, layers):
    model, x, reference = model(shape, 3, rngs=nnx.Rngs(0)), inputs(7, *shape), 1 + inputs(4, *shape)
    f, (apply, params) = activations(model), functional(model)
    names = []
    for given in (params, Conditioned(params, reference)):
        outputs, predictions = jax.jit(lambda p: (f(p, x), apply(p, x)))(given)
        assert len(outputs) == layers
        assert {len(y) for y in outputs.values()} == {7}
        np.testing.assert_allclose(list(outputs.values())[-1], predictions, rtol=1e-4, atol=1e-5)
        names.append(list(outputs))
    assert names[0] == names[1] == list(blocks(model, x))


def test_what_runs_after_a_layer_goes_with_it():
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    assert blocks(Odd(nnx.Rngs(0)), x) == {"z": ("z", "norms/0", "norms/1"), "inner/m": ("inner/m",), "a": ("a",)}


def test_a_quantized_product_is_part_of_its_layer():
    model = quantize(MLP((4,), 2, hidden=(3,), rngs=nnx.Rngs(0)), kernel_quantizer(bits=8, scale="learned"))
    found = blocks(model, inputs(5, 4))
    assert found == {layer: (layer,) for layer in found}
    assert len(found) == 2


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="BatchNorm calls no nnx.Linear"):
        blocks(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), inputs(5, 4))
