"""Whether a meta-gradient is the derivative of the program: central differences of the real program against autodiff.

    with jax.enable_x64(True):
        check = meta_gradcheck(lambda p: objective(p, task, key, 0)[0], params, jax.random.key(0))
    assert check.worst < 1e-6

It finds what no other test does, since the values are right: a semi-gradient by `stop_gradient` in an inner loop, a custom
derivative whose second derivative is wrong, a rescaled gradient. First-order MAML fails it, as it should.

ReLU, max-pool and clipping have kinks, where a central difference is that of neither side: a small epsilon makes it unlikely that
one lies between the two points, and the differences at epsilon and at half of it disagree where one does (`spread`).

Quantised models with straight-through estimators have no useful differences: the program is constant almost everywhere. What
their derivative is, of any order, is that of the program whose stopped residuals are constants (`frozen`). So it is with policy
gradients, whose episodes and advantages are stopped.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from maml.types import Key, Params

Program = Callable[[Params], Float[Array, ""]]


class Direction(NamedTuple):
    """Along one direction of length 1: the derivative by autodiff and by a central difference.

    `error` is their difference over the larger of the two (infinite where one is not finite), `spread` that of the central
    differences at epsilon and at epsilon/2: where it is not small, the difference tells nothing (a kink, or rounding).
    """

    autodiff: float
    difference: float
    error: float
    spread: float


class Gradcheck(NamedTuple):
    """The directions tried, and the defect of symmetry of the inner field, where one was given."""

    directions: tuple[Direction, ...]
    asymmetry: float | None = None

    @property
    def worst(self) -> float:
        """The largest relative error: the number to decide on."""
        return max(d.error for d in self.directions)


def meta_gradcheck(
    f: Program,
    params: Params,
    key: Key,
    *,
    directions: int = 3,
    epsilon: float = 1e-5,
    program: Program | None = None,
    field: Callable[[Params], Params] | None = None,
) -> Gradcheck:
    """Directional central differences of f at `params` against autodiff, in float64, along random directions of length 1.

    Args:
      f: parameters -> scalar, such as the objective of some tasks.
      program: whose differences are taken in place of those of f: `frozen(f, params)` where f holds straight-through estimators.
      field: an inner gradient, params -> like params. Its `asymmetry` is reported beside, and decides nothing: a wrong field
        can be symmetric, and the right one of a semi-gradient is not.

    Raises:
      ValueError: for parameters that are not float64, no directions, an epsilon that is not positive.
    """
    kinds = {str(x.dtype) for x in jax.tree.leaves(params)}
    if kinds != {"float64"}:
        raise ValueError(f"params: {', '.join(sorted(kinds))}; cast them to float64 under jax.enable_x64(True)")
    if directions < 1 or not epsilon > 0:
        raise ValueError(f"directions={directions}, epsilon={epsilon}: give 1 or more, and a positive number")

    @jax.jit
    def slope(params, key):
        return optax.tree.vdot(jax.grad(f)(params), _direction(key, params))

    @jax.jit
    def value(params, key, by):
        return (program or f)(jax.tree.map(lambda p, d: p + by * d, params, _direction(key, params)))

    def difference(key, epsilon):
        return float(value(params, key, epsilon) - value(params, key, -epsilon)) / (2 * epsilon)

    def check(key):
        exact, wide, narrow = float(slope(params, key)), difference(key, epsilon), difference(key, epsilon / 2)
        return Direction(exact, wide, _relative(exact, wide), _relative(wide, narrow))

    checked = tuple(check(k) for k in jax.random.split(key, directions))
    return Gradcheck(checked, None if field is None else asymmetry(field, params, key))


def asymmetry(field: Callable[[Params], Params], params: Params, key: Key, *, probes: int = 8) -> float:
    """How far the Jacobian J of a field is from symmetric: |J - Jᵀ| / |J| in Frobenius norm, estimated from random probes.

    About 0 for the gradient of a loss, up to 2. J v takes forward mode: give a field made with `derivatives.reverse`.
    """

    def products(params, key):
        probe = _direction(key, params)
        forward, (backward,) = jax.jvp(field, (params,), (probe,))[1], jax.vjp(field, params)[1](probe)
        defect = jax.tree.map(jnp.subtract, forward, backward)
        return optax.tree.vdot(defect, defect), optax.tree.vdot(forward, forward)

    defects, sizes = jax.jit(jax.vmap(products, (None, 0)))(params, jax.random.split(key, probes))
    size = float(sizes.sum())
    return math.sqrt(float(defects.sum()) / size) if size else 0.0


def _direction(key: Key, params: Params) -> Params:
    """Uniform on the sphere of radius 1."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    normal = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    length = optax.tree.norm(normal)
    return structure.unflatten([x / length for x in normal])


def _relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    size = max(abs(a), abs(b))
    return abs(a - b) / size if size else 0.0


# --- straight-through estimators: the program whose stopped residuals are constants ---


def frozen(f: Program, params: Params, *, scope: str | Sequence[str] | None = None) -> Program:
    """f with everything that passes through `stop_gradient` recorded at `params`, and kept as a constant elsewhere.

    A straight-through estimator is sg(Q(x)) + (y(x) - sg(y(x))): with the stopped values constant it is y(x) + c, a program with
    derivatives, and these are what autodiff should give f: `meta_gradcheck(f, params, key, program=frozen(f, params))`. A
    quantiser of another form (a custom derivative) fails it.

    Args:
      scope: only those under a `jax.named_scope` of this name, or of one of these, such as a quantiser's own; None: all.
        Freezing all makes every semi-gradient by `stop_gradient` and first-order MAML right: it then tests no more than the
        estimators.

    Raises:
      ValueError: where one stands in a while loop or in a branch of a condition.
    """
    closed = jax.make_jaxpr(f)(params)
    scope = (scope,) if isinstance(scope, str) else scope
    if not any(_stops(eqn, scope) for eqn in _within(closed)):
        return f

    @jax.jit
    def record(params):
        kept = []
        _evaluate(closed, jax.tree.leaves(params), scope, lambda x: kept.append(x) or x)
        return kept

    @jax.jit
    def replay(params, kept):
        values = iter(kept)
        return _evaluate(closed, jax.tree.leaves(params), scope, lambda _: next(values))[0]

    kept = record(params)
    return lambda params: replay(params, kept)


def _evaluate(closed: Any, arguments: list, scope: Sequence[str] | None, stop: Callable) -> list:
    """Evaluate a jaxpr with `stop` in place of its stop_gradient; what holds none is left whole."""
    jaxpr = _open(closed)
    variables = getattr(jaxpr, "all_invars", None) or [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*getattr(closed, "consts", ()), *arguments], strict=True))

    def read(atom):
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if _stops(eqn, scope):
            outputs = [stop(inputs[0])]
        elif eqn.params.get("length") != 0 and any(_stops(e, scope) for inner in _jaxprs(eqn) for e in _within(inner)):
            outputs = _descend(eqn, inputs, scope, stop)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _descend(eqn: Any, inputs: list, scope: Sequence[str] | None, stop: Callable) -> list:
    """An equation that holds a jaxpr with a stop in it: a scan, step by step, or a call."""
    name, inner = eqn.primitive.name, _jaxprs(eqn)[0]
    if name == "scan":
        return _scan(eqn, inner, inputs, scope, stop)
    if name in ("while", "cond") or len(_open(inner).invars) != len(inputs):
        raise ValueError(f"frozen: a stop_gradient stands in a {name}, whose steps are not known: write it as a scan")
    return _evaluate(inner, inputs, scope, stop)


def _scan(eqn: Any, body: Any, inputs: list, scope: Sequence[str] | None, stop: Callable) -> list:
    """What is scanned, and what is stacked, has one axis more outside than in the body."""
    carry = sum(out.aval.ndim == v.aval.ndim for out, v in zip(eqn.outvars, _open(body).outvars, strict=True))
    whole = sum(x.aval.ndim == v.aval.ndim for x, v in zip(eqn.invars, _open(body).invars, strict=True))
    fixed, state, rows = inputs[: whole - carry], inputs[whole - carry : whole], inputs[whole:]
    steps, stacks = list(range(eqn.params["length"])), {}
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        results = _evaluate(body, [*fixed, *state, *(x[i] for x in rows)], scope, stop)
        state, stacks[i] = results[:carry], results[carry:]
    return [*state, *(jnp.stack(column) for column in zip(*(stacks[i] for i in steps), strict=True))]


def _stops(eqn: Any, scope: Sequence[str] | None) -> bool:
    if eqn.primitive.name != "stop_gradient":
        return False
    return scope is None or any(name in str(eqn.source_info.name_stack) for name in scope)


def _jaxprs(eqn: Any) -> list:
    parts = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple | list) else (p,))]
    return [x for x in parts if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def _open(closed: Any) -> Any:
    return getattr(closed, "jaxpr", closed)


def _within(closed: Any) -> Iterator[Any]:
    for eqn in _open(closed).eqns:
        yield eqn
        for inner in _jaxprs(eqn):
            yield from _within(inner)
