"""An inner optimizer whose state outlives the task."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml.inner_loop.parts import composed, minibatches
from maml.inner_loop.unrolled import unroll
from maml.types import Adapt, Adapted, Loss, MetaParams, Params, Trace


class _WithState(NamedTuple):
    """Parameters, and the state of their optimizer as floats."""

    params: Params
    state: Any


def carried_state(optimizer: optax.GradientTransformation, steps: int, batch: int | None = None, **how: Any) -> Adapt:
    """`unroll` whose optimizer starts each task with the state that tasks before left: Adam's moments in Reptile's code.

    The state is among the meta-parameters, `MetaParams(params, state)`. `objectives.parameter_distance` asks for what it should
    become: `adapt.carried(loss, meta_params, support, key)` gives parameters and state after the steps. An outer step of
    size 1 on it (`optax.partition` by `maml.types.roles`) makes it the mean over the tasks of a meta-batch. (In Reptile's code
    these tasks come one after the other, and each starts with what the one before left.) In evaluation every task starts with the
    state as it is.

    Args:
      batch: examples of a minibatch (`minibatches`); None for all.
      how: derivative, remat, precision of `unroll`.
    """
    adapt = unroll(_on_both(optimizer), steps, **how)
    if batch is not None:
        adapt = minibatches(batch, adapt)

    def carried(loss: Loss, params: MetaParams, support, key) -> MetaParams:
        return MetaParams(*both(loss, params, support, key).params)

    def both(loss, params, support, key) -> Adapted:
        return adapt(composed(loss, lambda both: both.params), _WithState(*params), support, key)

    def adapt_plain(loss: Loss, params: MetaParams, support, key) -> Adapted:
        adapted = both(loss, params, support, key)
        return Adapted(adapted.params.params, Trace(adapted.trace.params.params, adapted.trace.metrics))

    def init(params, key):
        del key
        return MetaParams(params, jax.tree.map(_float, optimizer.init(params)))

    adapt_plain.init, adapt_plain.carried = init, carried
    return adapt_plain


def _float(x: jax.Array) -> jax.Array:
    """Counts are averaged over tasks and moved by the outer optimizer, as all meta-parameters: exact to 2²⁴ steps."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _on_both(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, on parameters together with its own state."""

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params: Any = None):
        both = params
        like = jax.eval_shape(optimizer.init, both.params)
        own = jax.tree.map(lambda x, kind: x.astype(kind.dtype), both.state, like)
        moved, new = optimizer.update(updates.params, own, both.params)
        return _WithState(moved, jax.tree.map(lambda n, x: n.astype(x.dtype) - x, new, both.state)), state

    return optax.GradientTransformation(init, update)
