"""Plain JAX as one writes it first: vmap over tasks, `lax.conv`, reverse over reverse, one jitted call per outer step.

Nothing of the library is used but the parameters, so that it stays what it is while the library changes.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks.cases import EPSILON, Case

Arrays = Mapping[str, jax.Array]
"""Path -> array, as `cases.flat` gives them."""


def forward(case: Case, params: Arrays, x: jax.Array) -> jax.Array:
    """The network of a case."""
    kind = "layers" if case.network == "mlp" else "convs"
    x = x.reshape(len(x), -1) if case.network == "mlp" else x
    for i in range(len(case.widths)):
        x = _layer(case, x, params[f"{kind}/{i}/kernel"]) + params[f"{kind}/{i}/bias"]
        x = _norm(x) + params[f"norms/{i}/bias"] if case.norm else x
        x = jax.nn.relu(x)
        if case.pool == "max":
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    if case.network == "conv":
        x = x.mean((1, 2)) if case.head == "mean" else x.reshape(len(x), -1)
    return x @ params["head/kernel"] + params["head/bias"]


def outer_step(case: Case, steps: int, order: str, optimizer: optax.GradientTransformation) -> Callable:
    """(params, optimizer's state, tasks) -> (params, optimizer's state), not jitted."""

    def loss(params, batch):
        x, y = batch
        outputs = forward(case, params, x)
        if case.loss == "mse":
            return jnp.mean((outputs - y) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    def task_loss(params, task):
        support, query = task
        for _ in range(steps):
            grads = jax.grad(loss)(params, support)
            if order == "first":
                grads = lax.stop_gradient(grads)
            params = {k: p if "norms" in k else p - case.step_size * grads[k] for k, p in params.items()}
        return loss(params, query)

    def step(params, state, tasks):
        grads = jax.grad(lambda p: jax.vmap(task_loss, (None, 0))(p, tasks).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _layer(case: Case, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if case.network == "mlp":
        return x @ kernel
    stride = (2, 2) if case.pool == "stride" else (1, 1)
    return lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _norm(x: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) * lax.rsqrt(x.var(axes) + EPSILON)
