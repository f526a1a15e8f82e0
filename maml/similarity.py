"""How alike two representations of the same inputs are, whatever basis each is written in.

A representation is the output of a layer: [examples, features], or [examples, height, width, channels], whose positions count as
examples, as in SVCCA (arXiv 1706.05806, section 4). Features are centred here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cka(x: Float[Array, "*examples features"], y: Float[Array, "*same_examples other_features"]) -> Float[Array, ""]:
    """Linear centred kernel alignment ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), in [0, 1].

    Kornblith et al. 2019 (arXiv 1905.00414, section 3). Equal up to a rotation, a shift and a scale: 1. It is biased towards 1
    where features are many and examples few. NaN for a representation that is constant.

    Raises:
      ValueError: for other examples in y than in x, and for fewer than 3: of 2 it is 1.
    """
    x, y = _rows(x, y)
    if len(x) < 3:
        raise ValueError(f"x: {len(x)} examples, whose CKA is always 1; give 3 or more")
    x, y = (z / jnp.linalg.norm(z) for z in (x, y))  # fourth powers of large activations would overflow
    norms = [jnp.linalg.norm(_product(a, b)) for a, b in ((x, y), (x, x), (y, y))]
    return norms[0] ** 2 / (norms[1] * norms[2])


def cca(
    x: Float[Array, "*examples features"], y: Float[Array, "*same_examples other_features"], variance: float = 0.99
) -> Float[Array, ""]:
    """Mean canonical correlation of the leading directions that hold this share of the variance of each: SVCCA, in [0, 1].

    Raghu et al. 2017 (arXiv 1706.05806, section 2). With variance=1 all directions count, and it is 1 for representations that
    are equal up to an invertible linear map; directions below the rounding error of the largest count as none. The mean is
    over as many correlations as the smaller side has directions. NaN for a representation that is constant.

    Raises:
      ValueError: for a share outside of (0, 1], other examples in y than in x, and too few: of as many examples as both sides
        have features together, or fewer, some correlations are 1 whatever the representations.
    """
    if not 0 < variance <= 1:
        raise ValueError(f"variance={variance}: give a share above 0 and not above 1")
    x, y = _rows(x, y)
    if len(x) <= x.shape[1] + y.shape[1]:
        raise ValueError(
            f"x: {len(x)} examples of {x.shape[1]} and {y.shape[1]} features, some of whose correlations are always 1; "
            f"give {x.shape[1] + y.shape[1] + 1} or more"
        )
    (u, kept_u), (v, kept_v) = (_directions(z, variance) for z in (x, y))
    correlations = jnp.linalg.svd(_product(u, v), compute_uv=False)
    return jnp.minimum(correlations, 1).sum() / jnp.minimum(kept_u, kept_v)


def _rows(x, y):
    """Both as centred matrices [examples, features]; a feature that varies by no more than rounding is 0."""
    x, y = (z.reshape(-1, z.shape[-1]) for z in (x, y))
    if len(x) != len(y):
        raise ValueError(f"y: {len(y)} examples, and x has {len(x)}; give the same inputs to both")
    return _centred(x), _centred(y)


def _centred(x):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rounding = 8 * jnp.finfo(x.dtype).eps * jnp.abs(x).max(0)
    return jnp.where(x.max(0) - x.min(0) > rounding, x - x.mean(0, keepdims=True), 0)


def _directions(x, variance):
    """Orthonormal principal directions of the examples, zero where they are left out, and how many are not.

    A direction is left out if those before it hold the share of the variance: if it and those after it hold no more than the
    rest, which is the sum that does not cancel.
    """
    u, s, _ = jnp.linalg.svd(x, full_matrices=False)
    rest = jnp.cumsum(s[::-1] ** 2)[::-1]
    kept = (rest > (1 - variance) * rest[0]) & (s > s[0] * max(x.shape) * jnp.finfo(s.dtype).eps)
    return u * kept[None], kept.sum()


def _product(x, y):
    return jnp.matmul(x.T, y, precision="highest")
