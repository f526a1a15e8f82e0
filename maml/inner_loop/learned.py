"""Inner loops whose step sizes, or anything else that they close over, are meta-parameters."""

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maml.inner_loop.unrolled import unroll
from maml.types import Adapt, Adapted, Key, Loss, MetaParams, Params, own
from maml.types import initial as initial_of

PER = ("loop", "tensor", "parameter")


def learned(make: Callable[[Any], Adapt], init: Callable[[Params, Key], Any]) -> Adapt:
    """The inner loop make(inner), where `inner` is moved by the outer optimizer: step sizes, a decay, a discount, ...

    `make` may hand `inner` to any optax alias: `learned(lambda h: unroll(optax.sgd(h["step_size"], h["momentum"]), 5), ...)`. The
    meta-parameters are `MetaParams(params, inner)`; `init(params, key)` gives `inner` at the start. Where the loop has parameters
    of its own (`low_rank`), `params` are its MetaParams.

    Raises:
      ValueError: when traced, for meta-parameters without `inner`.
    """

    def adapt(loss: Loss, params, support, key) -> Adapted:
        model, inner = own(params)
        return make(inner)(loss, model, support, key)

    def init_both(params, key):
        inner = init(params, key)
        return MetaParams(initial_of(make(inner), params, jax.random.fold_in(key, 1)), inner)

    adapt.init = init_both
    return adapt


def learned_hyperparameters(
    steps: int,
    optimizer: Callable[..., optax.GradientTransformation],
    initial: Mapping[str, float],
    *,
    per: str = "loop",
    per_step: bool = False,
    positive: bool = False,
    **how: Any,
) -> Adapt:
    """`unroll` with the optimizer optimizer(**h), whose hyperparameters h the outer loop learns: step size, momentum, decay, ...

    Args:
      optimizer: an optax alias, or any function of these names: `optax.sgd`, `functools.partial(optax.adamw, eps=1e-6)`.
      initial: where each starts, by the name that `optimizer` has for it: `{"learning_rate": 0.1, "momentum": 0.5}`.
      per: "loop": one of each; "tensor", "parameter": one for each kernel and bias, or each number. Every tensor has its own
        `optimizer` then, so that what looks at all of them (a clip by the global norm) looks at that tensor alone.
      per_step: whether every step has its own (axis 0).
      positive: h = eᵃ with a learned; without it h may change its sign.
      how: derivative, remat, precision of `unroll`.

    Raises:
      ValueError: as `unroll`, for another `per`, no hyperparameters, one that is no number or that `optimizer` does not take, and
        a positive one that does not start above 0; when initialised, for a flag or a count of the optimizer, and with `per_step`
        for an optimizer whose state keeps hyperparameters; when traced, for more steps than were learned.
    """
    _check_per(per)
    for name, value in initial.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(
                f"initial: {name}={value!r} is no number; what is not learned is the optimizer's own argument"
            )
    if not initial or (positive and min(initial.values()) <= 0):
        raise ValueError(f"initial={dict(initial)}: give one hyperparameter or more{', above 0' * positive}")
    try:
        plain = optimizer(**initial)
    except TypeError as error:
        raise ValueError(f"initial={dict(initial)}: {error}; name what this optimizer has") from error
    unroll(plain, steps, **how)  # refuses what it refuses
    rows = max(steps, 1)

    def make(inner):
        values = jax.tree.map(jnp.exp, inner) if positive else inner
        of = (lambda h: optimizer(**h)) if per == "loop" else functools.partial(_by_tensor, optimizer)
        if not per_step:
            return unroll(of(values), steps, **how)
        _check_rows(steps, inner)
        return unroll(_by_step(of, values), steps, **how)

    def update(name, value, params):
        made = optimizer(**{**initial, name: value})
        return made.update(params, made.init(params), params)[0]

    def init(params, key):
        del key
        for name, value in initial.items():
            try:
                jax.eval_shape(functools.partial(update, name), float(value), params)
            except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
                raise ValueError(
                    f"initial: {name} is a flag or a count of this optimizer, and is not learned"
                ) from error
        if per_step and _keeps(lambda h: optimizer(**h).init(params), dict(initial)):
            raise ValueError(
                "per_step: the state of this optimizer keeps the hyperparameters of the first step (optax.inject_hyperparams?), "
                "and later rows would not be read; give the optimizer itself"
            )
        dtype = jnp.result_type(*jax.tree.leaves(params))

        def every(value, x):
            return jnp.full((rows,) * per_step + (x.shape if per == "parameter" else ()), value, dtype)

        of = {name: functools.partial(every, value) for name, value in initial.items()}
        start = {k: f(jnp.zeros(())) if per == "loop" else jax.tree.map(f, params) for k, f in of.items()}
        return jax.tree.map(jnp.log, start) if positive else start

    return learned(make, init)


def _keeps(f: Callable[[Any], Any], value: Any) -> bool:
    """Whether anything in f(value) depends on the value."""
    jaxpr = jax.make_jaxpr(f)(value).jaxpr
    reached = {id(x) for x in jaxpr.invars}
    for eqn in jaxpr.eqns:
        if any(id(x) in reached for x in eqn.invars):
            reached |= {id(x) for x in eqn.outvars}
    return any(id(x) in reached for x in jaxpr.outvars)


def _by_step(make: Callable[[Any], optax.GradientTransformation], rows: Any) -> optax.GradientTransformation:
    """The optimizer with the hyperparameters of each step; its first state is that of the first ones."""

    def of(step):
        return make(jax.tree.map(lambda x: x[step], rows))

    def update(updates, state, params=None):
        step, inner = state
        updates, inner = of(step).update(updates, inner, params)
        return updates, (step + 1, inner)

    return optax.GradientTransformation(lambda params: (jnp.zeros((), jnp.int32), of(0).init(params)), update)


def _by_tensor(
    optimizer: Callable[..., optax.GradientTransformation], values: Mapping[str, Params]
) -> optax.GradientTransformation:
    """An optimizer for each tensor, with the hyperparameters that stand at its place in `values`."""
    leaves = {name: jax.tree.leaves(tree) for name, tree in values.items()}
    each = [optimizer(**dict(zip(leaves, row, strict=True))) for row in zip(*leaves.values(), strict=True)]

    def init(params):
        return [one.init(x) for one, x in zip(each, jax.tree.leaves(params), strict=True)]

    def update(updates, state, params=None):
        gradients, structure = jax.tree.flatten(updates)
        at: list[Any] = [None] * len(each) if params is None else jax.tree.leaves(params)
        found = [one.update(g, old, x) for one, g, old, x in zip(each, gradients, state, at, strict=True)]
        return structure.unflatten([new for new, _ in found]), [new for _, new in found]

    return optax.GradientTransformation(init, update)


def learned_step_sizes(
    steps: int,
    initial: float | Sequence[float],
    optimizer: optax.GradientTransformation | None = None,
    *,
    per: str = "tensor",
    per_step: bool = True,
    positive: bool = False,
    **how: Any,
) -> Adapt:
    """`unroll` with step sizes that the outer loop learns: θₜ₊₁ = θₜ - αₜ ∘ ∇L(θₜ), α among the meta-parameters.

    Meta-SGD: per="parameter", per_step=False (Li et al. 2017, arXiv 1707.09835, Eq. 2). MAML++: per="tensor", per_step=True
    (LSLR, arXiv 1810.09502, section 4).

    Args:
      initial: every α, or a range (low, high) from which each is drawn uniformly, as in Meta-SGD.
      optimizer: whose update is scaled by α, of step size 1: `optax.adam(1.0)`; None for `optax.sgd(1.0)`.
      per: "loop": one α; "tensor": one for each kernel and bias; "parameter": one for each number.
      per_step: whether every step has its own (axis 0 of each leaf).
      positive: α = eᵃ with a learned; without it α may change its sign.
      how: derivative, remat, precision of `unroll`.

    Raises:
      ValueError: as `unroll`, for another `per`, an empty range, and a positive α that does not start above 0; when traced, for
        more steps than were learned.
    """
    _check_per(per)
    low, high = (initial, initial) if isinstance(initial, int | float) else initial
    if not low <= high or (positive and low <= 0):
        raise ValueError(f"initial={initial!r}: give a number, or a range with low <= high{', above 0' * positive}")
    direction = optimizer or optax.sgd(1.0)
    rows = max(steps, 1)
    unroll(direction, steps, **how)  # refuses what it refuses

    def make(inner):
        if per_step:
            _check_rows(steps, inner)
        sizes = jax.tree.map(jnp.exp, inner) if positive else inner
        return unroll(optax.chain(direction, _scale(sizes, per, per_step)), steps, **how)

    def init(params, key):
        def one(i, x):
            shape = (rows,) * per_step + (x.shape if per == "parameter" else ())
            drawn = jax.random.uniform(jax.random.fold_in(key, i), shape, x.dtype, low, high)
            return jnp.log(drawn) if positive else drawn

        if per == "loop":
            return one(0, jax.tree.leaves(params)[0])
        leaves, structure = jax.tree.flatten(params)
        return structure.unflatten([one(i, x) for i, x in enumerate(leaves)])

    return learned(make, init)


def _check_per(per: str) -> None:
    if per not in PER:
        raise ValueError(f"per={per!r}: give one of {', '.join(PER)}")


def _check_rows(steps: int, inner: Any) -> None:
    if steps > (rows := len(jax.tree.leaves(inner)[0])):
        raise ValueError(f"steps={steps}: these were learned for {rows} inner steps; take at most {rows}")


def _scale(sizes: Params, per: str, per_step: bool) -> optax.GradientTransformation:
    """Multiply updates by step sizes: one, or one for each leaf or number, with a leading axis of steps if `per_step`."""

    def init(params):
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates, state, params=None):
        del params
        now = jax.tree.map(lambda x: x[state], sizes) if per_step else sizes
        scaled = jax.tree.map(lambda u: now * u, updates) if per == "loop" else jax.tree.map(jnp.multiply, now, updates)
        return scaled, state + 1

    return optax.GradientTransformation(init, update)
