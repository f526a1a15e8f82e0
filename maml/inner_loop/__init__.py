"""How the parameters move: inner loops, for one task.

An inner loop is `unroll`, or another one around it: `only` a part of the parameters, step sizes that are `learned`, `low_rank`
adapters, ...
"""

from maml.inner_loop.carried import carried_state
from maml.inner_loop.learned import learned, learned_hyperparameters, learned_step_sizes
from maml.inner_loop.low_rank import low_rank
from maml.inner_loop.parts import from_zero, minibatches, only, per_step
from maml.inner_loop.prototypes import check_kind, with_prototypes
from maml.inner_loop.target import WithTarget, target_network
from maml.inner_loop.unrolled import unroll

__all__ = [
    "WithTarget", "carried_state", "check_kind", "from_zero", "learned", "learned_hyperparameters", "learned_step_sizes",
    "low_rank", "minibatches", "only", "per_step", "target_network", "unroll", "with_prototypes",
]  # fmt: skip
