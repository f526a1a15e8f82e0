"""The derivative of a quantizer, and what a quantizer is."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Codes(NamedTuple):
    """Integers and what they stand for: scale · (codes - zero_point), with codes int8 in the shape of what was encoded.

    `scale` and `zero_point` (int32) are scalars, or have one entry per channel and broadcast against the codes.
    """

    codes: Array
    scale: Array
    zero_point: Array


def decode(encoded: Codes) -> Array:
    """The numbers that the codes stand for, in the type of the scale."""
    codes, scale, zero_point = encoded
    return scale * (codes.astype(jnp.int32) - zero_point).astype(scale.dtype)


def identity(x: Array) -> Array:
    """The surrogate that passes every derivative through."""
    return x


def straight_through(f: Callable, surrogate: Callable = identity) -> Callable:
    """x -> f(x), with the derivatives of the surrogate y(x) in place of those of f: stop(f(x)) + (y(x) - stop(y(x))).

    The estimator of Bengio et al. 2013 (arXiv 1308.3432). The value is f(x) to the bit, also under jit; the usual
    x + stop(f(x) - x) is off the grid where f clips. Infinite inputs give NaN.

    What the derivative is: with the residual c = stop(f(x) - y(x)), derivatives of every order and mode are those of the
    frozen-residual model x -> y(x) + c. For a loss L and D = diag(y') the gradient of L(f(x)) is D ∇L(q) and its Hessian
    D ∇²L(q) D (for a y of straight pieces), at the quantized q = f(x): symmetric, and with all curvature of L. Through an inner
    loop θₜ₊₁ = θₜ - α Dₜ ∇L(qₜ) the meta-gradient is ∏(I - α Dₜ ∇²L(qₜ) Dₜ) D ∇L_query(q), the exact gradient of the program
    whose residuals are constants. The quantized program itself is constant almost everywhere: central differences of it are
    zero. A `custom_vjp` whose forward rule calls the bare quantizer has this gradient, and silently another second derivative.
    """

    def through(x):
        with jax.named_scope("straight_through"):  # by which `gradcheck.frozen` knows these stops from others
            y = surrogate(x := jnp.asarray(x))
            return lax.stop_gradient(f(lax.stop_gradient(x))) + (y - lax.stop_gradient(y))

    return through


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """x -> the nearest point of its grid, in x's shape and type, with the derivative of `surrogate`.

    `encode(x, key)` gives the `Codes`; scales found from x are in there, and so are constants of the derivative. `within`: the
    least and the largest x / scale + zero_point that is nowhere clipped, half a step beyond the codes at the ends.
    `key` is for stochastic rounding alone: give the forward pass and its gradient the same, every inner step another.
    `alone`: no example, of the first axis, changes the codes of another.
    """

    encode: Callable[..., Codes]
    within: tuple[float, float]
    surrogate: Callable = identity
    alone: bool = False

    def __call__(self, x, key=None):
        return straight_through(lambda x: decode(self.encode(x, key)).astype(x.dtype), self.surrogate)(x)
