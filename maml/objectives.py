"""What is asked of the result of an inner loop: the outer problem, for one task."""

import jax

from maml.types import Adapt, Batch, Conditioned, Loss, Metrics, Objective, Params

NORMS = ("batch", "support")


def query_loss(loss: Loss, adapt: Adapt, norm: str = "batch") -> Objective:
    """The loss of the adapted parameters on the query set: MAML's objective (arXiv 1703.03400, Eq. 2 of section 2.2).

    Args:
      norm: whose statistics batch norm uses on the query set. "batch": those of the query set itself (transductive, as in
        Finn's code); "support": those of the support set (inductive). Models without batch norm do not see the difference.

    The metrics are the loss's own under `query/...`, and under `support/...` those before the first inner step.
    """
    check_norm(norm)

    def objective(meta_params, task, key, step):
        del step
        key_adapt, key_query = jax.random.split(key)
        adapted = adapt(loss, meta_params, task.support, key_adapt)
        params = with_norm(adapted.params, task.support, norm)
        value, metrics = loss(params, task.query, key_query)
        before = {k: v[0] for k, v in adapted.trace.metrics.items() if v.shape[0]}
        return value, _prefix("query", metrics) | _prefix("support", before)

    return objective


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: give one of {', '.join(NORMS)}")


def with_norm(params: Params, support: Batch, norm: str) -> Params:
    """The parameters as they meet the query set: as they are, or with the support inputs as reference of batch norm."""
    return params if norm == "batch" else Conditioned(params, support[0])


def _prefix(name: str, metrics: Metrics) -> dict[str, jax.Array]:
    return {f"{name}/{k}": v for k, v in metrics.items()}
