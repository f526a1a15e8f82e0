"""Low-rank adapters as all that an inner loop moves."""

import math
import re

import jax
import jax.numpy as jnp

from maml.inner_loop.parts import composed
from maml.types import Adapt, Adapted, Loss, MetaParams, Params, Trace, initial, leaf_name, own, whole


def low_rank(rank: int, adapt: Adapt, where: str = "kernel", scale: float = 1.0) -> Adapt:
    """Move W + scale · A B in the factors alone, A [inputs, rank] and B [rank, outputs]: LoRA, Hu et al. 2022 (arXiv 2106.09685).

    B starts at zero, so a task starts at W; A starts normal with variance 1/inputs, and both starts are meta-learned as W is. A
    kernel of more than two axes (a convolution's) is taken as the matrix [all but the last, last]. Any pytree will do.

    Args:
      rank: at most the smaller side of a matrix is used; then A B can be any matrix.
      where: regular expression that is searched in the paths of the parameters ("layers/0/kernel") of two or more axes.

    Raises:
      ValueError: for a rank below 1; at `init`, where nothing of two or more axes fits `where`, and around a learned inner loop;
        when traced, for plain parameters.
    """
    if not whole(rank, 1):
        raise ValueError(f"rank={rank!r}: give a whole number, 1 or more")

    def adapt_factors(loss: Loss, params, support, key) -> Adapted:
        model, factors = own(params)

        def join(factors) -> Params:
            def one(path, x):
                if (name := leaf_name(path)) not in factors:
                    return x
                return x + scale * (factors[name]["a"] @ factors[name]["b"]).reshape(x.shape)

            return jax.tree.map_with_path(one, model)

        adapted = adapt(composed(loss, join), factors, support, key)
        return Adapted(join(adapted.params), Trace(jax.vmap(join)(adapted.trace.params), adapted.trace.metrics))

    def init(params, key):
        leaves = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(params)}
        chosen = {name: x for name, x in leaves.items() if x.ndim > 1 and re.search(where, name)}
        if not chosen:
            raise ValueError(f"where={where!r} finds no matrix; the paths are {', '.join(leaves)}")
        factors = {name: _factors(x, rank, jax.random.fold_in(key, i)) for i, (name, x) in enumerate(chosen.items())}
        if isinstance(initial(adapt, factors, key), MetaParams):
            raise ValueError(
                "low_rank: put a learned inner loop outside: learned(lambda inner: low_rank(rank, unroll(...)), init)"
            )
        return MetaParams(params, factors)

    adapt_factors.init = init
    return adapt_factors


def _factors(x: jax.Array, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    inputs, outputs = math.prod(x.shape[:-1]), x.shape[-1]
    rank = min(rank, inputs, outputs)
    a = jax.random.normal(key, (inputs, rank), x.dtype) / math.sqrt(inputs)
    return {"a": a, "b": jnp.zeros((rank, outputs), x.dtype)}
