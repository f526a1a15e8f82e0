"""Losses of examples with targets."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maml.types import Apply, Batch, Conditioned, Joint, Key, Loss, Padded, Params


def forward(apply: Apply, params: Params, inputs: Any, *, masks: bool = False) -> Any:
    """apply(params, inputs), where `apply` can be conditioned if the parameters are.

    Raises:
      ValueError: for parameters with a reference of batch norm and an `apply` that was not made by `models.functional`, and for
        `Padded` inputs of a loss that does not mask them.
    """
    if isinstance(inputs, Padded) and not masks:
        raise ValueError("inputs are Padded: of the losses here cross_entropy alone leaves out absent examples")
    if isinstance(params, Conditioned | Joint) and not getattr(apply, "takes_conditioned", False):
        raise ValueError(
            "norm='support' or 'joint' needs an apply from maml.models.functional: use norm='batch', or an NNX module"
        )
    return jax.tree.map(_wide, apply(params, inputs))


def one_array(apply: Apply, params: Params, inputs: Any, *, masks: bool = False) -> jax.Array:
    """`forward`, of a model that returns one array.

    Raises:
      ValueError: for another, such as a policy's mean and standard deviation, and as `forward`.
    """
    outputs = forward(apply, params, inputs, masks=masks)
    if not jax.tree_util.all_leaves([outputs]):
        raise ValueError(f"the model returns a {type(outputs).__name__}: this loss takes one array of outputs")
    return outputs


def _wide(outputs: jax.Array) -> jax.Array:
    """At least float32: a loss of bfloat16 outputs would lose most of its digits."""
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def mse(apply: Apply) -> Loss:
    """Mean squared error over all examples and features; batch = (inputs, targets), targets shaped as the outputs.

    Raises:
      ValueError: when traced, for outputs that are not one array or not shaped as the targets (a silent broadcast would
        average the wrong differences).
    """

    def squares(params, batch):
        inputs, targets = batch
        outputs = one_array(apply, params, inputs)
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

    return with_examples(loss, per_example, apply)


def cross_entropy(apply: Apply) -> Loss:
    """Mean softmax cross-entropy in nats; batch = (inputs, labels), integer labels [examples], outputs [examples, classes].

    Of sequences the labels are [examples, symbols] and the outputs [examples, symbols, classes]. The mean is
    over all of them. Finn's code sums over N·K examples and divides by K: its step sizes are N times ours (cbfinn/maml utils.py).
    Of `Padded` inputs the mean is over those that are present, and outputs from their `ways` on are no classes.

    Raises:
      ValueError: when traced, for outputs that are not one array or do not fit the labels.
    """

    def logits_of(params, batch):
        inputs, labels = batch
        logits = one_array(apply, params, inputs, masks=labels.ndim == 1)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"cross_entropy: outputs {logits.shape} do not fit labels {labels.shape}")
        if isinstance(inputs, Padded):
            logits = jnp.where(jnp.arange(logits.shape[-1])[None] < inputs.ways[:, None], logits, -jnp.inf)
        return logits

    def each(params, batch):
        """Losses, and whether the prediction is right, [examples, ...]: their means are those over what is present."""
        logits, (inputs, labels) = logits_of(params, batch), batch
        right = jnp.argmax(logits, -1) == labels
        if not isinstance(inputs, Padded):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels), right
        values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        weight = inputs.present * (labels.size / jnp.maximum(jnp.sum(inputs.present), 1)).astype(values.dtype)
        return weight * values, weight * right

    def loss(params, batch, key):
        del key
        values, right = each(params, batch)
        value = jnp.mean(values)
        return value, {"loss": value, "accuracy": jax.lax.stop_gradient(jnp.mean(right))}

    def per_example(params, batch, key):
        del key
        values = each(params, batch)[0]
        return values.reshape(len(values), -1).mean(1)  # of a sequence the mean over its symbols

    return with_examples(loss, per_example, apply)


def with_examples(loss: Any, per_example: Callable[[Params, Batch, Key], jax.Array], apply: Apply) -> Loss:
    """The loss with what the rest of the library asks of it."""
    loss.per_example, loss.features = per_example, getattr(apply, "features", None)
    loss.batch_statistics = getattr(apply, "batch_statistics", False)
    return loss
