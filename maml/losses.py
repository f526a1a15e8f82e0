"""Losses: each a factory from a forward function `apply(params, inputs)` to `loss(params, batch, key)`.

A loss that is a mean over examples carries `loss.per_example(params, batch, key) -> [examples]`, whose mean it is, and
`loss.batch_statistics`: whether the prediction of one example depends on the others (`maml.per_example` asks).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maml.types import Apply, Batch, Conditioned, Key, Loss, Metrics, Params


def _forward(apply: Apply, params: Params, inputs: Any) -> Any:
    """apply(params, inputs), where `apply` can be conditioned if the parameters are.

    Raises:
      ValueError: for parameters with a reference of batch norm and an `apply` that was not made by `models.functional`.
    """
    if isinstance(params, Conditioned) and not getattr(apply, "takes_conditioned", False):
        raise ValueError(
            "norm='support' needs an apply from maml.models.functional: use norm='batch', or an NNX module"
        )
    return jax.tree.map(_wide, apply(params, inputs))


def _wide(outputs: jax.Array) -> jax.Array:
    """At least float32: a loss of bfloat16 outputs would lose most of its digits."""
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def mse(apply: Apply) -> Loss:
    """Mean squared error over all examples and features; batch = (inputs, targets), targets shaped as the outputs.

    Raises:
      ValueError: when outputs and targets differ in shape (a silent broadcast would average the wrong differences).
    """

    def squares(params, batch):
        inputs, targets = batch
        outputs = _forward(apply, params, inputs)
        if outputs.shape != targets.shape:
            raise ValueError(f"mse: outputs {outputs.shape} and targets {targets.shape} differ in shape")
        return jnp.square(outputs - targets)

    def loss(params, batch, key):
        del key
        value = jnp.mean(squares(params, batch))
        return value, {"loss": value}

    def per_example(params, batch, key):
        del key
        values = squares(params, batch)
        return values.reshape(len(values), -1).mean(1)

    return _with_examples(loss, per_example, apply)


def cross_entropy(apply: Apply) -> Loss:
    """Mean softmax cross-entropy in nats; batch = (inputs, labels), integer labels [examples], outputs [examples, classes].

    The mean is over examples. Finn's code sums over N·K examples and divides by K: its step sizes are N times ours
    (cbfinn/maml utils.py).
    """

    def logits_of(params, batch):
        inputs, labels = batch
        logits = _forward(apply, params, inputs)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"cross_entropy: outputs {logits.shape} do not fit labels {labels.shape}")
        return logits

    def loss(params, batch, key):
        del key
        logits, labels = logits_of(params, batch), batch[1]
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return value, {"loss": value, "accuracy": jax.lax.stop_gradient(accuracy)}

    def per_example(params, batch, key):
        del key
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, batch), batch[1])

    return _with_examples(loss, per_example, apply)


def _with_examples(loss: Any, per_example: Callable[[Params, Batch, Key], jax.Array], apply: Apply) -> Loss:
    """The loss with what `maml.per_example` asks of it."""
    loss.per_example = per_example
    loss.batch_statistics = getattr(apply, "batch_statistics", False)
    return loss


def semi_gradient(two_argument: Callable[[Params, Params, Batch, Key], tuple[jax.Array, Metrics]]) -> Loss:
    """A loss whose inner step follows the partial derivative in its first argument alone: g(θ) = ∂₁L(θ, θ), as in TD(0).

    `two_argument(params, target, batch, key)` -> (value, metrics). An inner loop differentiates the field g itself, hence both
    arguments: `stop_gradient` on the target inside a loss gives the same inner step and another, wrong, meta-gradient. g is no
    gradient, and its Jacobian not symmetric. As a plain loss, such as the outer one, it is L(θ, stop_gradient(θ)).
    """

    def loss(params, batch, key):
        return two_argument(params, jax.tree.map(jax.lax.stop_gradient, params), batch, key)

    loss.two_argument = two_argument
    return loss
