"""Inner steps along fields that are no gradients: TD(0), and parts that follow losses of their own."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from maml.losses.supervised import mse, one_array, with_examples
from maml.types import SEMI_GRADIENT, Apply, Batch, Key, Loss, Metrics, Params, Transitions, leaf_name


def semi_gradient(two_argument: Callable[[Params, Params, Batch, Key], tuple[jax.Array, Metrics]]) -> Loss:
    """A loss whose inner step follows the partial derivative in its first argument alone: g(θ) = ∂₁L(θ, θ), as in TD(0).

    `two_argument(params, target, batch, key)` -> (value, metrics). An inner loop differentiates the field g itself, hence both
    arguments: `stop_gradient` on the target inside a loss gives the same inner step and another, wrong, meta-gradient. g is no
    gradient, and its Jacobian not symmetric. A plain loss, such as the outer one, has the derivative g too; so has a loss that
    is made of it, such as one with a penalty more, and the derivative of that derivative is the whole Jacobian.

    Of a model with batch statistics say so: set `loss.batch_statistics = True`, as `td0` and `partitioned` do.
    """

    def loss(params, batch, key):
        return two_argument(params, _stopped_once(params), batch, key)

    loss.two_argument, loss.is_gradient = two_argument, False
    return loss


@jax.custom_jvp
def _held(leaves):
    return leaves


@_held.defjvp
def _(primals, tangents):
    return primals[0], jax.tree.map(jnp.zeros_like, tangents[0])


def _stopped_once(params: Params) -> Params:
    """A constant for the innermost derivative of any of its leaves, and itself for those around it.

    All leaves together: those that an inner loop leaves alone meet the outer derivative first.
    """
    leaves, structure = jax.tree.flatten(params)
    inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    with jax.named_scope(SEMI_GRADIENT):  # by which others know that a loss is made of one
        held = _held([leaves[i] for i in inexact])
    for i, x in zip(inexact, held, strict=True):
        leaves[i] = x
    return structure.unflatten(leaves)


TARGETS = ("full", "stop")


def td0(apply: Apply, discount: ArrayLike = 1.0, target: str = "full") -> Loss:
    """TD(0): ½ mean δ² with δ = rₜ + γₜ v(sₜ; φ) - v(sₜ₋₁; θ), whose step follows the derivative in θ alone, at φ = θ.

    v = `apply`, batch = `Transitions`, and γₜ = `discount` · `discount_t`. An inner step is θ + α mean(δ ∂v(sₜ₋₁)/∂θ): Sutton
    1988 (Machine Learning 3, 9-44), or Sutton and Barto 2018, section 9.3. For one transition the Jacobian of the field δ ∂v is
    ∂v(sₜ₋₁) (γₜ ∂v(sₜ) - ∂v(sₜ₋₁))ᵀ + δ ∂²v(sₜ₋₁), which is not symmetric.

    Of a pair (inputs, values) it is `mse`, the value error: a query set that knows the true values asks for that, and so one loss
    serves both sets of a task. The type of a batch is known when a program is traced: nothing is decided at run time.

    Args:
      discount: a number in [0, 1], or a traced scalar, such as a meta-parameter: its derivative goes through every target.
      target: how the outer derivative sees v(sₜ; φ). "full": φ is θ, and is differentiated (`semi_gradient`). "stop": φ is a
        constant. The inner steps are the same, but their Jacobian loses ∂₂₁L, the dependence of the target on θ, and the
        meta-gradient is an approximation: in the example of tests/test_losses.py as far from the true one as first order, and
        with three steps of the other sign. As a plain loss, such as an outer one, both follow ∂₁L.

    Raises:
      ValueError: for another `target`, a discount that is no scalar or outside of [0, 1]; when traced, for outputs
        that are not one array, and rewards or discounts that are not shaped as the values.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: give one of {', '.join(TARGETS)}")
    if jnp.ndim(discount):
        raise ValueError(f"discount has shape {jnp.shape(discount)}: give a scalar, and discount_t in each batch")
    if isinstance(discount, int | float) and not 0 <= discount <= 1:
        raise ValueError(f"discount={discount}: give a number between 0 and 1")
    value_error: Any = mse(apply)

    def squares(params, target_params, batch):
        before, after = one_array(apply, params, batch.inputs_tm1), one_array(apply, target_params, batch.inputs_t)
        shapes = {"rewards": batch.reward_t, "discounts": batch.discount_t}
        for name, x in shapes.items():
            if x is not None and x.shape != before.shape:
                raise ValueError(f"td0: {name} {x.shape} and values {before.shape} differ in shape")
        factor = discount if batch.discount_t is None else discount * batch.discount_t
        return 0.5 * jnp.square(batch.reward_t + factor * after - before)

    def two_argument(params, target_params, batch, key):
        if not isinstance(batch, Transitions):
            return value_error(params, batch, key)
        value = jnp.mean(squares(params, target_params, batch))
        return value, {"loss": value}

    def per_example(params, batch, key):
        if not isinstance(batch, Transitions):
            return value_error.per_example(params, batch, key)
        values = squares(params, jax.tree.map(jax.lax.stop_gradient, params), batch)
        return values.reshape(len(values), -1).mean(1)

    def stopped(params, batch, key):
        return two_argument(params, jax.tree.map(jax.lax.stop_gradient, params), batch, key)

    loss: Any = semi_gradient(two_argument) if target == "full" else stopped
    loss.is_gradient = False
    return with_examples(loss, per_example, apply)


def partitioned(losses: Mapping[str, Loss]) -> Loss:
    """Each part of the parameters follows a loss of its own: {pattern: loss}, such as {"critic": td0(v), "actor": ...}.

    g(θ) = (∂L₁/∂θ₁, ∂L₂/∂θ₂, ...), where a pattern is a regular expression that is searched for in the paths of parameters
    ("layers/0/kernel"). Each Lᵢ may depend on all parameters, so that g is no gradient in general and its Jacobian not
    symmetric. It is the semi-gradient of L(θ, φ) = Σᵢ Lᵢ(θᵢ, φ elsewhere), also where Lᵢ is a semi-gradient itself, and
    so every derivative of an inner loop is exact, `mixed` too. Each loss is evaluated once in a step.

    The value is ΣᵢLᵢ; the metrics are "loss", which is that, and each loss's own under its pattern.

    Raises:
      ValueError: for no loss; when traced, for a parameter that fits no pattern or several, and a pattern that no parameter fits.
    """
    if not losses:
        raise ValueError("losses={}: give one loss or more, by the pattern of the parameters that follow it")

    def two_argument(params, target, batch, key):
        owners, structure = _owners(params, tuple(losses)), jax.tree.structure(params)
        leaves = list(zip(owners, jax.tree.leaves(params), jax.tree.leaves(target), strict=True))
        total, metrics = jnp.zeros(()), {}
        for key_own, (pattern, loss) in zip(jax.random.split(key, len(losses)), losses.items(), strict=True):
            own = structure.unflatten([p if owner == pattern else t for owner, p, t in leaves])
            two = getattr(loss, "two_argument", None)
            value, named = two(own, target, batch, key_own) if two else loss(own, batch, key_own)
            total, metrics = total + value, metrics | {f"{pattern}/{k}": v for k, v in named.items()}
        return total, {"loss": total} | metrics

    loss: Any = semi_gradient(two_argument)
    loss.batch_statistics = any(getattr(one, "batch_statistics", False) for one in losses.values())
    return loss


def _owners(params: Params, patterns: Sequence[str]) -> list[str]:
    """For each leaf the one pattern that its path fits."""
    owners = []
    for path, _ in jax.tree.leaves_with_path(params):
        name = leaf_name(path)
        found = [pattern for pattern in patterns if re.search(pattern, name)]
        if len(found) != 1:
            raise ValueError(f"losses: the parameter {name} fits {found} of {list(patterns)}; let it fit exactly one")
        owners += found
    if unused := set(patterns) - set(owners):
        raise ValueError(f"losses: no parameter fits {sorted(unused)}; correct the pattern, or leave it out")
    return owners
