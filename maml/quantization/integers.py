"""Integers to leave with, and what a machine for integers computes from them."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maml.quantization.diagnostics import Where, encoded, selected
from maml.quantization.learned import Learned
from maml.quantization.quantizer import Codes, Quantizer
from maml.types import Params


def export(params: Params, quantizer: Quantizer | Learned, where: Where = "kernel") -> Mapping[str, Codes | Array]:
    """Every parameter by its path: those that the pattern finds as `Codes` (int8, scales, zero points), the others as they are.

    Raises:
      ValueError: as `encoded`.
    """
    return selected(params, "") | encoded(params, quantizer, where)


def integer_matmul(x: Codes, kernel: Codes) -> Float[Array, "examples outputs"]:
    """decode(x) @ decode(kernel) for codes [examples, features] and [features, outputs], with int8 products summed in int32.

    Σ(x - zₓ)(k - z) = Σxk - zₓ Σk - z Σx + n zₓ z: one integer product, and sums of codes (arXiv 1712.05877, Eq. 7). Scales and
    zero points are one for all, or those of x per example and those of the kernel per output.

    Raises:
      ValueError: for scales that differ along the features: they cannot stand before the sum.
    """
    for name, operand, axis in (("x", x, 1), ("kernel", kernel, 0)):
        if operand.codes.ndim != 2 or (operand.scale.ndim and operand.scale.shape[axis] != 1):
            shapes = f"{name}: codes {operand.codes.shape}, scale {operand.scale.shape}"
            raise ValueError(f"{shapes}; give matrices with one scale for all features")
    product = jnp.matmul(x.codes, kernel.codes, preferred_element_type=jnp.int32)
    of_x, of_kernel = (a.codes.astype(jnp.int32).sum(i, keepdims=True) for a, i in ((x, 1), (kernel, 0)))
    n = x.codes.shape[1]
    total = product - x.zero_point * of_kernel - kernel.zero_point * of_x + n * x.zero_point * kernel.zero_point
    return total.astype(x.scale.dtype) * (x.scale * kernel.scale)


def integer_conv(
    x: Codes, kernel: Codes, strides: Sequence[int] = (1, 1), padding: str | Sequence[tuple[int, int]] = "SAME"
) -> Float[Array, "examples height width outputs"]:
    """The convolution of decode(x) and decode(kernel), NHWC and HWIO as in `nnx.Conv`, of integers that are summed in int32.

    Scales and zero points are one for all, or those of x per example and those of the kernel per output.

    Raises:
      ValueError: for scales that differ along what is summed: they cannot stand before the sum.
    """
    for name, operand, axes in (("x", x, (1, 2, 3)), ("kernel", kernel, (0, 1, 2))):
        shape = operand.scale.shape
        if operand.codes.ndim != 4 or (shape and any(shape[i] != 1 for i in axes)):
            raise ValueError(
                f"{name}: codes {operand.codes.shape}, scale {shape}; give four axes with one scale for all that is summed"
            )
    # Zero points are taken out first, so that padding is 0 and not a code.
    of_x, of_kernel = (a.codes.astype(jnp.int32) - a.zero_point for a in (x, kernel))
    height, width, _, outputs = of_kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(of_x.shape[1:3], (height, width), strides, padding)
    of_x = jnp.pad(of_x, [(0, 0), *padding, (0, 0)])
    rows, columns = ((of_x.shape[1 + i] - n) // strides[i] * strides[i] + 1 for i, n in enumerate((height, width)))
    patches = [  # and a matrix product, for GPUs have no convolution of int32
        of_x[:, i : i + rows : strides[0], j : j + columns : strides[1]] for i in range(height) for j in range(width)
    ]
    total = jnp.matmul(jnp.concatenate(patches, -1), of_kernel.reshape(-1, outputs))
    return total.astype(x.scale.dtype) * (x.scale * kernel.scale)
