"""The multi-layer perceptron."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """Linear layers with an optional norm and ReLU after each hidden one, and a linear head; inputs [batch, ...] are flattened.

    Finn et al. 2017: hidden (40, 40) without norm for the sinusoid, (256, 128, 64, 64) with batch norm for Omniglot.

    Args:
      norm: (features, rngs=) -> module, such as `partial(nnx.BatchNorm, use_scale=False)`, or None.
      kernel_init: initialiser of every kernel; biases start at zero.
      context: so many inputs more, which are parameters, start at zero, and are the same for all examples: those of CAVIA
        (Zintgraf et al. 2019, arXiv 1810.03642, section 3.1).
      hidden: widths; of an empty list the model is linear.

    Raises:
      ValueError: for widths below 1, and a negative context.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (40, 40),
        norm: Callable | None = None,
        kernel_init: Callable = nnx.initializers.truncated_normal(0.01),
        context: int = 0,
        rngs: nnx.Rngs,
    ):
        if not isinstance(hidden, Sequence) or any(n < 1 for n in hidden) or context < 0:
            raise ValueError(
                f"hidden={hidden}, context={context}: give a list of widths of 1 or more, and 0 inputs or more"
            )
        sizes = [math.prod(input_shape) + context, *hidden]
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=kernel_init, rngs=rngs) for n, m in itertools.pairwise(sizes)
        )
        self.head = nnx.Linear(sizes[-1], outputs, kernel_init=kernel_init, rngs=rngs)
        self.context = nnx.Param(jnp.zeros(context)) if context else None
        self.norms = nnx.List(norm(m, rngs=rngs) for m in hidden) if norm else None

    def features(self, inputs):
        """What the head sees, [batch, features]."""
        x = inputs.reshape(inputs.shape[0], -1)
        if self.context is not None:
            context = self.context[...]
            x = jnp.concatenate([x, jnp.broadcast_to(context, (len(x), *context.shape))], 1)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = nnx.relu(self.norms[i](x) if self.norms else x)
        return x

    def __call__(self, inputs):
        return self.head(self.features(inputs))
