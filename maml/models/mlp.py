"""The multi-layer perceptron."""

import math
from collections.abc import Callable, Sequence

from flax import nnx


class MLP(nnx.Module):
    """Linear layers with an optional norm and ReLU after each hidden one; inputs [batch, ...] are flattened first.

    Finn et al. 2017: hidden (40, 40) without norm for the sinusoid, (256, 128, 64, 64) with batch norm for Omniglot.

    Args:
      norm: (features, rngs=) -> module, such as `partial(nnx.BatchNorm, use_scale=False)`, or None.
      kernel_init: initialiser of every kernel; biases start at zero.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        hidden: Sequence[int] = (40, 40),
        norm: Callable | None = None,
        kernel_init: Callable = nnx.initializers.truncated_normal(0.01),
        rngs: nnx.Rngs,
    ):
        sizes = [math.prod(input_shape), *hidden, outputs]
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=kernel_init, rngs=rngs) for n, m in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.norms = nnx.List(norm(m, rngs=rngs) for m in hidden) if norm else None

    def __call__(self, inputs):
        x = inputs.reshape(inputs.shape[0], -1)
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x)
            x = nnx.relu(self.norms[i](x) if self.norms else x)
        return self.layers[-1](x)
