"""The four-block convolutional networks of few-shot learning."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from maml.models.convolution import convolution


class Conv4(nnx.Module):
    """Four blocks of 3×3 convolution, norm, activation and, with `pool="max"`, 2×2 max-pool; then a linear head.

    Names that papers share for different networks (input_shape (height, width, channels)):
      Finn et al. 2017, Omniglot: filters=64, pool="stride", spatial="mean" (111,749 parameters + offsets at 5 ways);
      Reptile, iMAML, Omniglot: filters=64, pool="stride", spatial="flatten";
      Finn et al. 2017, mini-ImageNet: filters=32, pool="max", spatial="flatten"; MAML++ 48, ProtoNet 64 filters.

    Args:
      pool: "stride": the convolutions have stride 2; "max": stride 1 and max-pool (VALID: odd borders are cut).
      spatial: "mean": the mean over space goes to the linear head; "flatten": all features do.
      context: so many parameters that start at zero, of which a linear layer makes factors and offsets of the third
        convolution's (normalised) features: x (1 + γ) + β, CAVIA's FiLM (Zintgraf et al. 2019, arXiv 1810.03642, section 3.2 and
        appendix; there x γ + β).
      norm: (features, rngs=) -> module, such as `partial(nnx.BatchNorm, use_scale=False)`, or None.

    Raises:
      ValueError: for other values of pool and spatial, or images too small for four halvings.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 64,
        pool: str = "stride",
        spatial: str = "mean",
        norm: Callable | None = None,
        activation: Callable = nnx.relu,
        kernel_init: Callable = nnx.initializers.glorot_uniform(),
        head_init: Callable = nnx.initializers.glorot_uniform(),
        context: int = 0,
        rngs: nnx.Rngs,
    ):
        if pool not in ("stride", "max") or spatial not in ("mean", "flatten"):
            raise ValueError(f"pool={pool!r}, spatial={spatial!r}: pool is stride or max, spatial mean or flatten")
        if len(input_shape) != 3:
            raise ValueError(f"input_shape={tuple(input_shape)}: Conv4 takes images (height, width, channels)")
        height, width, channels = input_shape
        for _ in range(4):
            height, width = (-(-n // 2) if pool == "stride" else n // 2 for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(f"input_shape={tuple(input_shape)}: too small for four halvings")
        self.pool, self.spatial, self.activation = pool, spatial, activation
        self.convs = nnx.List(
            nnx.Conv(
                n, filters, (3, 3), strides=2 if pool == "stride" else 1, padding="SAME",
                kernel_init=kernel_init, conv_general_dilated=convolution, rngs=rngs,
            )
            for n in (channels, filters, filters, filters)
        )  # fmt: skip
        self.norms = nnx.List(norm(filters, rngs=rngs) for _ in range(4)) if norm else None
        if self.norms and isinstance(self.norms[0], nnx.BatchNorm):
            for conv in self.convs:
                conv.use_bias = (
                    False  # its bias stays a parameter, and need not be added: (x + b) - mean(x + b) = x - mean(x)
                )
        features = filters * (height * width if spatial == "flatten" else 1)
        self.head = nnx.Linear(features, outputs, kernel_init=head_init, rngs=rngs)
        self.context = nnx.Param(jnp.zeros(context)) if context else None
        self.film = nnx.Linear(context, 2 * filters, rngs=rngs) if context else None

    def features(self, inputs):
        """What the head sees, [batch, features]."""
        x = inputs
        for i, conv in enumerate(self.convs):
            x = self.norms[i](conv(x)) if self.norms else conv(x)
            if self.film and self.context is not None and i == 2:
                factor, offset = jnp.split(self.film(self.context[...])[None, None, None], 2, -1)
                x = x * (1 + factor) + offset
            if self.pool == "stride":
                x = self.activation(x)
            elif self.activation is nnx.relu:  # increasing, so it may come after the maximum: a quarter of the work
                x = self.activation(_max_pool(x))
            else:
                x = _max_pool(self.activation(x))
        return x.mean((1, 2)) if self.spatial == "mean" else x.reshape(x.shape[0], -1)

    def __call__(self, inputs):
        return self.head(self.features(inputs))


@jax.custom_jvp
def _max_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """2×2 max-pool (VALID: odd borders are cut); of equal values the first counts, as in TensorFlow.

    The derivative takes what stands at the place of the maximum, which comparisons find: always exactly one. That of `max`
    compares the maximum with its arguments: where a compiler computes one of them again with other roundings no argument is
    equal, and the derivative is lost (XLA on CPU does so in second order).
    """
    return _first_maximum(x)[0]


@_max_pool.defjvp
def _max_pool_jvp(primals, tangents):
    value = _max_pool(*primals)  # so that its second derivative comes by this rule too
    tangent, place = _windows(*tangents), _first_maximum(*map(lax.stop_gradient, primals))[1][:, :, None, :, None]
    # Counted where they are compared: an array of places would be read from memory, which XLA on CPU does one by one in a loop.
    row, column = (lax.broadcasted_iota(place.dtype, tangent.shape, axis) for axis in (2, 4))
    here = ((place >> 1) == row) & ((place & 1) == column)
    return value, jnp.where(here, tangent, jnp.zeros((), tangent.dtype)).sum((2, 4))


def _windows(x):
    """[batch, height, width, channels] to [batch, half height, 2, half width, 2, channels]."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2, x.shape[-1])


def _first_maximum(x):
    """The maximum of each 2×2 window and its place, 0..3 by rows. A NaN counts as the maximum."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [(x[:, i:height:2, j:width:2], jnp.int8(2 * i + j)) for i in (0, 1) for j in (0, 1)]

    def larger(a, b):
        first = (a[0] >= b[0]) | (a[0] != a[0])
        return tuple(jnp.where(first, p, q) for p, q in zip(a, b, strict=True))

    return functools.reduce(larger, corners)
