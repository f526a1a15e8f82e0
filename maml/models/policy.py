"""Policies: from a state to the parameters of a distribution of actions."""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from maml.models.mlp import MLP


class GaussianPolicy(nnx.Module):
    """States [batch, ...] to (mean, log standard deviation), each [batch, actions]: an `MLP`, and one number for each action.

    Finn et al. 2017 (arXiv 1703.03400), appendix A.2: hidden (100, 100), ReLU. Standard deviations do not depend on the state,
    are parameters too, and stay above 1e-6, as in the authors' code.

    Args:
      initial_std: above 0.
      hidden, kernel_init, context: as of `MLP`.

    Raises:
      ValueError: for an initial_std of 0 or less, and as `MLP`.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (100, 100),
        initial_std: float = 1.0,
        kernel_init: Callable = nnx.initializers.glorot_uniform(),
        context: int = 0,
        rngs: nnx.Rngs,
    ):
        if not initial_std > 0:
            raise ValueError(f"initial_std={initial_std}: give a standard deviation above 0")
        self.mean = MLP(input_shape, outputs, hidden=hidden, kernel_init=kernel_init, context=context, rngs=rngs)
        self.log_std = nnx.Param(jnp.full(outputs, math.log(initial_std)))

    def __call__(self, states):
        mean = self.mean(states)
        return mean, jnp.broadcast_to(jnp.maximum(self.log_std[...], math.log(1e-6)), mean.shape)
