"""The contract: one record and four signatures. Everything else in the library is a value that satisfies one of them.

Everything is written for one task. Many tasks are a map (`jax.vmap`, a sequential map, chunks), which is a choice of
execution and never of mathematics, so no signature here has a batch-of-tasks axis except the sampler's result.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

Params = PyTree
"""A pytree of arrays: a dict, an `nnx.State`, Linen variables. optax works on all of them."""

Batch = PyTree
"""What a loss consumes. The supervised losses of this library take a pair (inputs, targets)."""

Key = jax.Array
"""A typed PRNG key, `jax.random.key(seed)`."""

Metrics = Mapping[str, jax.Array]
"""Scalars to look at, by name. They are never differentiated."""


SEMI_GRADIENT = "semi_gradient"
"""The `jax.named_scope` of what `losses.semi_gradient` holds constant."""


class Task(NamedTuple):
    """One draw of the task distribution: what the learner adapts on, and what it is judged on."""

    support: Batch
    query: Batch


class Transitions(NamedTuple):
    """A batch of transitions sₜ₋₁ → sₜ of a Markov reward process: what a temporal-difference loss consumes.

    `inputs_tm1` and `inputs_t` [batch, ...] describe the states before and after; `reward_t`, and `discount_t` where it is
    given, are shaped as the values that are predicted. A discount of 0 says that the process ended in sₜ.
    """

    inputs_tm1: PyTree
    reward_t: PyTree
    inputs_t: PyTree
    discount_t: PyTree = None


class Padded(NamedTuple):
    """Inputs filled up to one size, so that tasks of different ways and shots have one shape: `tasks.episodes(least_ways=)`.

    `inputs` [batch, ...]; `present` [batch] bool: which of them there are; `ways` [batch] int32: the classes of their task. An
    `apply` from `maml.models.functional` keeps the absent ones out of batch norm, and `losses.cross_entropy` out of its means,
    where it knows no class from `ways` on. The labels of absent ones are -1.
    """

    inputs: Array
    present: Array
    ways: Array


def whole(value: Any, least: int) -> TypeGuard[int]:
    """Whether a value is a whole number, `least` or more: Python's or NumPy's, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def padded(batch: Batch) -> bool:
    """Whether a part of a batch is `Padded`."""
    return any(isinstance(x, Padded) for x in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Padded)))


class Trace(NamedTuple):
    """What happened in the inner loop of k steps.

    `params` are those before the first step and after steps 1..k, leaves [k + 1, ...]; `metrics` the loss's metrics on the
    support set before steps 1..k, leaves [k]. The compiler removes what nobody reads: the record is free where it is not used.
    """

    params: Params
    metrics: Metrics


class Adapted(NamedTuple):
    """The result of an inner loop: the adapted parameters, to be carried on, and the trace, to be looked at."""

    params: Params
    trace: Trace


class MetaParams(NamedTuple):
    """What the outer optimizer moves where an inner loop has parameters of its own: the model's, and those (step sizes, ...).

    Such an `Adapt` takes it in place of plain parameters, and makes it from them: `adapt.init(params, key)`. What comes out of
    the inner loop are plain parameters of the model.
    """

    params: Params
    inner: PyTree


class Indexed(NamedTuple):
    """A support set as a loss with `loss.indexed` meets it in an inner step: with the number of the step, and the task's key."""

    batch: Batch
    step: jax.Array
    key: Key


class Conditioned(NamedTuple):
    """Parameters together with the inputs whose batch statistics normalise whatever they are applied to.

    An `apply` from `maml.models.functional` takes this in place of plain parameters. With the support inputs as
    `reference` predictions are *inductive*: each query example is predicted alone, so that none can change another's.
    Plain parameters are *transductive*: batch norm uses the statistics of the batch at hand.
    """

    params: Params
    reference: PyTree


class Joint(NamedTuple):
    """As `Conditioned`, but each input is normalised in one batch with the reference: Reptile's "no transduction"."""

    params: Params
    reference: PyTree


@runtime_checkable
class Apply(Protocol):
    """A pure forward function: (params, inputs [batch, ...]) -> outputs [batch, ...]."""

    def __call__(self, params: Params, inputs: Any, /) -> Any: ...


@runtime_checkable
class Loss(Protocol):
    """The learner's problem on one batch.

    The key is there for dropout, minibatches and rollouts, so that they need no second signature; a loss that needs
    none deletes it on its first line.
    """

    def __call__(self, params: Params, batch: Batch, key: Key, /) -> tuple[Float[Array, ""], Metrics]: ...


@runtime_checkable
class Adapt(Protocol):
    """The inner loop, for one task."""

    def __call__(self, loss: Loss, params: Params, support: Batch, key: Key, /) -> Adapted: ...


def leaf_name(path: tuple) -> str:
    """A key path as "layers/0/kernel", without the `value` at the end of an NNX variable's own."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def initial(adapt: Adapt, params: Params, key: Key) -> Params:
    """The meta-parameters of an inner loop on a model's parameters: these, or what the loop makes of them (`MetaParams`)."""
    make = getattr(adapt, "init", None)
    return make(params, key) if make else params


def own(meta_params: Params) -> "MetaParams":
    """The meta-parameters of an inner loop that has some of its own.

    Raises:
      ValueError: for plain parameters of a model.
    """
    if not isinstance(meta_params, MetaParams):
        raise ValueError(
            f"this inner loop takes MetaParams, and got {type(meta_params).__name__}: make them with "
            "maml.types.initial(adapt, params, key)"
        )
    return meta_params


def numbers(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The metrics of a loss as arrays.

    Raises:
      ValueError: for what is no number or array, naming it.
    """
    for name, value in metrics.items():
        if not isinstance(value, jax.Array | np.ndarray | np.number | bool | int | float):
            raise ValueError(
                f"metric {name!r} is of type {type(value).__name__}: metrics of a loss are numbers by name; take it apart"
            )
    return {name: jnp.asarray(value) for name, value in metrics.items()}


def roles(meta_params: Params) -> Params:
    """Labels for `optax.partition`: "params" on the model's parameters, "inner" on what an inner loop adds to them."""
    if not isinstance(meta_params, MetaParams):
        return jax.tree.map(lambda _: "params", meta_params)
    return MetaParams(*(jax.tree.map(lambda _, role=r: role, getattr(meta_params, r)) for r in MetaParams._fields))


@runtime_checkable
class Objective(Protocol):
    """The outer problem, for one task. `step` is the meta-step, for objectives that anneal."""

    def __call__(
        self, meta_params: Params, task: Task, key: Key, step: jax.Array, /
    ) -> tuple[Float[Array, ""], Metrics]: ...


@runtime_checkable
class Sampler(Protocol):
    """Keys [tasks] to a `Task` whose leaves have the leading axis [tasks]; pure and jittable.

    A sampler that holds data is a `jax.tree_util.Partial`, so that the data enter a compiled program as an argument.
    """

    def __call__(self, keys: Key, /) -> Task: ...


def as_argument(sampler: Sampler) -> Sampler:
    """A sampler as a pytree, so that the arrays it holds enter a compiled program as arguments, not as constants."""
    return sampler if isinstance(sampler, jax.tree_util.Partial) else jax.tree_util.Partial(sampler)


def of_model(objective: Objective, gradient: Params) -> Params:
    """A meta-gradient, of an objective that defines an update the model's part: what a loop carries has none."""
    carries = getattr(objective, "defines_update", False) and isinstance(gradient, MetaParams)
    return gradient.params if carries else gradient


def equations(jaxpr: Any) -> Iterator[tuple[Any, list]]:
    """Each equation with the jaxprs it holds, and so on inside of them."""
    for eqn in jaxpr.eqns:
        inner = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
        jaxprs = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        yield eqn, jaxprs
        for inner in jaxprs:
            yield from equations(inner)


def holds_semi_gradient(jaxpr: Any) -> bool:
    """Whether a loss is made of a semi-gradient as of any other function, so that its own attributes do not tell."""
    return any(SEMI_GRADIENT in str(eqn.source_info.name_stack) for eqn, _ in equations(jaxpr))
