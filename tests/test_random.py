"""Keys depend on name, step and index, and on nothing else."""

import jax
import numpy as np

from maml.random import key_for, keys_for

ROOT = jax.random.key(0)


def bits(key):
    return np.asarray(jax.random.key_data(key))


def test_names_steps_and_roots_give_different_keys():
    keys = [key_for(r, n, s) for r in (ROOT, jax.random.key(1)) for n in ("a", "b") for s in (0, 1)]
    assert len({bits(k).tobytes() for k in keys}) == 8
    np.testing.assert_array_equal(bits(key_for(ROOT, "a", 1)), bits(key_for(ROOT, "a", 1)))


def test_a_key_of_a_batch_depends_on_its_global_index_alone():
    whole = bits(keys_for(ROOT, "tasks", 3, 8))
    np.testing.assert_array_equal(bits(keys_for(ROOT, "tasks", 3, 4, start=4)), whole[4:])
    np.testing.assert_array_equal(bits(keys_for(ROOT, "tasks", 3, 2)), whole[:2])
    assert len(np.unique(whole, axis=0)) == 8
