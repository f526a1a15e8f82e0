"""Quantizers whose grid is fixed, or found from what they quantize."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from maml.quantization.quantizer import Codes, Quantizer, identity
from maml.types import whole


def uniform(
    bits: int,
    *,
    symmetric: bool = True,
    axis: int | None = None,
    scale: Any = None,
    zero_point: int = 0,
    clip: bool = False,
    stochastic: bool = False,
) -> Quantizer:
    """Equally spaced points: codes of -2ᵇ⁻¹ ... 2ᵇ⁻¹ - 1 (Jacob et al. 2018, arXiv 1712.05877, Eq. 1 and section 3).

    Args:
      bits: 2 to 8.
      symmetric: the largest |x| is the largest code and zero the code 0; or else the range of x and zero takes all codes, and
        zero is one of them.
      axis: channels of this axis have each a scale of their own (-1: output features of kernels, 0: examples); None: one for all.
      scale: the step, a positive number or an array that broadcasts, in place of one found from each x; codes are then
        clip(round(x / scale) + zero_point), and `symmetric` and `axis` say nothing.
      clip: with a fixed scale: the derivative is zero where x lies outside of the grid; or else it is one everywhere. Where
        the scale is found from x nothing lies outside by more than half a step, and the derivative is one.
      stochastic: rounds up with the probability of the fractional part, so that the mean is x inside of the grid (outside of an
        asymmetric one lies up to half a step, at one end); calls need a key.

    Raises:
      ValueError: for other bits, a scale that is not positive, a zero point that is no code, clip without a fixed scale; at the
        call for an axis that x has not, and where a key is missing.
    """
    low, high = codes_range(bits)
    if scale is None and (clip or zero_point):
        raise ValueError(
            f"clip={clip}, zero_point={zero_point}: they need a fixed scale; give scale=... or leave them out"
        )
    if not low <= zero_point <= high:
        raise ValueError(f"zero_point={zero_point}: give a code of {bits} bits, {low} to {high}")
    if scale is not None:
        check_scale(scale)

    def grid(x):
        if scale is not None:
            return jnp.asarray(scale, x.dtype), jnp.asarray(zero_point, jnp.int32)
        return (_symmetric if symmetric else _asymmetric)(x, axis, low, high)

    def encode(x, key=None):
        step, zero = grid(x := wide(x))
        whole = _either_side(x / step, key) if stochastic else jnp.round(x / step)
        codes = jnp.clip(whole + zero.astype(x.dtype), low, high)
        return Codes(codes.astype(jnp.int8), step, zero)

    def inside(x):
        step, zero = (lax.stop_gradient(a).astype(x.dtype) for a in grid(wide(x)))
        return _where_inside(x, (low - zero) * step, (high - zero) * step)

    alone = scale is not None or axis == 0
    return Quantizer(encode, (low - 0.5, high + 0.5), inside if clip else identity, alone)


def binary(axis: int | None = None, clip: bool = False) -> Quantizer:
    """mean|x| · sign(x), with sign(0) = 1: XNOR-Net's weights (Rastegari et al. 2016, arXiv 1603.05279, Eq. 6).

    `axis` as in `uniform`. `clip`: the derivative is zero where |x| > 1 (Hubara et al. 2016, arXiv 1602.02830, Eq. 4).
    """

    def encode(x, key=None):
        del key
        codes = jnp.where(x >= 0, 1, -1).astype(jnp.int8)
        return Codes(codes, jnp.mean(jnp.abs(wide(x)), _others(x, axis), keepdims=True), jnp.zeros((), jnp.int32))

    surrogate = (lambda x: _where_inside(x, -1.0, 1.0)) if clip else identity
    return Quantizer(encode, (-2.0, 2.0), surrogate, axis == 0)


def ternary(axis: int | None = None) -> Quantizer:
    """s · sign(x) where |x| > 0.7 mean|x|, else zero; s the mean of |x| there (Li et al. 2016, arXiv 1605.04711, Eq. 5 and 6)."""

    def encode(x, key=None):
        del key
        size, over = jnp.abs(wide(x)), _others(x, axis)
        large = size > 0.7 * jnp.mean(size, over, keepdims=True)
        count = jnp.maximum(jnp.sum(large, over, keepdims=True), 1)
        scale = jnp.sum(jnp.where(large, size, 0), over, keepdims=True) / count.astype(size.dtype)
        return Codes(jnp.where(large, jnp.sign(x), 0).astype(jnp.int8), scale, jnp.zeros((), jnp.int32))

    return Quantizer(encode, (-1.5, 1.5), alone=axis == 0)


def _symmetric(x, axis, low, high):
    del low
    return divisible(jnp.max(jnp.abs(x), _others(x, axis), keepdims=True) / high), jnp.zeros((), jnp.int32)


def _asymmetric(x, axis, low, high):
    over = _others(x, axis)
    least, most = (jnp.minimum(jnp.min(x, over, keepdims=True), 0), jnp.maximum(jnp.max(x, over, keepdims=True), 0))
    step = divisible((most - least) / (high - low))
    return step, jnp.clip(jnp.round(low - least / step), low, high).astype(jnp.int32)


def _either_side(steps, key):
    """The whole number below or above, whose mean is `steps`."""
    if key is None:
        raise ValueError("stochastic=True: the quantizer draws at each call; give quantizer(x, key)")
    return jnp.floor(steps + jax.random.uniform(key, steps.shape, steps.dtype))


def divisible(size):
    """A step that can be divided by, also for an array of zeros."""
    return jnp.where(size >= jnp.finfo(size.dtype).tiny, size, 1)


def _where_inside(x, low, high):
    """x with derivative 1 from low to high, both included (`jnp.clip` has ½ there), and 0 outside."""
    return jnp.where((x >= low) & (x <= high), x, lax.stop_gradient(x))


def wide(x):
    """At least float32: in bfloat16 a code could not be told from the next."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _others(x, axis: int | None) -> tuple[int, ...]:
    """All axes but this one."""
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis={axis}: an array of shape {x.shape} has no such axis; give one that it has, or None")
    return tuple(i for i in range(x.ndim) if axis is None or i != axis % x.ndim)


def check_bits(bits: Any, least: int) -> None:
    """ValueError for other than a whole number from `least` to 8."""
    if not whole(bits, least) or bits > 8:
        one = " (one bit is `binary`)" if bits == 1 else ""
        raise ValueError(f"bits={bits!r}: give a whole number from {least} to 8{one}")


def codes_range(bits: Any) -> tuple[int, int]:
    """The least and the largest signed code."""
    check_bits(bits, 2)
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check_scale(scale: Any) -> None:
    """ValueError for steps that are not positive, where they are known."""
    if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
        raise ValueError(f"scale={scale}: give positive steps")
