"""Models with quantized layers: the forward pass by hand, parameters and filters as they were, from the command line."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from omegaconf import OmegaConf

from experiments import build, pictures
from maml import quantization as q
from maml.inner_loop import only, unroll
from maml.losses import mse
from maml.models import MLP, Conv4, functional, quantize, quantized
from maml.objectives import query_loss
from maml.random import keys_for
from maml.types import Task, leaf_name
from tests.helpers import central_difference, dot
from tests.programs import SMALL, config, main, restored, rows, summary

pytestmark = pytest.mark.usefixtures("compiled_once")

KEY = jax.random.key(0)
KERNEL, INPUT = q.uniform(4, axis=-1), q.uniform(8, symmetric=False, axis=0)


def mlp(**kwargs):
    init = nnx.initializers.normal(0.5)
    return MLP((3,), 2, hidden=(4,), kernel_init=init, rngs=nnx.Rngs(0), **kwargs)


def conv4():
    norm = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)
    return Conv4((16, 16, 1), 2, filters=4, norm=norm, rngs=nnx.Rngs(0))


def paths(params) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.flatten_with_path(params)[0]]


def inputs(*shape: int):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_an_mlp_multiplies_quantized_inputs_and_kernels():
    model, x = mlp(), inputs(5, 3)
    apply, params = functional(quantize(model, KERNEL, INPUT))
    first, second = (layer.kernel[...] for layer in (model.layers[0], model.head))
    hidden = jax.nn.relu(INPUT(x) @ KERNEL(first))
    whole, some = jax.jit(lambda p: (apply(p, x), apply(p, x[1:3])))(params)
    np.testing.assert_allclose(whole, INPUT(hidden) @ KERNEL(second), atol=1e-6)
    np.testing.assert_allclose(some, whole[1:3], atol=1e-6)  # a range for each example
    layer, params = functional(quantize(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), None, INPUT))
    one, batch = jax.jit(lambda p: (layer(p, x[0]), layer(p, x[:1])))(params)
    np.testing.assert_allclose(one, batch[0], atol=1e-6)  # also without a batch axis


def test_an_adapted_model_leaves_as_integers_that_predict_the_same():
    apply, params = functional(quantize(mlp(), KERNEL, INPUT))
    x, support = inputs(5, 3), (inputs(6, 3), jnp.ones((6, 2)))
    adapted = jax.jit(lambda p: unroll(optax.sgd(0.5), 3)(mse(apply), p, support, KEY).params)(params)
    left = q.export(adapted, KERNEL)
    for name in ("layers/0", "head"):
        assert left[f"{name}/kernel"].codes.dtype == jnp.int8
        x = q.integer_matmul(INPUT.encode(x), left[f"{name}/kernel"]) + left[f"{name}/bias"][None]
        x = x if name == "head" else jax.nn.relu(x)
    np.testing.assert_allclose(x, apply(adapted, inputs(5, 3)), atol=1e-5)
    assert np.abs(x - apply(params, inputs(5, 3))).max() > 0.01


def test_learned_steps_leave_as_integers_that_predict_the_same():
    apply, params = functional(quantize(mlp(), learned := q.learned(4), INPUT))
    x, support = inputs(5, 3), (inputs(6, 3), jnp.ones((6, 2)))
    adapted = jax.jit(lambda p: unroll(optax.sgd(0.1), 3)(mse(apply), p, support, KEY).params)(params)
    assert adapted["head"]["dot_general"]["scale"][...] != params["head"]["dot_general"]["scale"][...]
    left = q.export(adapted, learned)
    for name in ("layers/0", "head"):
        assert np.unique(left[f"{name}/kernel"].codes).size > 2
        x = q.integer_matmul(INPUT.encode(x), left[f"{name}/kernel"]) + left[f"{name}/bias"][None]
        x = x if name == "head" else jax.nn.relu(x)
    np.testing.assert_allclose(x, apply(adapted, inputs(5, 3)), atol=1e-5)
    assert 0 <= q.clipped_fraction(adapted, learned, "kernel") < 0.5
    plain = functional(mlp())[1]
    with pytest.raises(ValueError, match=r"head/kernel: 0 parameters head/.../scale"):
        q.export(plain, learned)


@pytest.mark.parametrize("scale", ["channel", "learned"])
def test_a_convolution_of_integers_is_that_of_the_quantized_layer(scale):
    kernels = q.kernel_quantizer(5, scale)
    layer = nnx.Conv(3, 4, (3, 3), strides=2, padding="SAME", rngs=nnx.Rngs(0))
    apply, params = functional(quantize(layer, kernels, INPUT))
    x = inputs(2, 7, 6, 3) - 0.5  # zero points that are not zero, which padding must not take for numbers
    left = q.export(params, kernels)
    found = np.asarray(q.integer_conv(INPUT.encode(x), left["kernel"], (2, 2), "SAME")) + np.asarray(left["bias"])
    np.testing.assert_allclose(found, apply(params, x), atol=1e-5)
    rows = q.uniform(4, axis=0).encode(left["kernel"].codes.astype(jnp.float32))
    with pytest.raises(ValueError, match="kernel: codes .*one scale for all that is summed"):
        q.integer_conv(INPUT.encode(x), rows)


def test_a_conv4_convolves_with_quantized_kernels():
    """As the same network whose stored kernels are on the grid."""
    model, x = conv4(), inputs(3, 16, 16, 1)
    apply, params = functional(quantize(model, KERNEL, layers="convs/[13]"))
    plain, _ = functional(model)
    on_grid = jax.tree.map(lambda x: x, params)
    for i in (1, 3):
        kernel = on_grid["convs"][i]["kernel"]
        kernel.set_value(KERNEL(kernel[...]))
    plain, apply = jax.jit(plain), jax.jit(apply)
    expected = plain(on_grid, x)
    np.testing.assert_allclose(apply(params, x), expected, atol=1e-5)
    assert np.abs(expected - plain(params, x)).max() > 1e-3


@pytest.mark.parametrize("make", [mlp, conv4])
def test_parameters_keep_their_paths_and_values_and_the_model_is_left_as_it_was(make):
    model = make()
    _, before = functional(model)
    changed = quantize(model, KERNEL, INPUT)
    _, after = functional(changed)
    assert paths(after) == paths(before)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert paths(functional(model)[1]) == paths(before)
    layer = model.layers[0] if make is mlp else model.head
    assert layer.dot_general is jax.lax.dot_general
    _, learned = functional(quantize(model, q.learned(4)))
    new = sorted(set(paths(learned)) - set(paths(before)))
    names = ("head/dot_general", "layers/0/dot_general")
    if make is conv4:
        names = (*(f"convs/{i}/conv_general_dilated" for i in range(4)), "head/dot_general")
    assert new == [f"{name}/scale/value" for name in names]


@pytest.mark.usefixtures("x64")
def test_learned_scales_are_moved_by_the_outer_loop_alone_if_so_chosen():
    apply, params = functional(quantize(mlp(), q.learned(3)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    step = params["layers"][0]["dot_general"]["scale"][...]
    kernel = np.asarray(mlp().layers[0].kernel[...], np.float64)
    assert jax.nn.softplus(step) == pytest.approx(2 * np.abs(kernel).mean() / np.sqrt(3), rel=1e-5)

    loss = mse(apply)
    adapt = only(nnx.Not(nnx.PathContains("scale")), unroll(optax.sgd(0.1), 2))
    rng = np.random.default_rng(1)
    task = Task(*((jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 2)))) for _ in range(2)))
    adapted = jax.jit(lambda p: adapt(loss, p, task.support, KEY))(params).params
    moved = {
        p for p, a, b in zip(paths(params), *map(jax.tree.leaves, (params, adapted)), strict=True) if np.any(a != b)
    }
    assert moved == {p for p in paths(params) if "scale" not in p}
    gradient = jax.jit(jax.grad(lambda p: query_loss(loss, adapt)(p, task, KEY, 0)[0]))(params)
    assert all(np.any(x != 0) for x in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("x64")
def test_the_derivative_along_the_outputs_bias_is_that_of_the_program():
    """The last bias is not quantized, and what it moves in two inner steps of itself is smooth: central differences hold."""
    apply, params = functional(quantize(mlp(), KERNEL, INPUT))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    rng = np.random.default_rng(1)
    task = Task(*((jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 2)))) for _ in range(2)))
    adapt = only(lambda path, _: path[:2] == ("head", "bias"), unroll(optax.sgd(0.1), 2))
    outer = jax.jit(lambda p: query_loss(mse(apply), adapt)(p, task, KEY, 0)[0])
    along = jax.tree.map(jnp.zeros_like, params)
    along["head"]["bias"].set_value(jnp.array([1.0, -2.0]))
    expected = central_difference(outer, params, along)
    assert dot(jax.jit(jax.grad(outer))(params), along) == pytest.approx(expected, rel=1e-6)


def test_patterns_that_find_nothing_and_layers_that_are_quantized_are_refused():
    with pytest.raises(ValueError, match="layers='body': finds no kernel; the paths are .*/kernel, .*/kernel"):
        quantize(mlp(), KERNEL, layers="body")
    with pytest.raises(ValueError, match="the paths are none"):
        quantize(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), KERNEL)
    once = quantize(mlp(), q.uniform(8), layers="layers/0")
    twice = quantize(once, KERNEL, layers="head")
    assert twice.layers[0].dot_general.kernels is once.layers[0].dot_general.kernels
    with pytest.raises(ValueError, match="layers/0/kernel is quantized already"):
        quantize(once, KERNEL)


def test_the_factory_hands_arguments_on():
    model = quantized((3,), 2, model=MLP, kernels=KERNEL, hidden=(7,), rngs=nnx.Rngs(0))
    assert model.layers[0].kernel.shape == (3, 7)
    with pytest.raises(TypeError, match="width"):
        quantized((3,), 2, model=MLP, width=3, rngs=nnx.Rngs(0))


# --- from a config ---


def apply_of(*overrides: str):
    cfg = config("model=mlp_quantized", "model.hidden=[8]", *overrides)
    OmegaConf.resolve(cfg)
    sampler = build.build_sampler(cfg, "meta_train")
    return build.build_model(cfg, sampler, KEY)


def test_32_bits_are_none():
    x = inputs(5, 1)
    plain = config("model.hidden=[8]")
    expected, params = build.build_model(plain, build.build_sampler(plain, "meta_train"), KEY)
    for overrides in (("quantization.bits=32",), ("quantization.bits=32", "quantization.activations=32")):
        apply, same = apply_of(*overrides)
        jax.tree.map(np.testing.assert_array_equal, params, same)
        np.testing.assert_array_equal(jax.jit(apply)(same, x), jax.jit(expected)(params, x))
    for bits in (1, 4):
        apply, same = apply_of(f"quantization.bits={bits}", "quantization.activations=8")
        assert np.abs(jax.jit(apply)(same, x) - expected(params, x)).max() > 1e-6


def test_a_config_that_is_wrong_is_refused_by_name():
    for override, message in (
        ("quantization.bits=12", "bits=12"),
        ("quantization.scale=row", "scale='row'"),
        ("quantization.layers=body", "layers='body': finds no kernel"),
    ):
        with pytest.raises(Exception, match=message):
            apply_of(override)


@pytest.mark.parametrize(
    ("algorithm", "other"),
    [
        ("maml", "layers=head"),
        pytest.param("fomaml", "activations=8", marks=pytest.mark.slow),
    ],
)
def test_programs_with_quantized_models(tmp_path, monkeypatch, algorithm, other):
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})
    choice = ("model=mlp_quantized", f"algorithm={algorithm}", "quantization.bits=4", f"quantization.{other}")
    ended = main(*SMALL, *choice, "evaluation.steps=1", "logger=quiet", f"hydra.run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    metrics = summary(tmp_path)["metrics"]
    assert set(metrics) == {f"meta_test/step_{k}/loss" for k in range(2)}
    assert all(np.isfinite(value["mean"]) for value in metrics.values())


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        (("model=mlp_quantized", "quantization.bits=6", "quantization.layers='^head'"), 6),
        pytest.param(("algorithm=maml_on_grid", "quantization.bits=3"), 3, marks=pytest.mark.slow),
    ],
)
def test_flips_of_codes_are_logged_for_every_inner_step(tmp_path, monkeypatch, overrides, bits):
    """Against codes that are counted here, by numpy, along the path of the inner loop."""
    monkeypatch.setattr(pictures, "draw", lambda *_: {})
    monkeypatch.setattr(pictures, "training_curves", lambda *_: {})
    settings = (
        *("algorithm.steps=3", "algorithm.step_size=0.1", "model.kernel_init.stddev=0.5", "evaluation.steps=1"),
        *("diagnostics.curvature.every=4", "diagnostics.curvature.tasks=2", "diagnostics.curvature.lanczos=2"),
    )
    ended = main(*SMALL, *overrides, *settings, f"hydra.run.dir={tmp_path}")
    assert ended.code == 0, ended.err
    row = next(row for row in rows(tmp_path) if "diagnostics/curvature/step_1/code_flips" in row)
    cfg = config(*SMALL, *overrides, *settings)
    learner, state = build.learner(cfg), restored(cfg, tmp_path).state
    tasks = learner.sampler(keys_for(state.key, "diagnostics/curvature", 4, 2))
    adapt, shares = build.inner_loop(cfg), []
    for i in range(2):
        path = adapt(learner.loss, state.params, jax.tree.map(lambda x, i=i: x[i], tasks.support), KEY).trace.params
        where = "head/kernel" if bits == 6 else "kernel"
        kernels = {name: x for name, x in _by_path(path).items() if name.endswith(where)}

        def codes(x):
            step = np.abs(x).max(0, keepdims=True) / (2 ** (bits - 1) - 1)
            return np.round(x / step)

        each = [[codes(x[k]) != codes(x[k + 1]) for x in kernels.values()] for k in range(3)]
        shares.append([sum(x.sum() for x in step) / sum(x.size for x in step) for step in each])
    expected = np.mean(shares, 0)
    assert expected.max() > 0.05  # stored on a coarse grid later steps may flip none
    logged = [row[f"diagnostics/curvature/step_{k}/code_flips"] for k in (1, 2, 3)]
    np.testing.assert_allclose(logged, expected, atol=0.005)


def _by_path(params) -> dict[str, np.ndarray]:
    return {leaf_name(path): np.asarray(x) for path, x in jax.tree.flatten_with_path(params)[0]}
