"""A convolution that stays fast when it is differentiated several times and mapped over tasks.

Under a map over tasks every task has a kernel of its own, and XLA's batch-grouped convolutions and kernel gradients are slow
there (jax #13800; on CPU also without a map). A convolution y = x * k and its two transposes are three bilinear operations

    y = conv(x, k)          dx = conv_input(dy, k)          dk = conv_kernel(x, dy)

and the transpose of each with respect to either argument is again one of the three. So any nesting of forward and reverse mode
stays within them, nothing but their own arguments is ever kept for a backward pass, and each is lowered to what is fast.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_BLOCK = 16 << 20
"""Bytes of patches that are made at a time on CPU: what stays in the cache beside the operands."""

_CHANNELS = 8
"""From so many on, and without a stride, CPUs are faster by rows of the kernel than by patches."""


def convolution(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    *,
    lhs_dilation: Sequence[int] = (1, 1),
    rhs_dilation: Sequence[int] = (1, 1),
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **unused: Any,
) -> Float[Array, "batch new_height new_width features"]:
    """`lax.conv_general_dilated` in NHWC and HWIO, up to rounding; takes the place of it in `nnx.Conv(conv_general_dilated=...)`.

    Raises:
      ValueError: for dilations, groups or other layouts: those need `lax.conv_general_dilated` itself.
    """
    del dimension_numbers, unused
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"convolution: inputs {x.shape} and kernel {kernel.shape}: give NHWC and HWIO with equal channels"
        )
    if feature_group_count != 1 or set(map(int, (*lhs_dilation, *rhs_dilation))) != {1}:
        raise ValueError("convolution has no dilation and no groups: use lax.conv_general_dilated for this layer")
    pads = (
        lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding) if isinstance(padding, str) else padding
    )
    x, kernel = (a.astype(jnp.result_type(x, kernel)) for a in (x, kernel))
    pads = tuple((int(low), int(high)) for low, high in pads)
    return conv_p.bind(x[None], kernel[None], strides=strides, pads=pads, size=())[0]


# Each operand has a leading axis of tasks: [tasks, batch, height, width, channels] and [tasks, height, width,
# channels, features]. `size` is what the operands do not tell: height and width of dx, or of the kernel.

conv_p, conv_input_p, conv_kernel_p = (Primitive(name) for name in ("conv", "conv_input", "conv_kernel"))


def _conv_shape(x, k, *, strides, pads, size):
    del size
    spatial = ((n + sum(p) - m) // s + 1 for n, p, m, s in zip(x.shape[2:4], pads, k.shape[1:3], strides, strict=True))
    return x.update(shape=(*x.shape[:2], *spatial, k.shape[-1]), weak_type=False)


def _input_shape(dy, k, *, strides, pads, size):
    del strides, pads
    return dy.update(shape=(*dy.shape[:2], *size, k.shape[3]), weak_type=False)


def _kernel_shape(x, dy, *, strides, pads, size):
    del strides, pads
    return x.update(shape=(x.shape[0], *size, x.shape[-1], dy.shape[-1]), weak_type=False)


def _transposes() -> None:
    """What is linear in one argument has the other two operations as transposes, each with the sizes that they need."""

    def of(aval, axis):
        return tuple(aval.aval.shape[axis : axis + 2])

    def to_input(dy, x, k, *, size, **how):
        del size
        return conv_input_p.bind(dy, k, size=of(x, 2), **how)

    def to_kernel(dy, x, k, *, size, **how):
        del size
        return conv_kernel_p.bind(x, dy, size=of(k, 1), **how)

    ad.defbilinear(conv_p, to_input, to_kernel)
    ad.defbilinear(
        conv_input_p,
        lambda x, dy, k, *, size, **how: conv_p.bind(x, k, size=(), **how),  # noqa: ARG005
        lambda x, dy, k, *, size, **how: conv_kernel_p.bind(x, dy, size=of(k, 1), **how),  # noqa: ARG005
    )
    ad.defbilinear(
        conv_kernel_p,
        lambda k, x, dy, *, size, **how: conv_input_p.bind(dy, k, size=of(x, 2), **how),  # noqa: ARG005
        lambda k, x, dy, *, size, **how: conv_p.bind(x, k, size=(), **how),  # noqa: ARG005
    )


def _fold(x, into: int):
    """[new, tasks, ...] to [tasks, ...] with the new axis as the slow part of axis `into`."""
    x = jnp.moveaxis(x, 0, into)
    return x.reshape(*x.shape[:into], -1, *x.shape[into + 2 :])


def _batching(primitive: Primitive, folds: tuple[tuple[int, int], tuple[int, int]]):
    """vmap: an axis that both operands have joins the tasks; one that a single operand has joins an axis that only it has.

    `folds` gives, for either operand, that axis in the operand and in the result: the batch of images, or channels.
    """

    def rule(operands, axes, **how):
        new = [jnp.moveaxis(x, axis, 0) if axis is not None else x for x, axis in zip(operands, axes, strict=True)]
        if None not in axes:
            count, tasks = new[0].shape[:2]
            y = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in new), **how)
            return y.reshape(count, tasks, *y.shape[1:]), 0
        which = 0 if axes[1] is None else 1
        into, out = folds[which]
        count = new[which].shape[0]
        new[which] = _fold(new[which], into)
        y = primitive.bind(*new, **how)
        y = y.reshape(*y.shape[:out], count, -1, *y.shape[out + 1 :])
        return jnp.moveaxis(y, out, 0), 0

    return rule


# How each is computed for one task: patches and a matrix product (on GPU and TPU always).


def _shifts(x, size, strides, pads, axis: int = 1):
    """What each position in the kernel meets of an image whose height and width are the axes `axis` and axis + 1."""
    room = [(0, 0, 0)] * x.ndim
    room[axis : axis + 2] = [(*pad, 0) for pad in pads]
    x = lax.pad(x, jnp.zeros((), x.dtype), room)

    def along(axis, n, k, s):  # slices of an axis, for each position
        high = (n - k) // s + 1
        return [
            functools.partial(lax.slice_in_dim, start_index=i, limit_index=i + s * (high - 1) + 1, stride=s, axis=axis)
            for i in range(k)
        ]

    rows, columns = (along(axis + i, x.shape[axis + i], size[i], strides[i]) for i in (0, 1))
    return [column(row(x)) for row in rows for column in columns]


def _patches(x, size, strides, pads):
    """[batch, height, width, channels] to [batch, new height, new width, positions in the kernel x channels]."""
    return jnp.concatenate(_shifts(x, size, strides, pads), -1)


def _conv(x, k, *, strides, pads, size):
    del size
    return _patches(x, k.shape[:2], strides, pads) @ k.reshape(-1, k.shape[-1])


def _conv_input(dy, k, *, strides, pads, size):
    patches = (dy @ k.reshape(-1, k.shape[-1]).T).reshape(*dy.shape[:-1], *k.shape[:3])
    padded = [n + sum(p) for n, p in zip(size, pads, strict=True)]

    def room(axis, first):  # the place of one position of the kernel in the padded image
        n, s = dy.shape[1 + axis], strides[axis]
        return first, padded[axis] - first - s * (n - 1) - 1, s - 1

    zero, whole = jnp.zeros((), dy.dtype), (0, 0, 0)
    places = [
        lax.pad(patches[..., i, j, :], zero, (whole, room(0, i), room(1, j), whole))
        for i in range(k.shape[0])
        for j in range(k.shape[1])
    ]
    (top, bottom), (left, right) = pads
    return functools.reduce(jnp.add, places)[:, top : padded[0] - bottom, left : padded[1] - right]


def _conv_kernel(x, dy, *, strides, pads, size):
    # Transposed by hand: a product whose first argument is transposed is slow on CPU where the result is small.
    if max(strides) == 1:
        patches = jnp.concatenate(
            _shifts(lax.optimization_barrier(jnp.moveaxis(x, -1, 0)), size, strides, pads, axis=2)
        )
        patches = lax.optimization_barrier(patches.reshape(-1, math.prod(dy.shape[:-1])))
    else:
        patches = _patches(x, size, strides, pads)
        patches = lax.optimization_barrier(patches.reshape(-1, patches.shape[-1]).T)
    return (patches @ dy.reshape(-1, dy.shape[-1])).reshape(*size, x.shape[-1], dy.shape[-1])


# Without a stride, by rows of the kernel: patches of one row (kernel width x channels), one product with all rows of the
# kernel, and the results for each row shifted against each other and added. A third of the copies for a 3×3 kernel.


def _conv_by_rows(x, k, *, strides, pads, size):
    del size
    rows, features = k.shape[0], k.shape[-1]
    height = x.shape[1] + sum(pads[0]) - rows + 1
    y = _patches(x, (1, k.shape[1]), strides, pads) @ k.transpose(1, 2, 0, 3).reshape(-1, rows * features)
    parts = [y[:, i : i + height, :, i * features : (i + 1) * features] for i in range(rows)]
    return functools.reduce(jnp.add, parts)


def _kernel_by_rows(x, dy, *, strides, pads, size):
    rows, width = size
    patches = jnp.concatenate(
        _shifts(lax.optimization_barrier(jnp.moveaxis(x, -1, 0)), (1, width), strides, pads, axis=2)
    )
    shifted = [jnp.pad(dy, ((0, 0), (i, rows - 1 - i), (0, 0), (0, 0))) for i in range(rows)]
    shifted = jnp.concatenate(shifted, -1).reshape(-1, rows * dy.shape[-1])
    dk = lax.optimization_barrier(patches.reshape(-1, shifted.shape[0])) @ shifted
    return dk.reshape(width, x.shape[-1], rows, dy.shape[-1]).transpose(2, 0, 1, 3)


def _input_by_rows(dy, k, *, strides, pads, size):
    k, pads = _turned(dy, k, pads, size)
    return _conv_by_rows(dy, k, strides=strides, pads=pads, size=())


def _turned(dy, k, pads, size):
    """Kernel and pads of the convolution of dy that is dx, without a stride; negative pads where those of x exceed the kernel."""
    pads = [
        (m - 1 - low, n + low - d) for n, d, m, (low, _) in zip(size, dy.shape[1:3], k.shape[:2], pads, strict=True)
    ]
    return jnp.flip(k, (0, 1)).swapaxes(2, 3), pads


_BY_ROWS = {_conv: _conv_by_rows, _conv_input: _input_by_rows, _conv_kernel: _kernel_by_rows}


# How they are lowered.


def _one_by_one(operation, xla, images: int):
    """CPU: tasks one after the other.

    Where the patches are too large for the cache: blocks of images, whose sum is dk; or XLA's own convolution if it is faster
    (no stride, no sum over images, not by rows).
    """

    def lowered(a, b, **how):
        y = jax.eval_shape(
            functools.partial(operation, **how), *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (a, b))
        )
        conv_side = {_conv: y, _conv_input: a[0], _conv_kernel: b[0]}[operation]  # has an element for each patch
        height, width, channels, features = (y if operation is _conv_kernel else b[0]).shape
        by_rows = max(how["strides"]) == 1 and channels >= _CHANNELS
        compute = _BY_ROWS[operation] if by_rows else operation
        elements = 2 * (width * channels + height * features) if by_rows else height * width * channels
        blocks = _blocks(a.shape[1], math.prod(conv_side.shape[1:3]) * elements * y.dtype.itemsize)

        def one(ab):
            if blocks == 1:
                return compute(*ab, **how)
            parts = [x.reshape(blocks, -1, *x.shape[1:]) for x in ab[:images]]
            if images == 2:
                zero = jnp.zeros(y.shape, y.dtype)
                return lax.scan(lambda total, ab: (total + compute(*ab, **how), None), zero, tuple(parts))[0]
            if max(how["strides"]) == 1 and not by_rows:
                return xla(*ab, **how)
            return lax.map(lambda a: compute(a, ab[1], **how), *parts).reshape(y.shape)

        return one((a[0], b[0]))[None] if a.shape[0] == 1 else lax.map(one, (a, b))

    return lowered


def _blocks(images: int, size: int) -> int:
    """The number of equal blocks in which `images` with `size` bytes of patches each fit the cache; 1 if none is near."""
    least = -(-images * size // _BLOCK)
    return next((n for n in range(least, min(images, 2 * least) + 1) if images % n == 0), 1)


def _together(operation, xla):
    """GPU and TPU: XLA's convolution where there is one kernel, and one batched product where each task has its own."""

    def lowered(a, b, **how):
        if a.shape[0] == 1:
            return xla(a[0], b[0], **how)[None]
        return jax.vmap(functools.partial(operation, **how))(a, b)

    return lowered


def _xla(x, k, *, strides, pads, size=()):
    del size
    return lax.conv_general_dilated(x, k, strides, pads, dimension_numbers=_LAYOUT)


def _xla_input(dy, k, *, size, **how):
    if max(how["strides"]) == 1:
        k, pads = _turned(dy, k, how["pads"], size)
        return _xla(dy, k, strides=(1, 1), pads=pads)
    x = jax.ShapeDtypeStruct((dy.shape[0], *size, k.shape[2]), dy.dtype)
    return jax.linear_transpose(lambda x: _xla(x, k, **how), x)(dy)[0]


def _xla_kernel(x, dy, *, size, **how):
    k = jax.ShapeDtypeStruct((*size, x.shape[-1], dy.shape[-1]), dy.dtype)
    return jax.linear_transpose(lambda k: _xla(x, k, **how), k)(dy)[0]


def _define(primitive, shape, operation, xla, images, folds) -> None:
    def execute(*operands, **how):  # outside of jit
        return jax.jit(functools.partial(primitive.bind, **how))(*operands)

    primitive.def_impl(execute)
    primitive.def_abstract_eval(shape)
    batching.primitive_batchers[primitive] = _batching(primitive, folds)
    mlir.register_lowering(primitive, mlir.lower_fun(_together(operation, xla), multiple_results=False))
    mlir.register_lowering(
        primitive, mlir.lower_fun(_one_by_one(operation, xla, images), multiple_results=False), platform="cpu"
    )


_transposes()
# Axes: images 1, and channels and features of a kernel 3 and 4; channels of an image 4.
_define(conv_p, _conv_shape, _conv, _xla, 1, ((1, 1), (4, 4)))
_define(conv_input_p, _input_shape, _conv_input, _xla_input, 1, ((1, 1), (3, 4)))
_define(conv_kernel_p, _kernel_shape, _conv_kernel, _xla_kernel, 2, ((4, 3), (4, 4)))
