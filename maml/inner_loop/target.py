"""An inner loop whose targets come from a slower copy of the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maml.derivatives import Derivative, Truncated, reverse
from maml.inner_loop.unrolled import unroll
from maml.losses import semi_gradient
from maml.types import Adapt, Adapted, Loss, Params, Trace, whole


class WithTarget(NamedTuple):
    """Parameters and the slower copy of them in which a target is computed."""

    online: Params
    target: Params


def target_network(
    optimizer: optax.GradientTransformation,
    steps: int,
    rate: float | jax.Array = 1.0,
    period: int = 1,
    derivative: Derivative | Truncated = reverse,
    remat: int | None = None,
    precision: str = "float32",
) -> Adapt:
    """`unroll` for a loss of two arguments (`losses.td0`) whose target is computed in a copy φ of the parameters.

    θₜ₊₁ = θₜ + update(∂₁L(θₜ, φₜ)), and after every `period`-th step φ moves to φ + rate · (θ - φ). A period alone is the target
    network of DQN (Mnih et al. 2015, Nature 518), a rate alone that of DDPG (arXiv 1509.02971, Algorithm 1); with neither φ is
    θ, and this is `unroll`. φ is state of the inner loop, not a constant: it starts as the meta-parameters, and the outer
    derivative goes through all that it was. The adapted parameters are θ.

    Args:
      rate: in (0, 1], or a traced scalar.
      derivative, remat, precision: as for `unroll`.

    Raises:
      ValueError: for a rate or a period outside of their range, and as `unroll`; when traced, for a loss that has no target.
    """
    if not whole(period, 1):
        raise ValueError(f"period={period!r}: give a whole number of steps, 1 or more")
    if isinstance(rate, int | float) and not 0 < rate <= 1:
        raise ValueError(f"rate={rate}: give a number above 0 and not above 1")
    adapt_both = unroll(_followed(optimizer, rate, period), steps, derivative, remat, precision)

    def adapt(loss: Loss, params, support, key) -> Adapted:
        two = getattr(loss, "two_argument", None)
        if two is None:
            raise ValueError(
                "target_network: this loss has no target; give one of two arguments (losses.semi_gradient)"
            )

        def of_both(both, targets, batch, key):
            return two(both.online, targets.target, batch, key)

        both: Any = semi_gradient(of_both)
        both.indexed = getattr(loss, "indexed", False)
        adapted = adapt_both(both, WithTarget(params, params), support, key)
        return Adapted(adapted.params.online, Trace(adapted.trace.params.online, adapted.trace.metrics))

    return adapt


def _followed(optimizer: optax.GradientTransformation, rate: Any, period: int) -> optax.GradientTransformation:
    """The optimizer for `WithTarget`: it moves the online parameters, and the target follows them."""

    def init(params):
        return jnp.zeros((), jnp.int32), optimizer.init(params.online)

    def update(updates, state, params=None):
        assert params is not None
        count, inner = state[0] + 1, state[1]
        moved, inner = optimizer.update(updates.online, inner, params.online)
        share = jnp.where(count % period == 0, rate, 0.0)
        following = jax.tree.map(
            lambda p, u, t: (share * (p + u - t)).astype(t.dtype), params.online, moved, params.target
        )
        return WithTarget(moved, following), (count, inner)

    return optax.GradientTransformation(init, update)
