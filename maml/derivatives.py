"""How the inner gradient is computed, hence how the outer derivative passes through an inner step.

A derivative is a function: it takes a loss and gives `gradient(params, batch, key) -> (gradient, metrics)`. `unroll` takes it
as a value. It is not a flag of an algorithm: MAML and FOMAML differ in this value alone.

A loss may be of two arguments (`losses.semi_gradient`): its inner step follows the partial derivative in the first,
g(θ) = ∂₁L(θ, θ), and every derivative here then differentiates that field in both.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from maml.types import Batch, Key, Loss, Metrics, Params, equations, holds_semi_gradient, whole

Gradient = Callable[[Params, Batch, Key], tuple[Params, Metrics]]
Derivative = Callable[[Loss], Gradient]


def reverse(loss: Loss) -> Gradient:
    """The gradient by reverse mode, which the outer derivative transposes once more: reverse over reverse, exact.

    MAML, Finn et al. 2017 (arXiv 1703.03400), Eq. 1 and the meta-update of Algorithm 2.
    """
    partial_loss = _two_argument(loss)

    def gradient(params, batch, key):
        return jax.grad(partial_loss, has_aux=True)(params, params, batch, key)

    return gradient


def first_order(loss: Loss) -> Gradient:
    """The same gradient, taken as a constant by the outer derivative: FOMAML.

    The inner step is then a translation of the parameters, whose Jacobian is the identity (arXiv 1703.03400, section 5.2;
    arXiv 1803.02999, section 2).
    """
    of = reverse(loss)

    def gradient(params, batch, key):
        grads, metrics = of(params, batch, key)
        return jax.tree.map(lax.stop_gradient, grads), metrics

    return gradient


def mixed(loss: Loss) -> Gradient:
    """The gradient whose outer derivative is one forward-over-reverse product: MixFlow-MG, Kemaev et al. 2025 (arXiv 2505.00793).

    For a cotangent u of g = ∂₁L the products uᵀ ∂g/∂z, for z the parameters, the batch, and whatever else the loss depends
    on, are all found in one derivative along u: uᵀ ∂g/∂z = d/dε ∂L/∂z (θ + εu), by the symmetry of second derivatives. Exact, and
    equal to `reverse`. Values that the loss closes over are differentiated too. Metrics are not.

    An outer *forward* mode (`jax.jvp` of the objective) needs `reverse`. Where the loss holds an operation that cannot be
    differentiated forwards, the outer derivative falls back to reverse over reverse, with one warning that names it.
    """
    partial_loss = _two_argument(loss)
    said = set()  # warnings: an inner loop traces this gradient more than once

    def gradient(params, batch, key):
        # As a jaxpr the loss closes over nothing that is traced: those values are arguments, and get cotangents, too.
        closed, shape = jax.make_jaxpr(partial_loss, return_shape=True)(params, params, batch, key)
        if holds_semi_gradient(closed.jaxpr):
            raise ValueError(
                "derivative=mixed: this loss is made of a semi-gradient, whose Jacobian is not symmetric; make it by "
                "losses.semi_gradient itself, or take derivative=reverse"
            )
        leaves, structure = jax.tree.flatten((batch, key, closed.consts))
        inexact = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]

        def value(params, target, floats, others):
            floats, others = iter(floats), iter(others)
            batch, key, consts = structure.unflatten([next(floats if real else others) for real in inexact])
            outputs = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves((params, target, batch, key)))
            return jax.tree.unflatten(jax.tree.structure(shape), outputs)

        floats = [x for x, real in zip(leaves, inexact, strict=True) if real]
        others = [x for x, real in zip(leaves, inexact, strict=True) if not real]
        return _forward_over_reverse(value, said)(params, floats, others)

    return gradient


def _forward_over_reverse(value: Callable, said: set[str]) -> Callable:
    """(params, floats, others) -> (∂₁ value(params, params, floats, others), metrics), with the derivative of `mixed`."""
    partials = jax.grad(value, (0, 1, 2), has_aux=True)

    def plain(params, floats, others):
        return jax.grad(value, has_aux=True)(params, params, floats, others)

    field = jax.custom_vjp(plain)

    def forward(params, floats, others):
        def along(moved):
            return partials(moved, params, floats, others)

        try:
            (grads, _, _), product, metrics = jax.linearize(along, params, has_aux=True)
            if any(e.primitive.name == "custom_lin" for e, _ in equations(jax.make_jaxpr(product)(params).jaxpr)):
                raise TypeError("a custom_vjp")  # JAX would say so only when it lowers the program
        except (TypeError, NotImplementedError, ValueError) as error:
            _warn(value, (params, params, floats, others), error, said)
            grads, pull, metrics = jax.vjp(lambda p, f: plain(p, f, others), params, floats, has_aux=True)
            return (grads, metrics), _Pull(pull, transposed=True)
        return (grads, metrics), _Pull(product, transposed=False)

    def backward(pull, cotangents):
        if pull.transposed:
            return *pull.by(cotangents[0]), None
        of_params, of_target, of_floats = pull.by(cotangents[0])
        return jax.tree.map(jnp.add, of_params, of_target), of_floats, None

    field.defvjp(forward, backward)
    return field


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pull:
    """A linear function with what it remembers, and whether it is the transposed one already."""

    by: Callable
    transposed: bool = dataclasses.field(metadata={"static": True})


def _warn(value: Callable, arguments: tuple, error: Exception, said: set[str]) -> None:
    jaxpr = jax.make_jaxpr(jax.grad(value, has_aux=True))(*arguments).jaxpr
    names = sorted(set(_without_forward_mode(jaxpr))) or [str(error).splitlines()[0]]
    message = (
        f"derivative=mixed: {', '.join(names)} cannot be differentiated forwards, so the outer derivative of this loss is "
        "reverse over reverse: the same value, more memory. Give the operation a jvp, or derivative=reverse"
    )
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=2)


def _without_forward_mode(jaxpr: Any) -> Iterator[str]:
    for eqn, jaxprs in equations(jaxpr):
        if "custom_vjp" in eqn.primitive.name:
            info = getattr(jaxprs[0], "debug_info", None) if jaxprs else None
            yield getattr(info, "func_name", None) or eqn.primitive.name
        elif eqn.primitive.name == "pure_callback" or (not jaxprs and eqn.primitive not in ad.primitive_jvps):
            yield eqn.primitive.name


def in_bfloat16(derivative: Derivative) -> Derivative:
    """The same derivative of a loss that is computed in bfloat16; parameters, gradients and updates stay as wide as they are.

    Parameters and batch are rounded at each inner step. What the loss closes over (what `only` leaves alone) and the statistics
    of batch norm stay wide, and so do the products that they are in: where the head alone moves, none is in bfloat16. A
    meta-gradient can be far more sensitive than a gradient: at a random Conv-4 with batch norm a relative change of 2⁻⁹ of the
    parameters alone turns it by 15 degrees.
    """

    def rounded(loss: Loss) -> Gradient:
        gradient = derivative(loss)

        def wide_gradient(params, batch, key):
            wide = jnp.result_type(*jax.tree.leaves(params))
            params, batch = _cast((params, batch), wide, jnp.bfloat16)
            return _cast(gradient(params, batch, key), jnp.bfloat16, wide)

        return wide_gradient

    return rounded


def _cast(tree: Any, source: Any, target: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(target) if jnp.result_type(x) == source else x, tree)


class Truncated(NamedTuple):
    """Derivatives of the parts of an inner loop: first order until `last` steps before the end, then `derivative`."""

    last: int
    derivative: Derivative


def truncated(last: int, derivative: Derivative = mixed) -> Truncated:
    """Second order in the last steps alone: truncated back-propagation, Shaban et al. 2019 (arXiv 1810.10667), section 3.

    The Jacobians of the steps before are taken as the identity, as in FOMAML, which is `truncated(0)`; with `last` not below
    the number of steps it is `derivative`. Memory is that of `last` steps.

    Raises:
      ValueError: for a negative or fractional number of steps.
    """
    if not whole(last, 0):
        raise ValueError(f"last={last!r}: give a whole number of inner steps, 0 or more")
    return Truncated(last, derivative)


def pieces(derivative: Derivative | Truncated, steps: int) -> list[tuple[int, Derivative]]:
    """The derivative of each run of inner steps: (number of steps, derivative), in order.

    Raises:
      ValueError: for `truncated` itself.
    """
    if getattr(derivative, "func", derivative) is truncated:  # a config has it as a partial
        raise ValueError(
            "truncated: say how many steps, truncated(3); in a config "
            "algorithm.derivative._partial_=false +algorithm.derivative.last=3"
        )
    if not isinstance(derivative, Truncated):
        return [(steps, derivative)]
    last = min(derivative.last, steps)
    parts = [(steps - last, first_order), (last, derivative.derivative)]
    return [(n, d) for n, d in parts if n] or parts[:1]


def _two_argument(loss: Loss) -> Callable:
    """(params, target, batch, key) -> (value, metrics): a semi-gradient's own loss, or one that has no target."""
    two = getattr(loss, "two_argument", None)
    return two or (lambda params, target, batch, key: loss(params, batch, key))  # noqa: ARG005
