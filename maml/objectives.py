"""What is asked of the result of an inner loop: the outer problem, for one task."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maml.types import (
    Adapt,
    Adapted,
    Batch,
    Conditioned,
    Joint,
    Loss,
    MetaParams,
    Objective,
    Params,
    numbers,
    whole,
)

NORMS = ("batch", "support", "joint")


def query_loss(loss: Loss, adapt: Adapt, norm: str = "batch") -> Objective:
    """The loss of the adapted parameters on the query set: MAML's objective (arXiv 1703.03400, Eq. 2 of section 2.2).

    Args:
      norm: whose statistics batch norm uses on the query set. "batch": those of the query set itself (transductive, as in
        Finn's code); "support": those of the support set (inductive); "joint": of the support set and the one query example that
        is predicted (inductive, Reptile's "no transduction"). Models without batch norm do not see the difference.

    The metrics are the loss's own under `query/...`, and under `support/...` those before the first inner step.
    """
    check_norm(norm)

    def objective(meta_params, task, key, step):
        del step
        key_adapt, key_query = jax.random.split(key)
        adapted = adapt(loss, meta_params, task.support, key_adapt)
        params = with_norm(adapted.params, task.support, norm)
        value, metrics = loss(params, task.query, key_query)
        return value, _prefix("query", metrics) | _before(adapted)

    return objective


def multi_step_loss(
    loss: Loss, adapt: Adapt, weights: Callable[[jax.Array], Float[Array, " steps"]], norm: str = "batch"
) -> Objective:
    """Σᵢ wᵢ · (query loss after inner step i), i = 1..k: MAML++'s multi-step loss (Antoniou et al. 2019, arXiv 1810.09502).

    Args:
      weights: of the meta-step: `annealed_weights`, or any function of it; (0, ..., 0, 1) is `query_loss`.
      norm: as for `query_loss`.

    The metrics are those of `query_loss`, after the last step.

    Raises:
      ValueError: when traced, for other than one weight for each inner step, and an inner loop whose earlier steps have no
        derivative (`implicit`).
    """
    check_norm(norm)

    def objective(meta_params, task, key, step):
        key_adapt, key_query = jax.random.split(key)
        adapted = adapt(loss, meta_params, task.support, key_adapt)
        if "stationarity" in adapted.trace.metrics:  # what `implicit` reports, whatever stands around it
            raise ValueError(
                "multi_step_loss: of an implicit inner loop only the parameters after the last step have a derivative; take "
                "query_loss"
            )
        after = jax.tree.map(lambda x: x[1:], adapted.trace.params)
        of_steps = weights(step)
        if of_steps.shape != (steps := len(jax.tree.leaves(after)[0]),):
            raise ValueError(f"weights has shape {of_steps.shape}: give one for each of the {steps} inner steps")
        values, metrics = lax.map(lambda p: loss(with_norm(p, task.support, norm), task.query, key_query), after)
        last = {name: x[-1] for name, x in metrics.items()}
        return jnp.sum(of_steps * values), _prefix("query", last) | _before(adapted)

    return objective


def annealed_weights(steps: int, until: int, least: float = 0.03) -> Callable[[jax.Array], Float[Array, " steps"]]:
    """MAML++'s weights: 1/k each at meta-step 0, moving linearly to the last step alone until meta-step `until`.

    As in the authors' code each step before the last keeps least/k. (There an epoch of 500 meta-steps has one value; here each
    meta-step has its own.) From `until` on the last step counts alone, which is a jump, there too.

    Raises:
      ValueError: for fewer than one step, and a negative `until`.
    """
    if steps < 1 or until < 0:
        raise ValueError(f"steps={steps}, until={until}: give 1 inner step or more, and meta-steps, 0 or more")

    def weights(step):
        share = step / max(until, 1)
        early = jnp.maximum((1 - share) / steps, least / steps)
        last = jnp.minimum((1 + share * (steps - 1)) / steps, 1 - (steps - 1) * least / steps)
        annealing = jnp.full(steps, early).at[-1].set(last)
        return jnp.where(step < until, annealing, jnp.zeros(steps).at[-1].set(1.0))

    return weights


def switched(until: int, before: Objective, after: Objective) -> Objective:
    """One objective before a meta-step, another from it on; only the one that counts is computed (where tasks share the step).

    MAML++'s derivative-order annealing is `switched(until, query_loss(loss, first_order_loop), query_loss(loss, loop))`
    (arXiv 1810.09502, section 4). Both report the same metrics.
    """

    def objective(meta_params, task, key, step):
        return lax.cond(step < until, before, after, meta_params, task, key, step)

    objective.defines_update = any(getattr(part, "defines_update", False) for part in (before, after))
    return objective


def annealed(loss: Loss, adapt: Adapt, until: int, before: Callable, after: Callable) -> Objective:
    """`switched` for a config: `before` and `after` make objectives of (loss, adapt)."""
    return switched(until, before(loss, adapt), after(loss, adapt))


def parameter_distance(loss: Loss, adapt: Adapt, norm: str = "batch", last: int | None = None) -> Objective:
    """½ |θ - θ'|² with θ' the adapted parameters, taken as constants: its gradient is θ - θ', Reptile's update.

    Nichol et al. 2018 (arXiv 1803.02999), Algorithm 2; the outer optimizer is SGD with the outer step size ε. Inner loops may
    be of any length, for none of their steps is differentiated. Where an inner loop carries more than parameters from
    task to task (`inner_loop.carried_state`) the distance is that of all it carries.

    The metrics are those of `query_loss`; the query set takes no part in the update.

    Args:
      norm: as for `query_loss`.
      last: θ' is θ and what the last so many inner steps moved, in place of all: the sum of the last inner gradients. 1 is
        first-order MAML as in the authors' code, whose query set is the last minibatch.

    `objective.defines_update` says that this is no program whose derivative is meant: no Hessian, no central differences.

    Raises:
      ValueError: for another `norm` or `last`; when traced, for adapted parameters that are not shaped as the meta-parameters,
        and a `last` of more steps than the inner loop has.
    """
    check_norm(norm)
    if last is not None and not whole(last, 1):
        raise ValueError(f"last={last!r}: give inner steps, 1 or more, or None for all")

    def objective(meta_params, task, key, step):
        del step
        key_adapt, key_query = jax.random.split(key)
        if carried := getattr(adapt, "carried", None):
            adapted, end = carried(loss, meta_params, task.support, key_adapt)
        else:
            adapted = adapt(loss, meta_params, task.support, key_adapt)
            end = adapted.params
        if jax.tree.map(jnp.shape, end) != jax.tree.map(jnp.shape, meta_params):
            raise ValueError(
                "parameter_distance: this inner loop has parameters of its own, which no distance moves (learned step sizes, "
                "low_rank, per_step); use query_loss, or inner_loop.carried_state with no loop around it"
            )
        if last is not None:
            end = _last_moved(meta_params, end, adapted.trace.params, last)
        squares = jax.tree.map(lambda x, y: jnp.sum(jnp.square(x - lax.stop_gradient(y))), meta_params, end)
        value = jax.tree.reduce(jnp.add, squares) / 2
        params = lax.stop_gradient(with_norm(adapted.params, task.support, norm))
        _, metrics = loss(params, task.query, key_query)
        return value, _prefix("query", metrics) | _before(adapted)

    objective.defines_update = True
    return objective


def _last_moved(meta_params: Params, end: Params, path: Params, last: int) -> Params:
    """The meta-parameters, moved as in the last steps of the path [steps + 1, ...]; a carried state is that of the end."""
    steps = len(jax.tree.leaves(path)[0]) - 1
    if last > steps:
        raise ValueError(f"last={last}: the inner loop takes {steps} steps; give at most as many")
    start = meta_params.params if isinstance(meta_params, MetaParams) else meta_params
    moved = jax.tree.map(lambda x, xs: x + (xs[-1] - xs[-1 - last]), start, path)
    return end._replace(params=moved) if isinstance(end, MetaParams) else moved


def check_norm(norm: str) -> None:
    """ValueError for what is none of `NORMS`."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: give one of {', '.join(NORMS)}")


def with_norm(params: Params, support: Batch, norm: str) -> Params:
    """The parameters as they meet the query set: as they are, or with the support inputs as reference of batch norm."""
    if norm == "batch":
        return params
    return (Conditioned if norm == "support" else Joint)(params, support[0])


def _before(adapted: Adapted) -> dict[str, jax.Array]:
    """The metrics of the support set before the first step."""
    return _prefix("support", {k: v[0] for k, v in adapted.trace.metrics.items() if v.shape[0]})


def _prefix(name: str, metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
    return {f"{name}/{k}": v for k, v in numbers(metrics).items()}
