"""Checkpoints: exact round trips, damage, and what is left after a failed save."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maml.checkpoint import Checkpoints, Damaged, OtherTree, digest
from maml.models import MLP, functional


def tree(seed: int = 0):
    _, params = functional(MLP((2,), 1, hidden=(3,), norm=nnx.BatchNorm, rngs=nnx.Rngs(seed)))
    state = optax.adam(1e-3).init(params)
    return {
        "params": params,
        "opt": state,
        "key": jax.random.key(seed),
        "step": jnp.int32(seed),
        "x": jnp.array([jnp.nan, -0.0]),
    }


def same(a, b) -> bool:
    return digest(a) == digest(b) and jax.tree.structure(a) == jax.tree.structure(b)


def test_the_round_trip_is_exact_in_bits_and_structure(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, tree(1), {"a": {"b": [1, None, "c"]}})
    step, read = Checkpoints(tmp_path).restore(tree(0))
    assert step == 3
    assert same(read, tree(1))
    assert not same(read, tree(0))
    assert Checkpoints(tmp_path).config() == {"a": {"b": [1, None, "c"]}}


@pytest.mark.parametrize("name", ["hidden=[8],steps=3", "a*b?", "[!x]"])
def test_a_directory_may_have_a_name_that_is_a_pattern(tmp_path, name):
    """A sweep over lists makes them."""
    directory = tmp_path / name / "checkpoints"
    for step in (1, 2, 3):
        Checkpoints(directory, keep=2).save(step, tree(step), {"at": step})
    found = Checkpoints(directory)
    assert (found.steps(), found.config()) == ([2, 3], {"at": 3})
    assert found.configs() == {3: {"at": 3}, 2: {"at": 2}}
    assert same(found.restore(tree())[1], tree(3))


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, tree(step), {})
    checkpoints.save(10, tree(99), {})
    assert checkpoints.steps() == [2, 10]
    assert same(checkpoints.restore(tree())[1], tree(10))


def test_nothing_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(tree()) is None
    assert Checkpoints(tmp_path / "none").config() is None


def damage(directory, how):
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    if how == "delete":
        for path in files:
            path.unlink()
        return
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if how == "truncate" else bytes(255 - b for b in data))


@pytest.mark.parametrize("how", ["truncate", "invert", "delete"])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, caplog, how):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree(step), {"step": step})
    checkpoints.close()
    damage(tmp_path / "2", how)
    with caplog.at_level(logging.WARNING):
        step, read = Checkpoints(tmp_path).restore(tree())
    assert step == 1
    assert same(read, tree(1))
    assert str(tmp_path / "2") in caplog.text
    damage(tmp_path / "1", how)
    with pytest.raises(Damaged, match="no checkpoint in"):
        Checkpoints(tmp_path).restore(tree())


def test_values_that_changed_on_disk_are_not_believed(tmp_path, monkeypatch):
    """Whatever the storage format lets through, the digest does not."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(1), {})
    read = checkpoints._read

    def altered(step, item, template=None):
        value = read(step, item, template)
        if item == "state":
            value["x"] = np.array(value["x"]) + 1
        return value

    monkeypatch.setattr(checkpoints, "_read", altered)
    with pytest.raises(Damaged):
        checkpoints.restore(tree())


def test_a_save_that_the_disk_refuses_says_so_and_loses_nothing(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(1), {})

    def full(*args, **kwargs):
        del args, kwargs
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(OSError, match="could not save step 2.*No space left"):
        checkpoints.save(2, tree(2), {})
    assert same(Checkpoints(tmp_path).restore(tree())[1], tree(1))


def test_the_digest_sees_bits_shapes_types_and_names():
    trees = [{"a": jnp.zeros(4)}, {"b": jnp.zeros(4)}, {"a": -jnp.zeros(4)}, {"a": jnp.zeros((2, 2))},
             {"a": jnp.zeros(4, jnp.int32)}, {"a": jax.random.key(0)}, {"a": jax.random.key(1)}]  # fmt: skip
    assert len({digest(t) for t in trees}) == len(trees)
    assert digest(trees[0]) == digest({"a": np.zeros(4, np.float32)})


def test_a_whole_checkpoint_of_another_tree_is_not_called_damaged(tmp_path):
    Checkpoints(tmp_path).save(1, tree(1), {})
    with pytest.raises(OtherTree, match="'more'"):
        Checkpoints(tmp_path).restore(tree() | {"more": jnp.zeros(2)})
    with pytest.raises(OtherTree, match="'x'.*float32.3"):
        Checkpoints(tmp_path).restore(tree() | {"x": jnp.zeros(3)})
