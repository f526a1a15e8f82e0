"""The three bilinear operations against XLA's convolution: every derivative of them, every map, every way to compute them."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maml.models import convolution as module
from maml.models.convolution import convolution

xla = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def jit(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # compilation is the time of these tests


def draw(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(ours, expected, rtol=1e-10):
    ours, expected = jax.tree.leaves(ours), jax.tree.leaves(expected)
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, float(np.abs(b).max())))


def both(f, *arguments):
    """f(convolution, ...) and f(lax's, ...)."""
    return [jit(partial(f, c))(*arguments) for c in (convolution, xla)]


CASES = [  # strides, padding, height and width, kernel
    ((1, 1), "SAME", (5, 4), (3, 3)),
    ((2, 2), "SAME", (7, 5), (3, 3)),
    ((2, 1), "VALID", (6, 7), (3, 5)),
    ((2, 2), ((2, 1), (0, 3)), (6, 5), (3, 5)),
    ((1, 1), ((0, 1), (2, 0)), (5, 6), (5, 3)),
    ((1, 1), ((3, 1), (0, 4)), (4, 3), (3, 2)),  # a padding that exceeds the kernel
    ((2, 1), "SAME", (4, 5), (1, 1)),
    ((2, 2), "VALID", (8, 6), (3, 3)),  # rows and columns of the image that no window reaches
    ((3, 2), "SAME", (5, 7), (1, 3)),  # a stride that exceeds the kernel
]


def function(c, strides, padding):
    """A scalar whose every derivative is a convolution: not linear in the image, the kernel or the output."""

    def f(x, k):
        y = c(x, k, strides, padding)
        return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    return f


@pytest.fixture
def by_rows(monkeypatch):
    """Images of two channels are convolved by rows of the kernel, like those of many."""
    monkeypatch.setattr(module, "_CHANNELS", 2)


@pytest.mark.usefixtures("x64", "by_rows")
@pytest.mark.parametrize(("strides", "padding", "size", "kernel"), [c for c in CASES if c[0] == (1, 1)])
def test_derivatives_by_rows_are_xlas(strides, padding, size, kernel):
    test_derivatives_are_xlas(strides, padding, size, kernel)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("strides", "padding", "size", "kernel"), CASES)
def test_derivatives_are_xlas(strides, padding, size, kernel):
    def everything(c, x, k, dx, dk):
        f = function(c, strides, padding)
        gradient = jax.grad(f, (0, 1))

        def of_gradient(x, k):
            return sum(jnp.sum(jnp.sin(g)) for g in gradient(x, k))

        y, pull = jax.vjp(lambda x, k: c(x, k, strides, padding), x, k)
        return y, pull(jnp.cos(y)), jax.jvp(gradient, (x, k), (dx, dk)), jax.grad(of_gradient, (0, 1))(x, k)

    x, k = (2, *size, 2), (*kernel, 2, 3)
    close(*both(everything, draw(0, *x), draw(1, *k), draw(2, *x), draw(3, *k)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("strides", "padding", "size", "kernel"), [CASES[0], CASES[3]], ids=["plain", "strided, padded"]
)
def test_maps_are_xlas(strides, padding, size, kernel):
    def everything(c, x, k):
        gradient = jax.grad(function(c, strides, padding), (0, 1))

        def second(x, k):
            return gradient(x, k), jax.jvp(gradient, (x, k), (jnp.cos(x), jnp.cos(k)))[1]

        pairs = jax.vmap(second)(x, k)
        kernels, images = jax.vmap(second, (None, 0))(x[0], k), jax.vmap(second, (0, None))(x, k[0])
        return pairs, kernels, images

    close(*both(everything, draw(0, 3, 2, *size, 2), draw(1, 3, *kernel, 2, 3)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_nested_maps_are_xlas(strides):
    def everything(c, x, k):
        f = jax.grad(function(c, strides, "SAME"), (0, 1))
        all_pairs = jax.vmap(jax.vmap(f, (None, 0)), (0, None))(x, k)
        tasks = jax.vmap(jax.vmap(f, (0, None), 1), (0, 0), 2)(
            x[None], k[:1]
        )  # several images sets for a task's kernel
        axes = jax.vmap(f, (-1, 2))(jnp.moveaxis(x, 0, -1), jnp.moveaxis(k, 0, 2)[..., :3])
        return all_pairs, tasks, axes

    close(*both(everything, draw(0, 3, 2, 4, 5, 2), draw(1, 3, 3, 3, 2, 3)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_hessians_are_xlas(strides):
    def hessian(c, x, k):
        gradient = jax.grad(function(c, strides, "SAME"), (0, 1))
        return jax.jacfwd(gradient, (0, 1))(x, k), jax.vmap(jax.jacfwd(gradient, 1))(x[None], k[None])

    close(*both(hessian, draw(0, 1, 3, 3, 1), draw(1, 3, 3, 1, 2)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("strides", "channels"), [((1, 1), 8), ((1, 1), 2), ((2, 2), 8)])
def test_blocks_of_images_are_the_whole(strides, channels, monkeypatch):
    x, k = draw(0, 2, 6, 5, 4, 2), draw(1, 2, 3, 3, 2, 3)
    height, width = (-(-n // s) for n, s in zip((5, 4), strides, strict=True))
    monkeypatch.setattr(module, "_CHANNELS", channels)
    elements = 18 if channels > 2 else 2 * (3 * 2 + 3 * 3)  # patches; or those of rows and products, twice
    monkeypatch.setattr(module, "_BLOCK", 2 * height * width * elements * 8)  # what two images take
    seen = []

    def spy(*a, of=module._blocks):
        seen.append(of(*a))
        return seen[-1]

    monkeypatch.setattr(module, "_blocks", spy)

    def everything(c, x, k):
        f = function(c, strides, "SAME")
        y, gradient = (
            partial(c, window_strides=strides) if c is xla else partial(c, strides=strides),
            jax.grad(f, (0, 1)),
        )
        one = y(x[0], k[0], padding="SAME"), gradient(x[0], k[0])
        return one, jax.vmap(gradient)(x, k), jax.jvp(gradient, (x[0], k[0]), (x[1], k[1]))

    close(*both(everything, x, k))
    assert set(seen) == {3}


def test_the_number_of_blocks():
    block = module._BLOCK
    assert module._blocks(10, block // 10) == 1
    assert module._blocks(12, block // 5) == 3
    assert module._blocks(7, block) == 7
    assert module._blocks(10, block // 3) == 5  # 4 would do, and does not divide
    assert module._blocks(11, block // 4) == 1  # 3 to 6 do not divide: no blocks
    assert module._blocks(2, 3 * block) == 1  # one image is too large already


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 2)])
def test_the_rules_of_gpu_and_tpu_are_xlas(strides, tasks):
    pads = ((1, 2), (0, 1))
    x, k = draw(0, tasks, 2, 5, 6, 2), draw(1, tasks, 3, 3, 2, 3)
    how = {"strides": strides, "pads": pads}

    def expected(x, k):
        y, pull = jax.vjp(lambda x, k: xla(x, k, strides, pads), x, k)
        return y, *pull(jnp.cos(y))

    def ours(x, k):
        y = module._together(module._conv, module._xla)(x, k, size=(), **how)
        dx = module._together(module._conv_input, module._xla_input)(jnp.cos(y), k, size=(5, 6), **how)
        return y, dx, module._together(module._conv_kernel, module._xla_kernel)(x, jnp.cos(y), size=(3, 3), **how)

    close(jit(ours)(x, k), jit(jax.vmap(expected))(x, k))


def test_nothing_but_the_arguments_is_kept():
    """Sizes that tell: patches would have 9 times the elements of the image."""
    x, k = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)

    def kept(f, *arguments):
        return sorted(a.size for a in jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], *arguments)))

    assert kept(convolution, x, k) == sorted([2 * 8 * 8 * 3, 9 * 3 * 4])

    def pull(x, k, y):
        return jax.vjp(convolution, x, k)[1](y)

    y = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    assert set(kept(pull, x, k, y)) <= {2 * 8 * 8 * 3, 9 * 3 * 4, 2 * 8 * 8 * 4}


def test_what_it_cannot_do_is_refused():
    x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 3))
    plain = inspect.unwrap(convolution)  # in tests jaxtyping refuses wrong ranks first
    for how in ({"rhs_dilation": (2, 2)}, {"lhs_dilation": (1, 2)}, {"feature_group_count": 2}):
        with pytest.raises(ValueError, match="no dilation and no groups"):
            convolution(x, k, **how)
    for wrong in ((x[0], k), (x, k[0]), (x, k[:, :, :1]), (x[None], k)):
        with pytest.raises(ValueError, match="NHWC and HWIO"):
            plain(*wrong)


def test_bfloat16_and_promotion():
    x, k = draw(0, 2, 5, 5, 2).astype(jnp.bfloat16), draw(1, 3, 3, 2, 3).astype(jnp.bfloat16)

    def f(c, x, k):
        y, pull = jax.vjp(lambda x, k: c(x, k, (2, 2), "SAME"), x, k)
        return y, *pull(jnp.ones_like(y))

    ours = jit(partial(f, convolution))(x, k)
    assert {a.dtype for a in ours} == {jnp.dtype(jnp.bfloat16)}
    expected = jit(partial(f, xla))(x.astype(jnp.float32), k.astype(jnp.float32))
    close([a.astype(jnp.float32) for a in ours], expected, rtol=2e-2)
    mixed = jit(partial(f, convolution))(x.astype(jnp.float32), k)
    assert [a.dtype for a in mixed] == [jnp.float32, jnp.float32, jnp.bfloat16]
