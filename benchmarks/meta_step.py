"""The library's meta-step against the same step written by hand in plain JAX: time and compiled temporary memory.

    python -m benchmarks.meta_step

Both run many steps in one compiled loop, from the same parameters on tasks of the same sampler, interleaved; each line gives
medians and their ratio. The hand-written step takes its loop over tasks (vmap or one by one) from the library's choice.
"""

import json
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from maml import losses, models, objectives, train
from maml.inner_loop import only, unroll
from maml.random import keys_for
from maml.tasks import sinusoid
from maml.tasks.episodes import ClassImages, episodes
from maml.types import as_argument

ROOT = jax.random.key(0)


def sinusoid_case():
    model = models.MLP((1,), 1, hidden=(40, 40), rngs=nnx.Rngs(0))
    return model, losses.mse, sinusoid(shots=10, queries=10), 25, 0.01, 2000


def omniglot_mlp_case():
    norm = partial(nnx.BatchNorm, use_scale=False, epsilon=1e-3)
    model = models.MLP((28, 28, 1), 5, hidden=(256, 128, 64, 64), norm=norm, rngs=nnx.Rngs(0))
    images = jax.random.randint(ROOT, (1000, 28, 28, 1), 0, 256, jnp.uint8)
    data = ClassImages(images, jnp.arange(50) * 20, jnp.full(50, 20))
    return model, losses.cross_entropy, episodes(data, 5, 1, 1), 32, 2.0, 20


def by_library(optimizer, length, model, make_loss, sampler, meta_batch, step_size):
    """`length` meta-steps by the library's parts."""
    apply, params = models.functional(model)
    adapt = only(nnx.Not(nnx.PathContains("norms")), unroll(optax.sgd(step_size), 1))
    step = train.meta_step(objectives.query_loss(make_loss(apply), adapt), optimizer, meta_batch=meta_batch)
    progress = train.begin(train.init(params, optimizer, ROOT), step, sampler)
    run = train.compile_loop(step).lower(progress, as_argument(sampler), jnp.int32(1)).compile()
    return run, (progress, as_argument(sampler), jnp.int32(length)), lambda out: out[0].state.params


def by_hand(optimizer, length, model, make_loss, sampler, meta_batch, step_size):
    """The same steps as a user would write them who knows JAX and needs one algorithm."""
    graphdef, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    chunk = train.chunk_size("auto", meta_batch, params)

    def loss(params, inputs, targets):
        state = jax.tree.map(lambda x: x, rest)
        outputs = nnx.merge(graphdef, params, state)(inputs)
        if make_loss is losses.mse:
            return jnp.mean((outputs - targets) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    def fixed(path):
        return any(getattr(k, "key", None) == "norms" for k in path)

    def query(params, task):
        grads = jax.grad(loss)(params, *task.support)
        adapted = jax.tree_util.tree_map_with_path(lambda k, p, g: p if fixed(k) else p - step_size * g, params, grads)
        return loss(adapted, *task.query)

    def gradient(params, tasks):
        if chunk == meta_batch:
            return jax.value_and_grad(lambda p: jax.vmap(query, (None, 0))(p, tasks).mean())(params)

        def one(total, task):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(query)(params, task)), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.tree.map(lambda x: x / meta_batch, lax.scan(one, zero, tasks)[0])

    def step(carry):
        i, params, state, total, sampler, length = carry
        value, grads = gradient(params, sampler(keys_for(ROOT, "meta_train/tasks", i, meta_batch)))
        updates, state = optimizer.update(grads, state, params)
        return i + 1, optax.apply_updates(params, updates), state, total + value, sampler, length

    def run(params, state, sampler, length):
        carry = jnp.int32(0), params, state, jnp.zeros(()), sampler, length
        return lax.while_loop(lambda c: c[0] < c[-1], step, carry)[1:4]

    arguments = params, optimizer.init(params), as_argument(sampler), jnp.int32(length)
    return jax.jit(run).lower(*arguments).compile(), arguments, lambda out: out[0]


def timed(run, arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def compare(case, repeats: int) -> dict[str, float]:
    *parts, length = case()
    # One step of SGD at rate 1 moves by the meta-gradient: it must be the same on both sides.
    start = models.functional(parts[0])[1]
    ends = [
        end(run(*arguments)) for run, arguments, end in (f(optax.sgd(1.0), 1, *parts) for f in (by_library, by_hand))
    ]
    moves = [jax.tree.map(jnp.subtract, start, end) for end in ends]
    error = optax.tree.norm(jax.tree.map(jnp.subtract, *moves)) / optax.tree.norm(moves[1])

    sides = {name: f(optax.adam(1e-3), length, *parts) for name, f in (("library", by_library), ("by hand", by_hand))}
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (run, arguments, _) in sides.items():
            times[name].append(timed(run, arguments) / length * 1e3)
    row = {f"{name}, ms": statistics.median(t) for name, t in times.items()}
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, (run, _, _) in sides.items()}
    return row | {
        "time ratio": statistics.median(ratios),
        **{f"{name}, bytes": size for name, size in memory.items()},
        "memory ratio": memory["library"] / memory["by hand"],
        "difference of meta-gradients": float(error),
    }


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for case in (sinusoid_case, omniglot_mlp_case):
        print(json.dumps({"case": case.__name__, "repeats": repeats} | compare(case, repeats)))


if __name__ == "__main__":
    main()
