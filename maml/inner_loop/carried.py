"""An inner optimizer whose state outlives the task."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml.inner_loop.parts import composed, minibatches
from maml.inner_loop.unrolled import unroll
from maml.types import Adapt, Adapted, Loss, MetaParams, Params, Trace, own


class _WithState(NamedTuple):
    """Parameters, and the state of their optimizer as floats."""

    params: Params
    state: Any


def carried_state(optimizer: optax.GradientTransformation, steps: int, batch: int | None = None, **how: Any) -> Adapt:
    """`unroll` whose optimizer starts each task with the state that tasks before left: Adam's moments in Reptile's code.

    The state is among the meta-parameters, `MetaParams(params, state)`. `objectives.parameter_distance` asks for what it should
    become: `adapt.carried(loss, meta_params, support, key)` gives what `adapt` does, and parameters with state after the steps.
    An outer step of size 1 on it (`optax.partition` by `maml.types.roles`) makes it the mean over the tasks of a meta-batch. (In
    Reptile's code these tasks come one after the other, and each starts with what the one before left.) In evaluation every
    task starts with the state as it is.

    Args:
      batch: examples of a minibatch (`minibatches`); None for all.
      how: derivative, remat, precision of `unroll`.
    """
    adapt = unroll(_on_both(optimizer), steps, **how)
    if batch is not None:
        adapt = minibatches(batch, adapt)

    def carried(loss: Loss, params, support, key) -> tuple[Adapted, MetaParams]:
        adapted = adapt(composed(loss, lambda both: both.params), _WithState(*own(params)), support, key)
        end, path = adapted.params, adapted.trace.params
        return Adapted(end.params, Trace(path.params, adapted.trace.metrics)), MetaParams(*end)

    def adapt_plain(loss: Loss, params, support, key) -> Adapted:
        return carried(loss, params, support, key)[0]

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
        both: _WithState = params
        like = jax.eval_shape(optimizer.init, both.params)
        before = jax.tree.map(lambda x, kind: x.astype(kind.dtype), both.state, like)
        moved, new = optimizer.update(updates.params, before, both.params)
        return _WithState(moved, jax.tree.map(lambda n, x: n.astype(x.dtype) - x, new, both.state)), state

    return optax.GradientTransformation(init, update)
