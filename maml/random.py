"""Keys as a pure function of (root, name, step): adding a consumer shifts no other, and resuming stores no key."""

import zlib

import jax
import jax.numpy as jnp

from maml.types import Key


def key_for(root: Key, name: str, step=0) -> Key:
    """The key of the consumer `name` at `step` (an integer or a traced scalar)."""
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def keys_for(root: Key, name: str, step, count: int, start=0) -> Key:
    """Keys [count] of the items start..start+count-1 of the consumer `name` at `step`.

    Each key depends on its global index alone, so that a draw does not depend on how the batch is laid out.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key_for(root, name, step), start + jnp.arange(count))
