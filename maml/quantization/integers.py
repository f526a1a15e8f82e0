"""Integers to leave with, and what a machine for integers computes from them."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from maml.quantization.diagnostics import selected
from maml.quantization.quantizer import Codes, Quantizer
from maml.types import Params


def export(params: Params, quantizer: Quantizer, where: str = "kernel") -> Mapping[str, Codes | Array]:
    """Every parameter by its path: those that the pattern finds as `Codes` (int8, scales, zero points), the others as they are.

    Raises:
      ValueError: for a pattern that finds nothing, with the paths.
    """
    found = {name: quantizer.encode(x) for name, x in selected(params, where).items()}
    return selected(params, "") | found


def integer_matmul(x: Codes, kernel: Codes) -> Float[Array, "examples outputs"]:
    """decode(x) @ decode(kernel) for codes [examples, features] and [features, outputs], with int8 products summed in int32.

    Σ(x - zₓ)(k - z) = Σxk - zₓ Σk - z Σx + n zₓ z: one integer product, and sums of codes (arXiv 1712.05877, Eq. 7). Scales and
    zero points are one for all, or those of x per example and those of the kernel per output.

    Raises:
      ValueError: for scales that differ along the features: they cannot stand before the sum.
    """
    for name, encoded, axis in (("x", x, 1), ("kernel", kernel, 0)):
        if encoded.codes.ndim != 2 or (encoded.scale.ndim and encoded.scale.shape[axis] != 1):
            shapes = f"{name}: codes {encoded.codes.shape}, scale {encoded.scale.shape}"
            raise ValueError(f"{shapes}; give matrices with one scale for all features")
    product = jnp.matmul(x.codes, kernel.codes, preferred_element_type=jnp.int32)
    of_x, of_kernel = (a.codes.astype(jnp.int32).sum(i, keepdims=True) for a, i in ((x, 1), (kernel, 0)))
    n = x.codes.shape[1]
    total = product - x.zero_point * of_kernel - kernel.zero_point * of_x + n * x.zero_point * kernel.zero_point
    return total.astype(x.scale.dtype) * (x.scale * kernel.scale)
