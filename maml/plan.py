"""What a compiled program costs, found without running it, and which of several to take under a budget of memory."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

Name = TypeVar("Name")


def flops(function: Callable, *arguments: Any) -> int:
    """The floating-point operations of one call, counted in its jaxpr; arguments may be `jax.ShapeDtypeStruct`."""
    return count(jax.make_jaxpr(function)(*arguments))


def count(jaxpr: Any) -> int:
    """The floating-point operations of a jaxpr, as it is written: before the compiler removes or fuses any.

    A product of matrices and a convolution have two for each product of elements (a convolution those on its padding too, not
    those on the holes of a dilated input), a reduction of n elements to m has n - m, every other operation one for each element
    that it gives; moving, selecting, conditions and integers cost nothing. A scan has its body times its length, a `while` its
    body once (its length is not known), a `cond` the dearest branch.
    """
    return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn: Any) -> int:
    name = eqn.primitive.name
    if name in _PRODUCTS:
        return 2 * _PRODUCTS[name](eqn) if _inexact(eqn.outvars[0]) else 0
    if name == "cond":
        return max(map(count, eqn.params["branches"]))
    if name.startswith(_REDUCTIONS):
        if not _inexact(eqn.invars[0]):
            return 0
        before, after = _size(eqn.invars[0]), _size(eqn.outvars[0])
        if window := eqn.params.get("window_dimensions"):  # the smaller side has an element for each window
            return (math.prod(window) - 1) * min(before, after)
        return before if name.startswith("cum") else before - after
    if name.startswith("scatter"):  # adding (or the like) is one for each update; setting is none
        return _size(eqn.invars[2]) if name != "scatter" and _inexact(eqn.invars[2]) else 0
    if inner := _jaxprs(eqn.params):
        return (eqn.params["length"] if name == "scan" else 1) * sum(map(count, inner))
    return 0 if name in _FREE else sum(_size(x) for x in eqn.outvars if _inexact(x))


def _jaxprs(params: Mapping[str, Any]) -> list[Any]:
    """Those that a primitive calls: of a jit, a scan, a while, a custom derivative, a rematerialised block."""
    values = [x for p in params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
    return [x for x in values if hasattr(getattr(x, "jaxpr", x), "eqns")]


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _inexact(variable: Any) -> bool:
    return jax.numpy.issubdtype(getattr(variable.aval, "dtype", np.int32), np.inexact)


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)


def _xla_convolution(eqn: Any) -> int:
    """Pairs of an output and an element of its window, in each spatial dimension, times those that are no space."""
    how, (_, kernel), (out,) = eqn.params, (x.aval.shape for x in eqn.invars), (x.aval.shape for x in eqn.outvars)
    _, of_kernel, of_out = how["dimension_numbers"]
    total = out[of_out[0]] * out[of_out[1]] * kernel[of_kernel[1]]
    sides = zip(of_out[2:], of_kernel[2:], how["window_strides"], how["padding"], strict=True)
    dilations = zip(how["lhs_dilation"], how["rhs_dilation"], strict=True)
    for (o, k, stride, (low, _)), (holes, spread) in zip(sides, dilations, strict=True):
        positions = np.add.outer(np.arange(out[o]) * stride, np.arange(kernel[k]) * spread) - low
        total *= int(np.count_nonzero(positions % holes == 0))
    return total


def _convolution(outputs: int | None, kernel: int | None) -> Callable[[Any], int]:
    """`models.convolution`: products for an operation whose y and k are the operands of those numbers, or (None) the result."""

    def products(eqn):
        y, k = ((eqn.outvars[0] if i is None else eqn.invars[i]) for i in (outputs, kernel))
        return _size(y) * math.prod(k.aval.shape[1:4])  # a window of k for each element of y

    return products


_PRODUCTS = {
    "dot_general": _dot,
    "conv_general_dilated": _xla_convolution,
    "conv": _convolution(None, 1),
    "conv_input": _convolution(0, 1),
    "conv_kernel": _convolution(1, None),
}

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_window", "arg", "cum", "select_and")

_FREE = {
    *("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "dynamic_slice", "pad", "gather"),
    *("dynamic_update_slice", "concatenate", "rev", "stack", "unstack", "split", "select_n", "sort", "top_k", "iota"),
    *("convert_element_type", "bitcast_convert_type", "reduce_precision", "copy", "copy_p", "device_put", "empty"),
    *("real", "imag", "complex", "stop_gradient", "name", "optimization_barrier", "sharding_constraint", "reshard"),
}
"""What moves or selects elements and computes none."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one meta-step takes: operations, and bytes as the compiler reserves them.

    Args:
      chunk: tasks that are mapped together.
      arguments, outputs, temporaries, aliased: bytes; those aliased are outputs in the place of arguments.
    """

    chunk: int
    flops: int
    arguments: int
    outputs: int
    temporaries: int
    aliased: int = 0

    @property
    def peak(self) -> int:
        """Bytes that are there at the same time: arguments, outputs and temporaries, what is aliased once."""
        return self.arguments + self.outputs + self.temporaries - self.aliased

    def fits(self, memory_gb: float | None) -> bool:
        """Whether the peak is within so many GB (10⁹ bytes); None: without limit."""
        return memory_gb is None or self.peak / 1e9 <= memory_gb


def cost(traced: jax.stages.Traced, chunk: int) -> Cost:
    """Compile a traced program (`jax.jit(f).trace(...)`), not to be run, and read XLA's own account of its memory.

    On CPU the machine code is not optimised, in a third of the time: memory is laid out before there is any.
    """
    options: dict[str, str | bool] | None = (
        {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    )
    memory = traced.lower().compile(options).memory_analysis()
    names = ("argument", "output", "temp", "alias")
    return Cost(chunk, count(traced.jaxpr), *(int(getattr(memory, f"{name}_size_in_bytes")) for name in names))


def preference(chunk: int, flops: int, auto: int) -> tuple[int, int]:
    """Sorts candidates by the time that they are expected to take, least first; see `choose`."""
    return abs(chunk - auto), flops


def choose(costs: Mapping[Name, Cost], memory_gb: float | None, *, auto: int) -> Name:
    """The name of the candidate that is expected to be the fastest of those whose peak fits.

    Nothing is run, so that the same config chooses the same on the same machine. First comes the chunk of tasks nearest to
    `auto`, `train.chunk_size("auto", ...)`: the best one as measured on the backend. Where that is a single task (larger networks
    on CPU: batched products with a kernel per task are slow) smaller chunks are faster, where it is all of them (small networks,
    GPU, TPU: the loop leaves the device idle) larger ones are. A worse chunk can cost a multiple, a derivative or
    rematerialisation at most about half: so those, by their FLOPs, decide between equal chunks alone. Then the lower peak, then
    the first.

    Args:
      memory_gb: GB (10⁹ bytes) for arguments, outputs and temporaries of a meta-step; None: no limit.

    Raises:
      ValueError: when none fits, with the smallest budget in which one does.
    """
    fitting = [name for name, cost in costs.items() if cost.fits(memory_gb)]
    if not fitting:
        name, least = min(costs.items(), key=lambda item: item[1].peak)
        smallest = f"{smallest_gb(least.peak):g}"
        raise ValueError(f"memory_gb={memory_gb}: no way to compute a meta-step fits; give {smallest} or more ({name})")
    return min(fitting, key=lambda name: (*preference(costs[name].chunk, costs[name].flops, auto), costs[name].peak))


def smallest_gb(peak: int) -> float:
    """GB (10⁹ bytes) in which so many bytes fit: four digits, rounded up."""
    unit = 10 ** max(0, len(str(peak)) - 4)
    return -(-peak // unit) * unit / 1e9
