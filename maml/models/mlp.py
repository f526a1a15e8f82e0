"""The multi-layer perceptron."""

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
        *sizes, last = [math.prod(input_shape) + context, *hidden]
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=kernel_init, rngs=rngs)
            for n, m in zip([*sizes], [*sizes[1:], last], strict=True)
        )
        self.head = nnx.Linear(last, outputs, kernel_init=kernel_init, rngs=rngs)
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
