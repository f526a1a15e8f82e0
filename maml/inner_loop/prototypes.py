"""A linear head made from the support set."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maml.inner_loop.parts import first_row, started
from maml.types import Adapt, Loss, Params, leaf_name

KINDS = ("euclidean", "cosine")


def with_prototypes(adapt: Adapt, kind: str = "euclidean", head: str = "head") -> Adapt:
    """Give the linear head the prototypes of the support set, then run `adapt`.

    With no inner steps this is a prototypical network (Snell et al. 2017, arXiv 1703.05175): the logit of class k is
    -|f(x) - cₖ|² = 2cₖᵀf(x) - |cₖ|² - |f(x)|², whose last term is the same for all classes (section 2.4). With inner steps it is
    ProtoMAML (Triantafillou et al. 2020, arXiv 1903.03096, section 3.1). Derivatives go through the prototypes, and no
    derivative to the head of the meta-parameters.

    Args:
      kind: "euclidean": cₖ is the mean of the features of class k. "cosine": the weights are the mean of features of length 1,
        without a bias: the labels of NIL (Raghu et al. 2020, arXiv 1909.09157, section 5.2, weighted by cosine similarity), up to
        the length of f(x), which changes no prediction.
      head: name of the linear layer in the model, `kernel` [features, ways] and `bias`. A task may have fewer ways than it:
        no example is then predicted to be of a class that has no support.

    Raises:
      ValueError: for another kind; when traced, for a loss without `features` (`models.functional` gives them where the model
        has a method `features`), a model without such a head, or features that do not fit it.
    """
    check_kind(kind)

    def place(loss: Loss, params: Params, support) -> Params:
        new = _prototypes(loss, first_row(adapt)(params), support, kind, head)

        def one(path, x):
            return new[_part(path, head)].astype(x.dtype) if _part(path, head) in new else x

        return jax.tree.map_with_path(one, params)

    adapt_from_prototypes: Any = started(place, adapt)
    adapt_from_prototypes.fewer_ways = True
    return adapt_from_prototypes


def _part(path: tuple, head: str) -> str | None:
    """ "kernel" or "bias", if it is that of the head."""
    *layer, name = leaf_name(path).split("/")
    return name if layer and layer[-1] == head else None


def check_kind(kind: str) -> None:
    """ValueError for what is none of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"prototypes: {kind!r}: give one of {', '.join(KINDS)}")


_ABSENT = -1e9
"""Bias of a class that the task has not: a head may be wider than a task."""


def _prototypes(loss: Loss, params: Params, support: Any, kind: str, head: str) -> dict[str | None, jax.Array]:
    """kernel [features, ways] and bias [ways] of the head."""
    features: Callable | None = getattr(loss, "features", None)
    parts = {_part(path, head): x for path, x in jax.tree.leaves_with_path(params)}
    if features is None:
        raise ValueError(
            "with_prototypes: the loss has no `features`: those of this library take them from a model with a method `features`; "
            "of a loss of your own set loss.features = apply.features"
        )
    if not {"kernel", "bias"} <= set(parts) or parts["kernel"].ndim != 2:
        raise ValueError(
            f"with_prototypes: needs a linear layer {head!r} with kernel and bias; this model has of {head!r} "
            f"{sorted(filter(None, parts)) or 'nothing'}"
        )
    inputs, labels, *weights = support
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"with_prototypes: labels are {labels.dtype}: prototypes are for classification, with integer labels"
        )
    seen = features(params, inputs)
    if kind == "cosine":
        square = jnp.sum(seen**2, -1, keepdims=True)
        seen = seen * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
    width, ways = parts["kernel"].shape
    if seen.shape != (len(labels), width):
        raise ValueError(
            f"with_prototypes: features {seen.shape} do not fit {len(labels)} labels and the head's {width} inputs"
        )
    members = jax.nn.one_hot(labels, ways, dtype=seen.dtype)
    present = members.any(0)
    if weights:  # on each example: `per_example.weighted`
        members = members * weights[0][:, None]
    means = members.T @ seen / jnp.where(present, members.sum(0), 1)[:, None]
    weights, biases = (means, jnp.zeros(ways)) if kind == "cosine" else (2 * means, -jnp.sum(means**2, -1))
    return {"kernel": weights.T, "bias": jnp.where(present, biases, _ABSENT)}
