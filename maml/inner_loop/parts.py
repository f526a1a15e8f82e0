"""Inner loops that move a part of the parameters, start elsewhere, or see another part of the data at each step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from maml.random import key_for
from maml.types import Adapt, Adapted, Indexed, Loss, MetaParams, Params, Trace, initial, padded, whole


def only(where: Any, adapt: Adapt, *, strict: bool = False) -> Adapt:
    """Run `adapt` on the parameters that `where` selects; the others stay, and are still differentiated by the outer loop.

    ANIL moves the head alone (Raghu et al. 2020, arXiv 1909.09157, section 4), BOIL all but the head (Oh et al. 2021, arXiv
    2008.08882), and Finn's code all but the norms.

    `where` is an NNX filter: a predicate (path, value) -> bool, `nnx.PathContains("head")`, `nnx.Not(...)`; the paths of a
    pytree that is no `nnx.State` are its dict keys, indices and field names.

    Raises:
      ValueError: for a filter by type or tag: arrays have none. When the adapted loop starts, if the filter selects nothing; with
        `strict` also if it selects everything.
    """
    selects = _by_path(where)

    def split(params: Params) -> tuple[Params, Callable[[Params], Params]]:
        leaves, structure = jax.tree.flatten_with_path(params)
        paths = [path_names(path) for path, _ in leaves]
        chosen = {path: x for path, (_, x) in zip(paths, leaves, strict=True) if selects(path, x)}
        if not chosen:
            raise ValueError(f"where={where!r} selects no parameter; the paths are {paths}")
        if strict and len(chosen) == len(paths):
            raise ValueError(f"where={where!r} selects every parameter, and some are to stay; the paths are {paths}")

        def join(moving: Params) -> Params:
            moved = traverse_util.flatten_dict(moving)
            return structure.unflatten(
                [moved.get(path or _ROOT, x) for path, (_, x) in zip(paths, leaves, strict=True)]
            )

        return traverse_util.unflatten_dict({path or _ROOT: x for path, x in chosen.items()}), join

    def partial_adapt(loss: Loss, params, support, key) -> Adapted:
        model, inner = params if isinstance(params, MetaParams) else (params, None)
        moving, join = split(model)
        adapted = adapt(composed(loss, join), moving if inner is None else MetaParams(moving, inner), support, key)
        trace = Trace(jax.vmap(join)(adapted.trace.params), adapted.trace.metrics)
        return Adapted(join(adapted.params), trace)

    def init(params, key):
        moving, join = split(params)
        made = initial(adapt, moving, key)
        return MetaParams(join(made.params), made.inner) if isinstance(made, MetaParams) else join(made)

    def seen_first(model):
        moving, join = split(model)
        return join(first_row(adapt)(moving))

    partial_adapt.init, partial_adapt.first_row = init, seen_first
    partial_adapt.moves_part = True
    return partial_adapt


def _by_path(where: Any) -> Callable[[tuple, Any], bool]:
    """The filter as a predicate of paths and arrays."""
    predicate = nnx.filterlib.to_predicate(where)
    parts = [predicate]
    for part in parts:
        if isinstance(part, nnx.filterlib.OfType | nnx.filterlib.WithTag):
            raise ValueError(
                f"where={where!r}: filters by type or tag see arrays, which have none; give paths, such as nnx.PathContains"
            )
        parts += [part.predicate] if isinstance(part, nnx.Not) else getattr(part, "predicates", ())
    return predicate


def first_row(adapt: Adapt) -> Callable[[Params], Params]:
    """From the parameters that an inner loop is given to those before its first step: `per_step` has rows of some."""
    return getattr(adapt, "first_row", lambda params: params)


_ROOT = ("",)
"""The path of the only leaf of a tree that is one array."""


def path_names(path: tuple) -> tuple:
    """A key path as dict keys, indices and field names."""
    return tuple(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)) for key in path)


def composed(loss: Loss, join: Callable[[Params], Params]) -> Loss:
    """The loss of join(moving), with all that inner loops ask of a loss."""
    return _seen(loss, lambda moving, _: join(moving), indexed=getattr(loss, "indexed", False))


def _seen(
    loss: Loss, params: Callable[[Params, Any], Params], batch: Callable = lambda batch: batch, *, indexed: bool
) -> Loss:
    """The loss of params(own, batch) on batch(own), with all that inner loops ask of a loss.

    For its features, which see inputs alone, it is params(own, None).
    """

    def of_own(own, given, key):
        return loss(params(own, given), batch(given), key)

    if two := getattr(loss, "two_argument", None):
        of_own.two_argument = lambda own, target, given, key: two(
            params(own, given), params(target, given), batch(given), key
        )
    if features := getattr(loss, "features", None):
        of_own.features = lambda own, inputs: features(params(own, None), inputs)
    of_own.indexed, of_own.is_gradient = indexed, getattr(loss, "is_gradient", True)
    return of_own


def started(start: Callable[[Loss, Params, Any], Params], adapt: Adapt) -> Adapt:
    """Run `adapt` from start(loss, params, support) in place of the model's parameters."""

    def adapt_from(loss: Loss, params, support, key) -> Adapted:
        if isinstance(params, MetaParams):
            params = MetaParams(start(loss, params.params, support), params.inner)
        else:
            params = start(loss, params, support)
        return adapt(loss, params, support, key)

    adapt_from.init, adapt_from.first_row = lambda params, key: initial(adapt, params, key), first_row(adapt)
    return adapt_from


def from_zero(adapt: Adapt) -> Adapt:
    """Start every task at zero, inside of `only`: context parameters in CAVIA (Zintgraf et al. 2019, arXiv 1810.03642, Eq. 2).

    What starts at zero is not meta-learned: its meta-gradient is zero.

    Raises:
      ValueError: around `only`, where all of the model would start at zero.
    """
    if getattr(adapt, "moves_part", False):
        raise ValueError(
            "from_zero: around only(...) the whole model would start at zero; give only(..., from_zero(...))"
        )
    return started(lambda loss, params, support: jax.tree.map(jnp.zeros_like, params), adapt)  # noqa: ARG005


def minibatches(size: int, adapt: Adapt) -> Adapt:
    """Each inner step sees `size` examples of the support set: Reptile (Nichol et al. 2018, arXiv 1803.02999, section 6.1).

    As in the authors' code the set is shuffled, taken in order, and shuffled anew when all were seen (a batch may hold the end of
    one shuffle and the start of the next); a set of at most `size` examples is taken whole. Shuffles depend on the task's key.

    Raises:
      ValueError: for a size below 1, and a loop that carries a state; when traced, for tasks of varied sizes.
    """
    if hasattr(adapt, "carried"):
        raise ValueError("minibatches: this loop carries a state from task to task; give its size to carried_state")
    if not whole(size, 1):
        raise ValueError(f"size={size!r}: give the examples of a minibatch, 1 or more")

    def adapt_on_minibatches(loss: Loss, params, support, key) -> Adapted:
        count = len(jax.tree.leaves(support)[0])
        if count <= size:
            return adapt(loss, params, support, key)
        if padded(support):
            raise ValueError(
                "minibatches: inputs are Padded, and absent examples would fill them: draw tasks of one size"
            )

        def part(indexed: Indexed):
            position = indexed.step * size + jnp.arange(size)
            shuffles = position[0] // count + jnp.arange(2)  # all that a batch can meet
            # By name: child i of a split key is the key folded with i, and a step gives its child to the loss.
            keys = jax.vmap(lambda i: key_for(indexed.key, "minibatches", i))(shuffles)
            orders = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
            chosen = orders[position // count - shuffles[0], position % count]
            batch = jax.tree.map(lambda x: x[chosen], indexed.batch)
            return _as_met(loss, indexed._replace(batch=batch))

        return adapt(_seen(loss, lambda params, _: params, part, indexed=True), params, support, key)

    adapt_on_minibatches.init = lambda params, key: initial(adapt, params, key)
    adapt_on_minibatches.first_row = first_row(adapt)
    return adapt_on_minibatches


def _as_met(loss: Loss, indexed: Indexed) -> Any:
    """What the loss asks for: the batch, or with it the number of the step."""
    return indexed if getattr(loss, "indexed", False) else indexed.batch


def per_step(where: Any, rows: int, adapt: Adapt) -> Adapt:
    """The parameters that `where` selects have a value of their own for each inner step: MAML++'s norms.

    "Per-step batch normalization weights and biases", Antoniou et al. 2019 (arXiv 1810.09502), section 4. As in the authors' code
    step i, and predictions after step i, use row i (of 1..rows), and predictions before the first step row 1. The rows are
    meta-parameters [rows, ...], equal at first, and at least one. Per-step running statistics are left out: in that code they
    normalise nothing.

    Let `adapt` not move these parameters: `per_step(norms, steps, only(nnx.Not(norms), ...))`.

    Raises:
      ValueError: for negative rows, or a filter that selects nothing; when traced, for more inner steps than rows.
    """
    if not whole(rows, 0):
        raise ValueError(f"rows={rows!r}: give a row for each inner step, 0 or more")
    selects = _by_path(where)

    def on_rows(f, params):
        """f of each leaf that has rows, in the parameters of the model."""

        def one(path, x):
            return f(x) if selects(path_names(path), x) else x

        return jax.tree.map_with_path(one, params)

    def at(params, step):
        return on_rows(lambda x: x[jnp.clip(step, 0, x.shape[0] - 1)], params)

    def adapt_with_rows(loss: Loss, params, support, key) -> Adapted:
        def row(params, indexed):
            return at(params, 0 if indexed is None else indexed.step)

        of_row = _seen(loss, row, lambda indexed: _as_met(loss, indexed), indexed=True)
        adapted, (path, metrics) = adapt(of_row, params, support, key)
        steps = len(jax.tree.leaves(path)[0]) - 1
        stacked = min(len(x) for x in _selected(adapted, selects))
        if steps > stacked:
            raise ValueError(
                f"per_step: {steps} inner steps and {stacked} rows of {where!r}; take at most {stacked} steps"
            )
        path = jax.vmap(at)(path, jnp.arange(-1, steps))
        return Adapted(at(adapted, steps - 1), Trace(path, metrics))

    def init(params, key):
        if not _selected(params, selects):
            raise ValueError(
                f"where={where!r} selects no parameter: per_step needs some, such as a model with batch norm"
            )
        made = initial(adapt, params, key)

        def stack(params):
            return on_rows(lambda x: jnp.repeat(x[None], max(rows, 1), 0), params)

        return MetaParams(stack(made.params), made.inner) if isinstance(made, MetaParams) else stack(made)

    adapt_with_rows.init, adapt_with_rows.first_row = init, lambda params: first_row(adapt)(at(params, 0))
    return adapt_with_rows


def _selected(params: Params, selects: Callable) -> list[jax.Array]:
    return [x for path, x in jax.tree.leaves_with_path(params) if selects(path_names(path), x)]
