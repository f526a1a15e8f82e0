"""Parameters that an inner loop stores on the grid."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maml.quantization.quantizer import Quantizer


def on_grid(quantizer: Quantizer, applies: Callable | None = None, key: Any = None) -> optax.GradientTransformation:
    """The last link of an inner optimizer's chain: the parameters after the step are on the grid, straight-through.

    θₜ₊₁ = Q(θₜ + updateₜ), as the update Q(θ + update) - θ. optax adds it to θ, so that it lands on the grid up to one rounding
    of that sum; exactly where both are multiples of one power of two that are near. The meta-parameters stay in full precision.

    Args:
      applies: (parameter) -> bool, which of them; those of two axes or more if None: kernels, not biases.
      key: for stochastic rounding, which unlike rounding to nearest does not lose updates below half a step. It is that of all
        tasks; for draws of their own make the chain inside of an `adapt`, from its key.

    Raises:
      ValueError: at the update, without parameters.
    """
    applies = applies or (lambda x: x.ndim > 1)

    def init(params):
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params=None: on_grid needs them; call optimizer.update(updates, state, params)")
        leaves, structure = jax.tree.flatten(params)
        keys = [
            None if key is None else jax.random.fold_in(jax.random.fold_in(key, state), i) for i in range(len(leaves))
        ]

        def land(update, x, key):
            return quantizer(x + update, key) - x if applies(x) else update

        landed = map(land, jax.tree.leaves(updates), leaves, keys)
        return structure.unflatten(list(landed)), state + 1

    return optax.GradientTransformation(init, update)
