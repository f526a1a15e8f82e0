"""A small transformer over symbols: the example of a model that is neither convolutional nor an MLP."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Causal self-attention of some heads (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1), without biases."""

    def __init__(self, width: int, heads: int, *, kernel_init: Callable, rngs: nnx.Rngs):
        self.heads = heads
        self.inputs = nnx.Linear(width, 3 * width, use_bias=False, kernel_init=kernel_init, rngs=rngs)
        self.outputs = nnx.Linear(width, width, use_bias=False, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x):
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        each = self.inputs(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = (each[:, :, i] for i in range(3))
        scores = jnp.einsum("bthf,bshf->bhts", query, key) / (width // self.heads) ** 0.5
        seen = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
        return self.outputs(jnp.einsum("bhts,bshf->bthf", weights, value).reshape(x.shape))


class Transformer(nnx.Module):
    """Symbols [batch, tokens] to logits of the next one [batch, tokens, outputs]; blocks with the norm first.

    Args:
      outputs: the number of symbols, of inputs and outputs alike.
      width, heads, layers: of the blocks; the hidden layer of a block has four times the width.
      kernel_init: initialiser of every kernel; embeddings of symbols and positions are normal with deviation 0.02 of their own.

    Raises:
      ValueError: for inputs that are no sequences of whole numbers, and a width that the heads do not divide.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        width: int = 32,
        heads: int = 2,
        layers: int = 2,
        kernel_init: Callable = nnx.initializers.glorot_uniform(),
        rngs: nnx.Rngs,
    ):
        if len(input_shape) != 1:
            raise ValueError(
                f"input_shape={tuple(input_shape)}: a transformer takes sequences of symbols [tokens]; give task=markov"
            )
        if width % heads:
            raise ValueError(f"width={width}, heads={heads}: give a width that is a multiple of the heads")
        how = {"kernel_init": kernel_init, "rngs": rngs}
        start = nnx.initializers.normal(0.02)
        self.symbols = nnx.Param(start(rngs.params(), (outputs, width)))  # nnx.Embed would round to float32
        self.positions = nnx.Param(start(rngs.params(), (input_shape[0], width)))
        self.attention = nnx.List(Attention(width, heads, **how) for _ in range(layers))
        self.inner = nnx.List(nnx.Linear(width, 4 * width, **how) for _ in range(layers))
        self.outer = nnx.List(nnx.Linear(4 * width, width, **how) for _ in range(layers))
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2 * layers + 1))
        self.head = nnx.Linear(width, outputs, **how)

    def features(self, inputs):
        """What the head sees, [batch, tokens, width]."""
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs are {inputs.dtype}: a transformer takes symbols, whole numbers; give task=markov")
        x = self.symbols[...][inputs] + self.positions[: inputs.shape[1]][None]
        for i, (attention, inner, outer) in enumerate(zip(self.attention, self.inner, self.outer, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + outer(nnx.gelu(inner(self.norms[2 * i + 1](x))))
        return self.norms[-1](x)

    def __call__(self, inputs):
        return self.head(self.features(inputs))
