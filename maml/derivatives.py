"""How the inner gradient is computed, hence how the outer derivative passes through an inner step.

A derivative is a function: it takes a loss and gives `gradient(params, batch, key) -> (gradient, metrics)`. `unroll` takes it
as a value. It is not a flag of an algorithm: MAML and FOMAML differ in this value alone.
"""

from collections.abc import Callable

import jax
from jax import lax

from maml.types import Batch, Key, Loss, Metrics, Params

Gradient = Callable[[Params, Batch, Key], tuple[Params, Metrics]]
Derivative = Callable[[Loss], Gradient]


def reverse(loss: Loss) -> Gradient:
    """The gradient by reverse mode; the outer derivative of it is exact (second order).

    MAML, Finn et al. 2017 (arXiv 1703.03400), Eq. 1 and the meta-update of Algorithm 2.
    """

    def gradient(params, batch, key):
        grads, metrics = jax.grad(loss, has_aux=True)(params, batch, key)
        return grads, metrics

    return gradient


def first_order(loss: Loss) -> Gradient:
    """The same gradient, taken as a constant by the outer derivative: FOMAML.

    The inner step is then a translation of the parameters, whose Jacobian is the identity (arXiv 1703.03400, section 5.2;
    arXiv 1803.02999, section 2).
    """

    def gradient(params, batch, key):
        grads, metrics = jax.grad(loss, has_aux=True)(params, batch, key)
        return jax.tree.map(lax.stop_gradient, grads), metrics

    return gradient
