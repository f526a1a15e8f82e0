"""Dense Hessians whose rows have names, and functions of a part of the parameters."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from maml.types import Params, leaf_name

Function = Callable[[Params], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LabelledMatrix:
    """A symmetric matrix over all parameters, in the order of the leaves of their tree.

    Attributes:
      values: [parameters, parameters].
      layout: (path, number of parameters) of each leaf, such as ("layers/0/kernel", 40).
    """

    values: Float[Array, "parameters parameters"]
    layout: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})

    @property
    def labels(self) -> list[str]:
        """One for each row: "layers/0/kernel[3]", by index in the flattened leaf."""
        return [f"{path}[{i}]" for path, size in self.layout for i in range(size)]

    def block(self, rows: str, columns: str | None = None) -> Float[Array, "rows columns"]:
        """The rows and columns whose paths match these regular expressions (`re.search`); without `columns`, of the same.

        Raises:
          ValueError: for a pattern that matches no path.
        """
        return self.values[self._indices(rows)][:, self._indices(rows if columns is None else columns)]

    def _indices(self, pattern: str) -> Any:
        chosen = set(_matching([path for path, _ in self.layout], pattern))
        return jnp.concatenate([
            jnp.arange(start, start + size)
            for (path, size), start in zip(self.layout, _starts(self.layout), strict=True)
            if path in chosen
        ])  # fmt: skip


def _starts(layout: tuple[tuple[str, int], ...]) -> list[int]:
    return [sum(size for _, size in layout[:i]) for i in range(len(layout))]


def hessian(f: Function, params: Params, *, limit: float = 2e9) -> LabelledMatrix:
    """The dense Hessian: `jax.jacfwd(jax.grad(f))` on the parameters as one vector.

    Raises:
      ValueError: where it would take more than `limit` bytes.
    """
    flat, unravel = ravel_pytree(params)
    needed = flat.size**2 * flat.dtype.itemsize
    if needed > limit:
        raise ValueError(
            f"hessian: {flat.size} parameters make a matrix of {needed / 1e9:.3g} GB, over limit={limit / 1e9:.3g} GB: use "
            "lanczos(hvp(f, params), params, k, key), trace or diagonal, a part of the parameters (restricted), or a larger limit"
        )
    values = jax.jacfwd(jax.grad(lambda x: f(unravel(x))))(flat)
    return LabelledMatrix(values, tuple((path, x.size) for path, x in paths(params).items()))


def paths(params: Params) -> dict[str, jax.Array]:
    """Leaves by path, such as "layers/0/kernel"."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.flatten_with_path(params)[0]}


def _matching(names: list[str], pattern: str) -> list[str]:
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        raise ValueError(f"pattern {pattern!r} matches no parameter; the paths are {', '.join(names)}")
    return found


def restricted(f: Callable[[Params], Any], params: Params, pattern: str) -> tuple[Callable, dict[str, jax.Array]]:
    """f as a function of the parameters whose path matches a regular expression, the others fixed; and these parameters by path.

    For blocks: `hvp(*restricted(f, params, "layers/0"))`.

    Raises:
      ValueError: for a pattern that matches no path.
    """
    leaves, structure = paths(params), jax.tree.structure(params)
    part = {name: leaves[name] for name in _matching(list(leaves), pattern)}
    return lambda moving: f(structure.unflatten((leaves | dict(moving)).values())), part
