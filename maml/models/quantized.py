"""Models whose layers multiply quantized kernels, and quantized inputs."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

_PRODUCTS = {nnx.Linear: "dot_general", nnx.Conv: "conv_general_dilated"}
"""The attribute of a layer that multiplies its inputs and its kernel."""


class QuantizedProduct(nnx.Module):
    """Takes the place of a layer's product: the same of the quantized operands.

    A quantizer of kernels with `init` (`quantization.learned`) has a parameter here, `scale`, made from the kernel.
    """

    def __init__(self, product: Callable, kernel: Any, kernels: Callable | None, inputs: Callable | None):
        self.product, self.kernels, self.inputs = product, kernels, inputs
        self.scale = nnx.Param(init(kernel)) if (init := getattr(kernels, "init", None)) else None

    @property
    def batch_statistics(self) -> bool:
        """Whether inputs are quantized by a range over the batch."""
        return self.inputs is not None and not getattr(self.inputs, "alone", False)

    def __call__(self, inputs, kernel, *args, **kwargs):
        if self.inputs is not None:  # a quantizer takes the first axis for the examples
            inputs = self.inputs(inputs) if inputs.ndim > 1 else self.inputs(inputs[None])[0]
        if self.kernels is not None:
            kernel = self.kernels(kernel) if self.scale is None else self.kernels(kernel, self.scale[...])
        return self.product(inputs, kernel, *args, **kwargs)


def quantize(
    model: nnx.Module, kernels: Callable | None = None, inputs: Callable | None = None, layers: str = ""
) -> nnx.Module:
    """A copy whose `nnx.Linear` and `nnx.Conv` layers quantize kernel and inputs in the forward pass, and not biases and norms.

    Parameters are stored in full precision under the paths they had, so that filters, optimizers and checkpoints go on. A
    learned scale is a new parameter, `.../dot_general/scale` or `.../conv_general_dilated/scale`. One inner step size is seldom
    right for kernels and scales: `only(nnx.Not(nnx.PathContains("scale")), ...)` leaves scales (those of norms too) to the
    outer loop.

    Args:
      kernels, inputs: from `maml.quantization`; None: in full precision.
      layers: regular expression that is searched in the paths of the kernels (`layers/0/kernel`); all by default.

    Raises:
      ValueError: for a pattern that finds no kernel, with the paths, and for a layer that is quantized already.
    """
    model = nnx.clone(model)
    found: dict[str, Any] = {
        _path(path): module for path, module in nnx.iter_modules(model) if isinstance(module, tuple(_PRODUCTS))
    }
    chosen = {path: layer for path, layer in found.items() if re.search(layers, path)}
    if not chosen:
        raise ValueError(f"layers={layers!r}: finds no kernel; the paths are {', '.join(found) or 'none'}")
    if kernels is None and inputs is None:
        return model
    for path, layer in chosen.items():
        name = next(name for kind, name in _PRODUCTS.items() if isinstance(layer, kind))
        product = getattr(layer, name)
        if isinstance(product, QuantizedProduct):
            raise ValueError(f"layers={layers!r}: {path} is quantized already; choose others")
        setattr(layer, name, nnx.data(QuantizedProduct(product, layer.kernel[...], kernels, inputs)))
    return model


def quantized(
    input_shape: Sequence[int],
    outputs: int,
    *,
    model: Callable,
    kernels: Callable | None = None,
    inputs: Callable | None = None,
    layers: str = "",
    rngs: nnx.Rngs,
    **arguments: Any,
) -> nnx.Module:
    """model(input_shape, outputs, rngs=rngs, **arguments), through `quantize`."""
    return quantize(model(input_shape, outputs, rngs=rngs, **arguments), kernels, inputs, layers)


def _path(path: tuple) -> str:
    return "/".join(map(str, (*path, "kernel")))
