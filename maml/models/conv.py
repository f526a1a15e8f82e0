"""The four-block convolutional networks of few-shot learning."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class Conv4(nnx.Module):
    """Four blocks of 3×3 convolution, norm, activation and, with `pool="max"`, 2×2 max-pool; then a linear head.

    Names that papers share for different networks (input_shape (height, width, channels)):
      Finn et al. 2017, Omniglot: filters=64, pool="stride", head="mean" (111,749 parameters + offsets at 5 ways);
      Reptile, iMAML, Omniglot: filters=64, pool="stride", head="flatten";
      Finn et al. 2017, mini-ImageNet: filters=32, pool="max", head="flatten"; MAML++ 48, ProtoNet 64 filters.

    Args:
      pool: "stride": the convolutions have stride 2; "max": stride 1 and max-pool (VALID: odd borders are cut).
      head: "mean": the mean over space goes to the linear head; "flatten": all features do.
      norm: (features, rngs=) -> module, such as `partial(nnx.BatchNorm, use_scale=False)`, or None.

    Raises:
      ValueError: for other values of pool and head, or images too small for four halvings.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 64,
        pool: str = "stride",
        head: str = "mean",
        norm: Callable | None = None,
        activation: Callable = nnx.relu,
        kernel_init: Callable = nnx.initializers.glorot_uniform(),
        head_init: Callable = nnx.initializers.glorot_uniform(),
        rngs: nnx.Rngs,
    ):
        if pool not in ("stride", "max") or head not in ("mean", "flatten"):
            raise ValueError(f"pool={pool!r}, head={head!r}: pool is stride or max, head mean or flatten")
        if len(input_shape) != 3:
            raise ValueError(f"input_shape={tuple(input_shape)}: Conv4 takes images (height, width, channels)")
        height, width, channels = input_shape
        for _ in range(4):
            height, width = (-(-n // 2) if pool == "stride" else n // 2 for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(f"input_shape={tuple(input_shape)}: too small for four halvings")
        self.pool, self.head, self.activation = pool, head, activation
        self.convs = nnx.List(
            nnx.Conv(
                n, filters, (3, 3), strides=2 if pool == "stride" else 1, padding="SAME",
                kernel_init=kernel_init, conv_general_dilated=_convolution(), rngs=rngs,
            )
            for n in (channels, filters, filters, filters)
        )  # fmt: skip
        self.norms = nnx.List(norm(filters, rngs=rngs) for _ in range(4)) if norm else None
        features = filters * (height * width if head == "flatten" else 1)
        self.linear = nnx.Linear(features, outputs, kernel_init=head_init, rngs=rngs)

    def __call__(self, inputs):
        x = inputs
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = self.activation(self.norms[i](x) if self.norms else x)
            x = _max_pool(x) if self.pool == "max" else x
        x = x.mean((1, 2)) if self.head == "mean" else x.reshape(x.shape[0], -1)
        return self.linear(x)


def _max_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """2×2 max-pool (VALID: odd borders are cut); of equal values the first counts, as in TensorFlow.

    Not by `max`, whose derivative compares the maximum with its arguments: where a compiler computes one of them again with
    other roundings no argument is equal, and the derivative is lost (XLA on CPU does so in second order). A choice by
    a comparison has always exactly one derivative, of any order and mode.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return functools.reduce(lambda a, b: jnp.where((a >= b) | (a != a), a, b), corners)


def _convolution() -> Callable:
    """XLA's convolution where it is fast in every derivative; patches and a matrix product on CPU."""
    return _patches_convolution if jax.default_backend() == "cpu" else lax.conv_general_dilated


def _patches_convolution(x, kernel, strides, padding, **unused):
    """`lax.conv_general_dilated` (NHWC, HWIO, no dilation) as nine shifted slices and one matrix product.

    On CPU XLA's derivative of a convolution with respect to its kernel is tens of times slower than the product below.
    """
    del unused
    size, (sh, sw) = kernel.shape[:2], strides
    pads = lax.padtype_to_pads(x.shape[1:3], size, strides, padding) if isinstance(padding, str) else padding
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    high, wide = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], size, strides, strict=True))
    shifts = [
        x[:, i : i + sh * (high - 1) + 1 : sh, j : j + sw * (wide - 1) + 1 : sw]
        for i in range(size[0])
        for j in range(size[1])
    ]
    patches = jnp.concatenate(shifts, axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])
