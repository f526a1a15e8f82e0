"""Per-example gradients, per-task and per-query meta-gradients, the influence of support examples, and their statistics.

Stacked gradients are a pytree like the parameters whose leaves have one more, leading, axis: [examples, ...] or [tasks, ...].
A layer is what the path of a parameter names without its last part: `convs/0` holds `convs/0/kernel` and `convs/0/bias`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float
from optax.microbatching import AccumulationType, micro_grad

from maml.types import Batch, Key, Loss, Objective, Params, Task, leaf_name, padded

LOG_NORM_BINS = np.linspace(-8.0, 4.0, 25)
"""Edges of histograms of log10 of gradient norms: fixed, so that those of different steps and runs can be compared."""

COSINE_BINS = np.linspace(-1.0, 1.0, 21)
"""Edges of histograms of cosines."""


# --- gradients of one loss ---


def per_example_gradients(
    loss: Loss, params: Params, batch: Batch, key: Key, *, way: str = "auto", microbatch: int | None = None
) -> tuple[Float[Array, " examples"], Params]:
    """The loss and the gradient of each example of a batch: ([examples], leaves [examples, ...]).

    Args:
      way: "jacobian": the derivative of the vector of losses, computed with the whole batch at hand: exact for every model, as
        many backward passes of the batch as it has examples. Its rows average to the gradient of the batch.
        "vmap": the gradient of each example in a batch of its own (`optax.microbatching.micro_grad`): as much work as one
        gradient of the batch, and the same where no example depends on another. "auto": "vmap", but "jacobian" for a model with
        batch statistics (`loss.batch_statistics`).
      microbatch: rows computed at a time, to bound memory; None: all.

    "vmap" serves any loss that is a mean over examples, also a semi-gradient; "jacobian" needs `loss.per_example`. The key is the
    same for all examples.

    Raises:
      ValueError: for "vmap" of a model with batch statistics, "jacobian" of a loss without `per_example`, an unknown way, a
        microbatch that does not divide the examples ("vmap").
    """
    batch_statistics = getattr(loss, "batch_statistics", False)
    if way not in ("auto", "jacobian", "vmap"):
        raise ValueError(f"way={way!r}: give auto, jacobian or vmap")
    if way == "jacobian" or (way == "auto" and batch_statistics):
        return _jacobian(loss, params, batch, key, microbatch)
    _check_alone(loss)
    gradient = _alone(loss, batch, microbatch, accumulator=AccumulationType.CONCAT)
    gradients, each = gradient(params, batch, key)
    return each.values, gradients


def _jacobian(loss: Any, params: Params, batch: Batch, key: Key, microbatch: int | None):
    if not hasattr(loss, "per_example"):
        raise ValueError(
            "way='jacobian': the loss has no per_example(params, batch, key) -> [examples]; those of maml.losses for supervised "
            "problems do: set the attribute, or way='vmap' where no example depends on another"
        )
    losses, pull = jax.vjp(lambda p: loss.per_example(p, batch, key), params)
    basis = jnp.eye(_count(batch), dtype=losses.dtype)
    return losses, lax.map(lambda e: pull(e)[0], basis, batch_size=microbatch or len(losses))


def _check_alone(loss: Loss) -> None:
    if getattr(loss, "batch_statistics", False):
        raise ValueError(
            "way='vmap': the model has batch statistics, which in a batch of one are another function, and so is its gradient "
            "(wrong by its own size): call per_example_gradients(loss, params, batch, key, way='jacobian')"
        )


def _alone(loss: Loss, batch: Batch, microbatch: int | None, **options: Any) -> Any:
    """micro_grad of the loss of an example in a batch of its own."""
    count = _count(batch)
    if microbatch is not None and (microbatch < 1 or count % microbatch):
        raise ValueError(f"microbatch={microbatch}: give a divisor of the {count} examples, or None for all")

    def value(params, batch, key):
        return loss(params, batch, key)[0]

    def gradient(params, batch, key):
        of = micro_grad(lambda p, b: value(p, b, key), microbatch_size=microbatch, **options)
        return of(params, batch)

    return gradient


def _count(batch: Batch) -> int:
    if padded(batch):
        raise ValueError(
            "batch: inputs are Padded, and absent examples would count as gradients of zero: draw tasks of one size, without "
            "least_ways"
        )
    return len(jax.tree.leaves(batch)[0])


class Moments(NamedTuple):
    """Mean of the gradients and of their squares (like the parameters); norm and loss of each example [examples]."""

    mean: Params
    second: Params
    norms: jax.Array
    losses: jax.Array


def moments(loss: Loss, params: Params, batch: Batch, key: Key, *, microbatch: int | None = None) -> Moments:
    """Moments of the per-example gradients in the memory of one microbatch: the gradients are never all there.

    Raises:
      ValueError: for a model with batch statistics, and a microbatch that does not divide the examples.
    """
    _check_alone(loss)

    def both(gradient):
        return gradient, jax.tree.map(jnp.square, gradient)

    mean = AccumulationType.MEAN
    gradient = _alone(loss, batch, microbatch, accumulator=mean, transform_fn=both, metrics_fn=optax.tree.norm)
    (first, second), each = gradient(params, batch, key)
    return Moments(first, second, each.metrics, each.values)


# --- statistics of stacked gradients ---


class Noise(NamedTuple):
    """tr Σ, the trace of the covariance of one gradient, and |G|², the squared norm of the true gradient; both unbiased."""

    trace: jax.Array
    signal: jax.Array

    @property
    def resolved(self) -> bool:
        """Whether |G|² > 0. If not, there are too few gradients to tell the true one from nothing."""
        return bool(self.signal > 0)

    @property
    def scale(self) -> float:
        """B_simple = tr Σ / |G|², in examples (or tasks); NaN where it is not resolved."""
        return float(self.trace) / float(self.signal) if self.resolved else float("nan")


class Statistics(NamedTuple):
    """Of n stacked gradients gᵢ with mean ḡ.

    Attributes:
      mean, second: mean of the gradients and of their squares, like the parameters.
      norms, cosines: [n] 2-norm of each, and its cosine to the mean of the others (0 where one of the two is 0).
      layer_norms: layer -> [n].
      gsnr: layer -> |ḡ|² / tr Σ of the layer's parameters: the gradient signal-to-noise ratio of Liu et al. 2020 (arXiv
        2001.07384), as a ratio of sums over parameters and not the mean of ratios, which a dead parameter makes 0/0. Nothing but
        noise gives 1/n, no noise infinity, a dead layer 0.
      noise: the gradient noise scale.
    """

    mean: Params
    second: Params
    norms: jax.Array
    cosines: jax.Array
    layer_norms: dict[str, jax.Array]
    gsnr: dict[str, jax.Array]
    noise: Noise


def statistics(gradients: Params) -> Statistics:
    """Statistics of stacked gradients [n, ...]: of examples, of queries, of tasks; n is 2 or more.

    Raises:
      ValueError: for fewer than 2 gradients.
    """
    layers = _layers(gradients)
    rows = jnp.concatenate(list(layers.values()), 1)
    return Statistics(
        mean=jax.tree.map(lambda g: g.mean(0), gradients),
        second=jax.tree.map(lambda g: jnp.square(g).mean(0), gradients),
        norms=_norms(rows),
        cosines=_leave_one_out_cosines(rows),
        layer_norms={name: _norms(x) for name, x in layers.items()},
        gsnr={name: _gsnr(x) for name, x in layers.items()},
        noise=_noise(rows),
    )


def noise_scale(gradients: Params) -> Noise:
    """The gradient noise scale of stacked gradients [n, ...]: McCandlish et al. 2018 (arXiv 1812.06162), Eq. 2.9, appendix A.1.

    tr Σ = Σᵢ|gᵢ - ḡ|²/(n - 1), |G|² = |ḡ|² - tr Σ/n: their two-batch estimates (Eqs. A.2 and A.3) with batches of 1 and of n. Of
    per-task meta-gradients it is the number of tasks in a meta-batch beyond which more tasks bring little.

    Raises:
      ValueError: for fewer than 2 gradients.
    """
    return _noise(jnp.concatenate(list(_layers(gradients).values()), 1))


def coherence(gradients: Params) -> Float[Array, ""]:
    """Mean cosine over all pairs of stacked gradients [n, ...], as of meta-gradients in Guiroy et al. 2019 (arXiv 1907.07287).

    A gradient that is zero has cosine 0 to all others. ValueError for fewer than 2 gradients.
    """
    rows = jnp.concatenate(list(_layers(gradients).values()), 1)
    units = rows / _safe(_norms(rows))[:, None]
    pairs = jnp.square(units.sum(0)).sum() - jnp.square(units).sum()
    return pairs / (len(rows) * (len(rows) - 1))


def _layers(gradients: Params) -> dict[str, jax.Array]:
    """Layer -> matrix [n, parameters]."""
    found: dict[str, list[jax.Array]] = {}
    for path, x in jax.tree.flatten_with_path(gradients)[0]:
        if len(x) < 2:
            raise ValueError(f"gradients: {len(x)} is too few for statistics; give 2 or more")
        found.setdefault(_layer(path), []).append(x.reshape(len(x), -1))
    return {name: jnp.concatenate(parts, 1) for name, parts in found.items()}


def _layer(path: tuple) -> str:
    parts = leaf_name(path).split("/")
    return "/".join(parts[:-1] or parts) or "params"


def _norms(rows: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(rows).sum(1))


def _safe(norms: jax.Array) -> jax.Array:
    return jnp.where(norms > 0, norms, 1)


def _leave_one_out_cosines(rows: jax.Array) -> jax.Array:
    others = (rows.sum(0)[None] - rows) / (len(rows) - 1)
    return (rows * others).sum(1) / (_safe(_norms(rows)) * _safe(_norms(others)))


def _trace(rows: jax.Array) -> jax.Array:
    return jnp.square(rows - rows.mean(0)[None]).sum() / (len(rows) - 1)


def _gsnr(rows: jax.Array) -> jax.Array:
    signal, trace = jnp.square(rows.mean(0)).sum(), _trace(rows)
    return jnp.where(trace > 0, signal / _safe(trace), jnp.where(signal > 0, jnp.inf, 0))


def _noise(rows: jax.Array) -> Noise:
    trace = _trace(rows)
    return Noise(trace, jnp.square(rows.mean(0)).sum() - trace / len(rows))


def histogram(values: Any, bins: np.ndarray) -> list[int]:
    """Counts of the finite values between the edges `bins`; what lies outside counts in the first or the last bin."""
    values = np.asarray(values, np.float64)
    inside = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
    return np.histogram(inside, bins)[0].tolist()


class Outlier(NamedTuple):
    """An example whose gradient is large: its index, 2-norm, cosine to the mean of the others, and loss."""

    index: int
    norm: float
    cosine: float
    loss: float


def outliers(norms: Any, cosines: Any, losses: Any, count: int) -> list[Outlier]:
    """The `count` examples with the largest norms, the largest first; arguments [examples] as of `statistics`."""
    norms, cosines, losses = (np.asarray(x, np.float64) for x in (norms, cosines, losses))
    order = np.argsort(-norms, kind="stable")[:count]
    return [Outlier(int(i), float(norms[i]), float(cosines[i]), float(losses[i])) for i in order]


# --- meta-gradients ---


def per_task_gradients(
    objective: Objective, meta_params: Params, tasks: Task, keys: Key, step: Any = 0, chunk: int | None = None
) -> tuple[Float[Array, " tasks"], Params]:
    """The objective and the meta-gradient of each task: ([tasks], leaves [tasks, ...]), `chunk` tasks at a time (None: all).

    Their mean is the meta-gradient of the meta-step, their `noise_scale` in tasks, their `coherence` the agreement of tasks.
    """
    of = jax.value_and_grad(objective, has_aux=True)

    def one(pair):
        task, key = pair
        (value, _), gradient = of(meta_params, task, key, jnp.asarray(step))
        return value, gradient

    return lax.map(one, (tasks, keys), batch_size=chunk or len(keys))


def weighted(loss: Any) -> Loss:
    """The loss with a weight on each example: mean(w · loss.per_example); batch = (*batch, weights [examples]).

    An objective made with it, such as `query_loss(weighted(loss), adapt)`, is what `per_query_gradients` and `influence` take.
    With weights of one it is the objective itself. Batch statistics do not depend on the weights.

    Raises:
      ValueError: for a loss without `per_example`, and for a semi-gradient, whose field would be lost.
    """
    if not hasattr(loss, "per_example") or not getattr(loss, "is_gradient", True):
        raise ValueError(
            "weighted: the loss must be a mean over examples with per_example(params, batch, key) -> [examples], and no "
            "semi-gradient: make it with losses.mse or losses.cross_entropy, or set the attribute"
        )

    def weighing(params, batch, key):
        *batch, weights = batch
        value = jnp.mean(weights * loss.per_example(params, tuple(batch), key))
        return value, {"loss": value}

    weighing.features = getattr(loss, "features", None)
    weighing.batch_statistics = getattr(loss, "batch_statistics", False)
    return weighing


def per_query_gradients(
    objective: Objective, meta_params: Params, task: Task, key: Key, step: Any = 0
) -> tuple[Float[Array, " queries"], Params]:
    """The loss and the meta-gradient of each query example of a task: ([queries], leaves [queries, ...]).

    The objective is one with weights (`weighted`). The derivative in the weights is the vector of query losses, whose Jacobian by
    `jax.jacrev` is exact with batch statistics too; its rows average to the task's meta-gradient. As many backward passes through
    the inner loop as there are queries.
    """
    ones = _ones(meta_params, task.query)

    def losses(params):
        def value(weights):
            return objective(params, _with_weights(task, query=weights), key, jnp.asarray(step))[0]

        each = len(ones) * jax.grad(value)(ones)
        return each, each

    gradients, values = jax.jacrev(losses, has_aux=True)(meta_params)
    return values, gradients


def influence(
    objective: Objective, meta_params: Params, task: Task, key: Key, step: Any = 0
) -> Float[Array, " examples"]:
    """dF/dwᵢ: derivative of the task's objective F in a weight on each support example's loss, at weights of one.

    The support loss is mean(w · ℓ): positive means that more of this example in the inner loop raises the query loss, that it
    hurts. Prototypes (`inner_loop.with_prototypes`) are weighted means. To first order, leaving an example out changes F by
    -dF/dwᵢ (the weights of the others stay). One reverse pass. The objective is one with weights (`weighted`), whose inner loop
    the outer derivative passes through: with `derivatives.first_order` all influences are 0.
    """

    def value(weights):
        return objective(meta_params, _with_weights(task, support=weights), key, jnp.asarray(step))[0]

    return jax.grad(value)(_ones(meta_params, task.support))


def _ones(params: Params, batch: Batch) -> jax.Array:
    return jnp.ones(_count(batch), jnp.result_type(*jax.tree.leaves(params)))


def _with_weights(task: Task, **weights: jax.Array) -> Task:
    """The task with a weight on each example, one where none are given."""
    return Task(
        *(
            (*batch, weights.get(name, jnp.ones(_count(batch), next(iter(weights.values())).dtype)))
            for name, batch in task._asdict().items()
        )
    )
