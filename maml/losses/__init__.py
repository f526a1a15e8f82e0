"""Losses: each a factory from a forward function `apply(params, inputs)` to `loss(params, batch, key)`.

A loss that is a mean over examples carries `loss.per_example(params, batch, key) -> [examples]`, whose mean it is, and
`loss.batch_statistics`: whether the prediction of one example depends on the others (`maml.per_example` asks); and
`loss.features(params, inputs)`, what the model's head sees, where `apply` has it (`inner_loop.with_prototypes` asks). One whose
model sees other inputs than batch[0] says which: `loss.inputs(params, batch, key)` (`experiments.reuse` asks).
"""

from maml.losses.policies import policy_gradient as policy_gradient
from maml.losses.policies import rollout as rollout
from maml.losses.semi_gradients import partitioned as partitioned
from maml.losses.semi_gradients import semi_gradient as semi_gradient
from maml.losses.semi_gradients import td0 as td0
from maml.losses.supervised import cross_entropy as cross_entropy
from maml.losses.supervised import mse as mse
