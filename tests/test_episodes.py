"""Tasks from class images: what is drawn, how often, and that the data stay out of the program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from maml.tasks.episodes import (
    ClassImages,
    _check_sizes,
    distinct,
    episodes,
    group,
    rotated_classes,
    select,
)

CORNERS = np.array([[1, 2], [3, 4]], np.uint8)


def coded(counts) -> ClassImages:
    """2x2 images whose channels say class, example, and (by their corners) rotation."""
    labels = np.repeat(np.arange(len(counts)), counts)
    numbers = np.concatenate([np.arange(c) for c in counts])
    images = np.stack(
        [np.stack([np.full((2, 2), a), np.full((2, 2), b), CORNERS], -1) for a, b in zip(labels, numbers, strict=True)]
    )
    return group(images.astype(np.uint8), labels, len(counts))


def draw(sampler, tasks=64, seed=0):
    """Tasks as integers: ((class, example, corners), targets) of support and query."""
    task = jax.jit(lambda s, keys: s(keys))(sampler, jax.random.split(jax.random.key(seed), tasks))

    def read(batch):
        pixels = np.asarray(jnp.round(batch[0] * 255).astype(int))
        return pixels[..., 0, 0, 0], pixels[..., 0, 0, 1], pixels[..., 2], np.asarray(batch[1])

    return read(task.support), read(task.query)


def uniform(values, kinds):
    counts = np.bincount(np.ravel(values), minlength=kinds)
    assert len(counts) == kinds
    assert chisquare(counts).pvalue > 1e-3


def test_shapes_types_and_class_major_targets():
    sampler, keys = episodes(coded([6] * 9), ways=4, shots=2, queries=3), jax.random.key(0)[None]
    for x64 in (False, True):
        with jax.enable_x64(x64):
            task = jax.eval_shape(sampler, keys)
        assert (task.support[0].shape, task.support[0].dtype) == ((1, 8, 2, 2, 3), jnp.float32)
        assert (task.query[0].shape, task.query[0].dtype) == ((1, 12, 2, 2, 3), jnp.float32)
        assert (task.support[1].shape, task.support[1].dtype) == ((1, 8), jnp.int32)
    (_, _, _, targets), (_, _, _, query_targets) = draw(sampler)
    assert (targets == np.repeat(np.arange(4), 2)).all()
    assert (query_targets == np.repeat(np.arange(4), 3)).all()


def test_no_class_twice_and_one_class_for_each_target():
    (support, _, _, targets), (query, _, _, query_targets) = draw(episodes(coded([6] * 9), 4, 2, 3))
    for t in range(4):
        classes = np.concatenate([support[:, targets[0] == t], query[:, query_targets[0] == t]], 1)
        assert (classes == classes[:, :1]).all()
    assert all(len(set(row)) == 4 for row in support)


def test_support_and_query_share_no_example():
    (c, e, _, _), (cq, eq, _, _) = draw(episodes(coded([5] * 9), 3, 2, 3))
    for row in np.concatenate([c * 100 + e, cq * 100 + eq], 1):
        assert len(set(row)) == 15  # all five examples of three classes, each once


@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 4), (5, 3), (3, 1)])
def test_all_ordered_choices_come_from_equally_many_offsets(n, k):
    offsets = jnp.array(list(itertools.product(*(range(n - i) for i in range(k)))), jnp.int32)
    choices = [tuple(row) for row in np.asarray(jax.vmap(distinct)(offsets))]
    assert sorted(choices) == sorted(itertools.permutations(range(n), k))


def test_distinct_is_the_shuffle_of_fisher_and_yates():
    rng = np.random.default_rng(0)
    offsets = [int(rng.integers(30 - i)) for i in range(30)]
    pool = list(range(30))
    for i, o in enumerate(offsets):
        pool[i], pool[i + o] = pool[i + o], pool[i]
    assert distinct(jnp.array(offsets, jnp.int32)).tolist() == pool


@pytest.fixture(scope="module")
def many():
    """3,000 tasks with all that is random: 2 of 4 classes, 2 of 4 examples, 4 rotations."""
    return draw(episodes(coded([4] * 4), 2, 1, 1, rotations="per_class"), tasks=3000)


PAIRS = list(itertools.permutations(range(4), 2))


def test_classes_are_uniform_and_so_are_their_orders(many):
    (classes, _, _, _), _ = many
    uniform([PAIRS.index(tuple(row)) for row in classes], len(PAIRS))


def test_one_of_many_classes_is_uniform():
    (classes, _, _, _), _ = draw(episodes(coded([2] * 50), 5, 1, 1), tasks=3000)
    for way in range(5):
        uniform(classes[:, way], 50)


def test_examples_are_uniform_and_so_are_their_orders(many):
    (_, support, _, _), (_, query, _, _) = many
    for way in range(2):
        both = zip(support[:, way], query[:, way], strict=True)
        uniform([PAIRS.index(pair) for pair in both], len(PAIRS))


def test_rotations_are_uniform_independent_and_of_the_whole_class(many):
    (_, _, corners, _), (_, _, query, _) = many
    turned = [np.rot90(CORNERS, k).tolist() for k in range(4)]
    turns = np.array([[turned.index(image.tolist()) for image in task] for task in corners])
    uniform(4 * turns[:, 0] + turns[:, 1], 16)
    assert (query == corners).all()


def test_without_rotations_images_stand_upright():
    (_, _, corners, _), _ = draw(episodes(coded([4] * 3), 2, 1, 2))
    assert (corners == CORNERS).all()


@pytest.mark.parametrize(("invert", "values"), [(False, [0, 0.2, 1]), (True, [0, 0.8, 1])])
def test_pixels_are_scaled_and_inverted(invert, values):
    data = group(np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1), np.zeros(3, int), 1)
    sampler = jax.jit(episodes(data, 1, 2, 1, invert=invert))
    drawn = np.ravel(sampler(jax.random.split(jax.random.key(0), 20)).support[0])
    np.testing.assert_allclose(np.unique(np.round(drawn, 5)), values, atol=1e-6)
    assert drawn.max() == 1


def test_a_task_is_a_function_of_its_key_alone():
    sampler = episodes(coded([6] * 9), 2, 1, 1, rotations="per_class")
    keys, jitted = jax.random.split(jax.random.key(3), 5), jax.jit(lambda s, k: s(k))
    tasks = jitted(sampler, keys)
    jax.tree.map(np.testing.assert_array_equal, tasks, sampler(keys))
    alone = jitted(sampler, keys[2:3])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2], y[0]), tasks, alone)
    assert (tasks.support[0][0] != tasks.support[0][1]).any()


def test_classes_of_different_sizes():
    counts = [3, 7, 2, 5]
    (c, e, _, _), (cq, eq, _, _) = draw(episodes(coded(counts), 2, 1, 1), tasks=2000)
    seen = set(zip(np.ravel(c), np.ravel(e), strict=True)) | set(zip(np.ravel(cq), np.ravel(eq), strict=True))
    assert seen == {(i, j) for i, count in enumerate(counts) for j in range(count)}
    uniform(e[c == 1], 7)


def test_data_are_an_argument_of_the_program_and_no_constant():
    data = coded([20] * 200)
    sampler, keys = episodes(data, 5, 1, 1), jax.random.split(jax.random.key(0), 4)

    def constants(f, *args):
        return sum(np.size(c) for c in jax.make_jaxpr(f)(*args).consts)

    assert constants(lambda s, k: s(k), sampler, keys) < 100
    assert constants(sampler, keys) >= data.images.size  # what the check sees when it is closed over
    assert len(jax.jit(lambda s, k: s(k)).lower(sampler, keys).as_text()) < 100_000


def test_rotated_classes_are_classes():
    data = coded([2, 3])
    turned = rotated_classes(data)
    assert turned.counts.tolist() == [2, 2, 2, 2, 3, 3, 3, 3]
    for i, (start, count) in enumerate(zip(turned.starts, turned.counts, strict=True)):
        old = data.images[data.starts[i // 4] : data.starts[i // 4] + data.counts[i // 4]]
        np.testing.assert_array_equal(turned.images[start : start + count], np.rot90(old, i % 4, (1, 2)))


def test_select_takes_classes_in_the_order_given():
    chosen = select(coded([2, 3, 4]), np.array([2, 0]))
    assert chosen.counts.tolist() == [4, 2]
    assert chosen.images[:, 0, 0, 0].tolist() == [2, 2, 2, 2, 0, 0]
    assert chosen.images[:, 0, 0, 1].tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 1, 1), "ways=4: this split has 3 classes"),
        ((2, 2, 4), "shots=2, queries=4: the smallest of the 3 classes has 5 examples"),
        ((0, 1, 1), "ways=0: give a whole number"),
        ((2, -1, 1), "shots=-1: give a whole number"),
        ((2, 1, 0), "queries=0: give a whole number"),
        ((True, 1, 1), "ways=True: give a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        episodes(coded([6, 5, 7]), *sizes)


def test_sizes_that_are_no_numbers_are_refused():
    for size in (2.0, "five", None):  # past the annotations, which only tests check
        with pytest.raises(ValueError, match="shots=.*: give a whole number, 1 or more"):
            _check_sizes(coded([6]), ways=1, shots=size, queries=1)


def test_the_largest_sizes_that_fit_are_taken():
    (c, e, _, _), _ = draw(episodes(coded([5, 5, 5]), 3, 4, 1))
    assert all(len(set(row)) == 3 for row in c)
    assert e.shape == (64, 12)


def test_rotations_that_do_not_fit_are_refused():
    tall = group(np.zeros((4, 2, 3, 1), np.uint8), np.zeros(4, int), 1)
    with pytest.raises(ValueError, match="rotations='per_class': images of 2x3 are not square"):
        episodes(tall, 1, 1, 1, rotations="per_class")
    with pytest.raises(ValueError, match="2x3 are not square"):
        rotated_classes(tall)
    with pytest.raises(ValueError, match="rotations='half': give 'none', 'per_class'"):
        episodes(coded([5]), 1, 1, 1, rotations="half")
    episodes(tall, 1, 1, 1)
