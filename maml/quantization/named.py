"""Quantizers by bits and by name, for a config."""

from maml.quantization.grids import binary, uniform
from maml.quantization.learned import Learned, learned
from maml.quantization.quantizer import Quantizer

FULL = 32
"""The "bits" of what is not quantized."""


def kernel_quantizer(bits: int, scale: str = "channel") -> Quantizer | Learned | None:
    """For kernels, whose outputs are the last axis: None for 32 bits, `binary` for 1, else symmetric `uniform` or `learned`.

    `scale`: one per output feature ("channel"), one per kernel ("tensor"), or one per kernel that is a parameter ("learned").

    Raises:
      ValueError: for another scale, and bits that are not 1 to 8 or 32 (2 to 8 or 32 for "learned").
    """
    if scale not in ("channel", "tensor", "learned"):
        raise ValueError(f"scale={scale!r}: give channel, tensor or learned")
    if bits == FULL:
        return None
    if scale == "learned":
        return learned(bits)
    axis = -1 if scale == "channel" else None
    return binary(axis) if bits == 1 else uniform(bits, axis=axis)


def input_quantizer(bits: int | None) -> Quantizer | None:
    """For inputs of a layer: asymmetric, a range for each example, so that none changes another's codes. None for None and 32.

    The range is over all positions of a sequence: a causal model would see through it what is to come.
    """
    return None if bits in (None, FULL) else uniform(bits, symmetric=False, axis=0)
