"""Quantizers whose step is a parameter."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from maml.quantization.grids import check_bits, check_scale, codes_range, divisible
from maml.quantization.quantizer import Codes, straight_through


def lsq(x: Array, scale: Array | float, bits: int, signed: bool = True) -> Array:
    """LSQ: clip(x/s, -Qn, Qp), rounded straight-through, times s, for a step s that is learned (arXiv 1902.08153, Eq. 1 to 3).

    Qn, Qp are 2ᵇ⁻¹, 2ᵇ⁻¹ - 1, or 0, 2ᵇ - 1 unsigned; `uniform(bits, scale=s)` has the same (signed) values and gives the codes.
    The derivatives are the paper's in every mode: in x 1 strictly inside of the range, else 0; in s round(x/s) - x/s inside, -Qn
    or Qp at and beyond the ends. Second derivatives are zero.

    Departure: the gradient of s is not multiplied by 1/√(n Qp) here. In the graph, as g·s + stop(s - g·s), the factor would leave
    inner updates as they are meant and enter a meta-gradient a second time, with no error: the inner step's own derivative
    is scaled as well. It belongs to the inner optimizer, which may scale this parameter's updates by `lsq_gradient_scale`.

    Raises:
      ValueError: for bits that are not 1 to 8 (2 to 8 signed) or a scale that is not positive.
    """
    low, high = lsq_range(bits, signed)
    check_scale(scale)
    steps = x / scale
    ends = jnp.where(steps >= high, float(high), float(low)).astype(steps.dtype)
    steps = jnp.where((steps > low) & (steps < high), steps, ends)
    return straight_through(jnp.round)(steps) * scale


def lsq_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """(-Qn, Qp): the least and the largest integer of `lsq`."""
    if signed:
        return codes_range(bits)
    check_bits(bits, 1)
    return 0, 2**bits - 1


def lsq_gradient_scale(elements: int, bits: int, signed: bool = True) -> float:
    """1/√(n Qp) of arXiv 1902.08153, section 2.2, to scale the updates of a step that n elements share, in an optimizer."""
    return 1 / math.sqrt(elements * lsq_range(bits, signed)[1])


_POSITIVE = {
    "softplus": (jax.nn.softplus, lambda s: s + jnp.log(-jnp.expm1(-s))),
    "log": (jnp.exp, jnp.log),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """`lsq` of a free parameter: the step is softplus(parameter) or exp(parameter), which no gradient step makes negative."""

    bits: int
    signed: bool
    positive: tuple[Callable, Callable]

    def init(self, x: Array) -> Array:
        """The parameter, a scalar, whose step is 2 mean|x|/√Qp (arXiv 1902.08153, section 2.1)."""
        step = 2 * jnp.mean(jnp.abs(x)) / math.sqrt(lsq_range(self.bits, self.signed)[1])
        return self.positive[1](divisible(step))

    def scale(self, parameter: Array) -> Array:
        """The step."""
        return self.positive[0](parameter)

    @property
    def within(self) -> tuple[float, float]:
        """As of a `Quantizer`."""
        low, high = lsq_range(self.bits, self.signed)
        return low + self._zero - 0.5, high + self._zero + 0.5

    @property
    def _zero(self) -> int:
        return 0 if self.signed else -(2 ** (self.bits - 1))

    def encode(self, x: Array, parameter: Array) -> Codes:
        """The integers, of which those that are unsigned are kept in int8 with the zero point -2ᵇ⁻¹."""
        low, high = lsq_range(self.bits, self.signed)
        step = self.scale(parameter)
        codes = jnp.clip(jnp.round(x / step), low, high) + self._zero
        return Codes(codes.astype(jnp.int8), step, jnp.int32(self._zero))

    def __call__(self, x: Array, parameter: Array) -> Array:
        return lsq(x, self.scale(parameter), self.bits, self.signed)


def learned(bits: int, signed: bool = True, parametrization: str = "softplus") -> Learned:
    """A quantizer with a learned step; `init` makes its parameter.

    Raises:
      ValueError: for bits as in `lsq`, and a parametrization that is not softplus or log.
    """
    lsq_range(bits, signed)
    if parametrization not in _POSITIVE:
        raise ValueError(f"parametrization={parametrization!r}: give one of {', '.join(_POSITIVE)}")
    return Learned(bits, signed, _POSITIVE[parametrization])
