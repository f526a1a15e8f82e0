"""How the parameters move: the inner loop, for one task."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maml.derivatives import Derivative, Truncated, equations, in_bfloat16, pieces, reverse
from maml.losses import semi_gradient
from maml.types import Adapt, Adapted, Loss, Params, Trace

_GRADIENT = "inner_gradient"
"""The name under which rematerialisation finds what it keeps."""

_TINY = 1e-15
"""Small against any gradient that matters; its square is still a normal float32 number."""


_SMOOTH = frozenset(
    ("add", "sub", "mul", "neg", "convert_element_type", "broadcast_in_dim", "stop_gradient", "jit", "pjit")
)
"""Operations whose derivatives are finite everywhere."""

_SMALL = 10_000
"""Parameters below which the overhead of a loop weighs more than its steps."""


def unroll(
    optimizer: optax.GradientTransformation,
    steps: int,
    derivative: Derivative | Truncated = reverse,
    remat: int | None = None,
    precision: str = "float32",
) -> Adapt:
    """An inner loop of `steps` updates of any optax optimizer, under `lax.scan`.

    θₜ₊₁ = θₜ + update(∇L(θₜ; support)), t = 0..steps-1; with `optax.sgd(α)` this is MAML's inner loop (arXiv 1703.03400,
    Eq. 1). The optimizer's state starts afresh for each task. Zero steps give the parameters back.

    Args:
      derivative: how the outer derivative passes through a step: `derivatives.reverse`, `mixed`, `first_order`, `truncated(k)`.
      remat: rematerialise blocks of so many steps: the backward pass keeps the parameters (and the optimizer's state) between
        blocks alone, and computes each block again; inner gradients are kept where the optimizer needs them, as in MixFlow-MG
        (arXiv 2505.00793). Memory is steps/remat · |θ| and what `remat` steps take. None: everything is kept.
      precision: "bfloat16": inner losses and their gradients are computed in it (`derivatives.in_bfloat16`), the parameters and
        all that the outer loop sees stay in float32.

    Raises:
      ValueError: at the call of this factory, for a negative or fractional number of steps, a block of none, another precision.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps={steps!r}: the inner loop takes a whole number of steps, 0 or more")
    if remat is not None and (not isinstance(remat, int) or isinstance(remat, bool) or remat < 1):
        raise ValueError(f"remat={remat!r}: give the steps of a block, 1 or more, or None to keep everything")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision={precision!r}: give float32 or bfloat16")

    def adapt(loss: Loss, params, support, key) -> Adapted:
        def run(of: Derivative):
            gradient = (in_bfloat16(of) if precision == "bfloat16" else of)(loss)

            def step(carry, key):
                params, state = carry
                grads, metrics = gradient(params, support, key)
                grads = checkpoint_name(grads, _GRADIENT)
                updates, state = _update(optimizer, grads, state, params)
                params = optax.apply_updates(params, updates)
                return (params, state), Trace(params, metrics)

            return step

        carry, keys, traces = (params, optimizer.init(params)), jax.random.split(key, steps), []
        for count, of in pieces(derivative, steps):
            carry, trace = _repeat(run(of), carry, keys[:count], remat)
            keys, traces = keys[count:], [*traces, trace]
        return Adapted(carry[0], _joined(traces))

    return adapt


def _repeat(step, carry, keys, remat: int | None):
    """`lax.scan` of a step over keys, in rematerialised blocks.

    The first step stands outside of the scan: there all tasks share the parameters, and a map over tasks keeps them shared. A few
    steps of a small network are written out, which takes half the time.
    """
    steps = len(keys)
    if steps == 0:
        return lax.scan(step, carry, keys)

    def block(carry, keys):
        return lax.scan(step, carry, keys) if len(keys) > 1 else _single(step, carry, keys)

    if remat is None:
        carry, first = _single(step, carry, keys)
        size = sum(x.size for x in jax.tree.leaves(carry[0]))
        carry, rest = lax.scan(step, carry, keys[1:], unroll=size <= _SMALL and steps <= 10)
        return carry, _joined([first, rest])
    size = min(remat, steps)
    count = (steps - 1) // size  # whole blocks after the first, which takes what is left over
    left = steps - count * size
    carry, first = _rematerialised(block, prevent_cse=True)(carry, keys[:left])
    carry, rest = lax.scan(_rematerialised(block), carry, keys[left:].reshape(count, size))
    return carry, _joined([first, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rest)])


def _rematerialised(block, *, prevent_cse: bool = False):
    policy = jax.checkpoint_policies.save_only_these_names(_GRADIENT)
    return jax.checkpoint(block, policy=policy, prevent_cse=prevent_cse)


def _single(step, carry, keys):
    carry, trace = step(carry, keys[0])
    return carry, jax.tree.map(lambda x: x[None], trace)


def _joined(traces: Sequence[Trace]) -> Trace:
    """Traces end to end."""
    return traces[0] if len(traces) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *traces)


def _update(optimizer: optax.GradientTransformation, grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
    """The optimizer's update and state: their values at the gradient, their derivatives 1e-15 beside it where it is zero.

    Adam and its kin take the root of a running mean of squares, and norms the root of a sum: at zero the derivative of the
    root is infinite, and the chain rule gives inf · 0 = NaN in the meta-gradient (optax #882), although the map from gradient to
    update has a derivative there. The values are optax's own to the bit. An optimizer that only adds and multiplies, as SGD and
    momentum do, needs no second update.
    """
    made = jax.make_jaxpr(optimizer.update)(grads, state, params)
    if all(eqn.primitive.name in _SMOOTH for eqn, _ in equations(made.jaxpr)):
        return optimizer.update(grads, state, params)
    values = optimizer.update(*jax.tree.map(lax.stop_gradient, (grads, state, params)))
    beside = jax.tree.map(lambda g: g + lax.stop_gradient(jnp.where(g == 0, _TINY, 0).astype(g.dtype)), grads)
    moved = optimizer.update(beside, state, params)

    def join(value, moved):
        # `value` may still depend on what the optimizer closes over (learned step sizes): their derivative is that of `moved`.
        real = jnp.issubdtype(moved.dtype, jnp.inexact)
        return lax.stop_gradient(value) + (moved - lax.stop_gradient(moved)) if real else value

    return jax.tree.map(join, values, moved)


def only(where: Any, adapt: Adapt) -> Adapt:
    """Run `adapt` on the parameters that `where` selects; the others stay, and are still differentiated by the outer loop.

    `where` is an NNX filter: a predicate (path, value) -> bool, `nnx.PathContains("head")`, `nnx.Not(...)`; the paths of a
    pytree that is no `nnx.State` are its dict keys, indices and field names.

    Raises:
      ValueError: when the adapted loop starts, if the filter selects nothing.
    """
    selects = nnx.filterlib.to_predicate(where)

    def partial_adapt(loss: Loss, params, support, key) -> Adapted:
        leaves, structure = jax.tree.flatten_with_path(params)
        paths = [tuple(map(_name, path)) for path, _ in leaves]
        moving = {i: x for i, (_, x) in enumerate(leaves) if selects(paths[i], x)}
        if not moving:
            raise ValueError(f"where={where!r} selects no parameter; the paths are {paths}")

        def join(moving) -> Params:
            return structure.unflatten([moving.get(i, x) for i, (_, x) in enumerate(leaves)])

        adapted = adapt(composed_with(loss, join), moving, support, key)
        trace = Trace(jax.vmap(join)(adapted.trace.params), adapted.trace.metrics)
        return Adapted(join(adapted.params), trace)

    return partial_adapt


def composed_with(loss: Loss, join) -> Loss:
    """The loss of join(moving), also where it is one of two arguments."""

    def composed(moving, batch, key):
        return loss(join(moving), batch, key)

    if two := getattr(loss, "two_argument", None):
        composed.two_argument = lambda moving, target, batch, key: two(join(moving), join(target), batch, key)
    return composed


def _name(key) -> Any:
    """The dict key, index or field name in an entry of a key path."""
    return next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a))


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
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
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

        adapted = adapt_both(semi_gradient(of_both), WithTarget(params, params), support, key)
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
