"""N-way K-shot tasks from images grouped by class, drawn on the device from keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from maml.types import Key, Padded, Sampler, Task, whole


class ClassImages(NamedTuple):
    """Images by class: class i is images[starts[i] : starts[i] + counts[i]]; counts may differ."""

    images: UInt8[Array | np.ndarray, "total height width channels"]
    starts: Int[Array | np.ndarray, " classes"]
    counts: Int[Array | np.ndarray, " classes"]


def episodes(
    data: ClassImages,
    ways: int,
    shots: int,
    queries: int,
    *,
    rotations: str = "none",
    invert: bool = False,
    least_ways: int | None = None,
) -> Sampler:
    """Tasks of `ways` classes with `shots` support and `queries` query examples each.

    Classes are drawn without replacement and labelled 0..ways-1 in random order; examples are drawn
    without replacement within a class, so support and query share none. With
    `rotations="per_class"` each class of each task is turned by its own multiple of 90°, so that
    two rotations of one character never meet (Finn et al. 2017, arXiv 1703.03400, section 5.2 and
    its code). For rotations that are classes of their own see `rotated_classes`.

    Inputs are float32 [tasks, ways·shots, height, width, channels] in [0, 1] (1 - x with `invert`),
    class by class; targets int32 [tasks, ways·shots]; likewise ways·queries for the query set. The
    data are an argument of the sampler (a `Partial`), not a constant of the program.

    With `least_ways` tasks vary in ways and shots as those of Meta-Dataset do (Triantafillou et al.
    2020, arXiv 1903.03096, section 3.2): `least_ways` to `ways` classes, equally likely, and 1 to
    `shots` support examples of each, often imbalanced (`varied_shots`); of each `queries` query
    examples. Inputs are then `Padded` to the shapes above, and the labels of what is absent -1. A
    class needs queries + 1 examples only. (Its hierarchies of classes are left out.)

    Raises:
      ValueError: for sizes below 1 or larger than the data, or rotations of images that are not
        square.
    """
    if least_ways is None:
        _check_sizes(data, ways=ways, shots=shots, queries=queries)
    else:
        _check_varied(data, least_ways, ways, shots, queries)
    _check_rotations(data, rotations)

    def task(data: ClassImages, key: Key) -> Task:
        key_images, key_turns = jax.random.split(key)
        chosen, places = _draw(data, ways, shots + queries, key_images)
        images = data.images[places]
        if rotations == "per_class":
            images = _turn(images, jax.random.randint(key_turns, (ways,), 0, 4, jnp.int32))
        if least_ways is None:
            return Task(_batch(images[:, :shots], invert), _batch(images[:, shots:], invert))
        key_ways, key_shots = jax.random.split(jax.random.fold_in(key, 2))
        drawn = jax.random.randint(key_ways, (), least_ways, ways + 1, jnp.int32)
        of_each = varied_shots(data.counts[chosen], jnp.arange(ways) < drawn, shots, queries, key_shots)
        query, support = images[:, :queries], images[:, queries:]  # a small class has its queries first
        return Task(
            _padded(_batch(support, invert), jnp.arange(shots)[None] < of_each[:, None], drawn),
            _padded(_batch(query, invert), jnp.tile(of_each[:, None] > 0, queries), drawn),
        )

    def draw(data: ClassImages, keys: Key) -> Task:
        return jax.vmap(task, (None, 0))(data, keys)

    return jax.tree_util.Partial(draw, ClassImages(*(jnp.asarray(x) for x in data)))


MOST_SUPPORT = 500
"""Support examples of a task of varied shots, all classes together, at most: Meta-Dataset's."""


def varied_shots(
    counts: Int[Array, " ways"], exists: Bool[Array, " ways"], shots: int, queries: int, key: Key
) -> Int[Array, " ways"]:
    """The support examples of each class in a task of Meta-Dataset (arXiv 1903.03096, section 3.2); 0 where there is no class.

    With nₖ the examples of class k beside its queries, at most `shots`, and β uniform in (0, 1] the support set has
    S = min(Σₖ ⌈β nₖ⌉, 500) examples. Each class has one, and of the others a share in proportion to its size times exp(αₖ), αₖ
    uniform between log ½ and log 2, rounded down and at most nₖ. (There nₖ has its own limit, 100, in the first place only.)
    """
    key_total, key_shares = jax.random.split(key)
    room = jnp.where(exists, jnp.minimum(shots, counts - queries), 0)
    beta = jax.random.uniform(key_total, dtype=jnp.float32)
    total = jnp.minimum(jnp.sum(jnp.where(exists, jnp.floor(beta * room) + 1, 0)), MOST_SUPPORT)
    log_two = np.float32(np.log(2))
    spread = jax.random.uniform(key_shares, counts.shape, jnp.float32, -log_two, log_two)
    share = jnp.where(exists, counts * jnp.exp(spread), 0)
    wanted = jnp.floor(share / jnp.sum(share) * (total - jnp.sum(exists))).astype(jnp.int32) + 1
    return jnp.minimum(wanted, room)


def group(
    images: UInt8[np.ndarray, "total height width channels"],
    labels: Int[np.ndarray, " total"],
    classes: int,
) -> ClassImages:
    """Images with labels 0..classes-1, by class; a class's images stay in the order given."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes).astype(np.int32)
    starts = np.cumsum(counts, dtype=np.int32) - counts
    return ClassImages(images[order], starts, counts)


def select(data: ClassImages, classes: Int[np.ndarray, " chosen"]) -> ClassImages:
    """The given classes (their indices), in that order."""
    spans = [np.arange(s, s + c) for s, c in zip(data.starts, data.counts, strict=True)]
    labels = np.repeat(np.arange(len(classes)), np.asarray(data.counts)[classes])
    return group(np.asarray(data.images)[np.concatenate([spans[i] for i in classes])], labels, len(classes))


def rotated_classes(data: ClassImages) -> ClassImages:
    """Every class four times, turned by 0, 90, 180, 270 degrees: 4i + k is class i turned k times.

    The rule of Vinyals et al. 2016 (arXiv 1606.04080), of prototypical networks and of Reptile:
    rotations of one character are different classes, and may meet in one task.

    Raises:
      ValueError: for images that are not square.
    """
    _check_rotations(data, "per_class")
    turned = [np.rot90(data.images, k, (1, 2)) for k in range(4)]
    labels = 4 * np.repeat(np.arange(len(data.counts)), data.counts)
    return group(np.concatenate(turned), np.concatenate([labels + k for k in range(4)]), 4 * len(data.counts))


def _draw(
    data: ClassImages, ways: int, examples: int, key: Key
) -> tuple[Int[Array, " ways"], Int[Array, "ways examples"]]:
    """Distinct classes, and the places in `data.images` of `examples` distinct images of each.

    Of a class that has fewer the first ones are distinct and its own, and the others are not.
    """
    key_classes, key_examples = jax.random.split(key)
    left = data.starts.shape[0] - jnp.arange(ways)
    chosen = distinct(jax.random.randint(key_classes, (ways,), 0, left, jnp.int32))
    left = jnp.maximum(data.counts[chosen][:, None] - jnp.arange(examples)[None], 1)
    offsets = jax.random.randint(key_examples, (ways, examples), 0, left, jnp.int32)
    return chosen, data.starts[chosen][:, None] + jax.vmap(distinct)(offsets)


def distinct(offsets: Int[Array, " draws"]) -> Int[Array, " draws"]:
    """The first draws of a Fisher-Yates shuffle of 0..n-1, given offsets[i] uniform on 0..n-1-i.

    All ordered choices of distinct numbers are equally likely. Only the places that the swaps
    touched are remembered, so the cost does not depend on n (sorting random bits of 1,100 classes
    is a hundred times slower on a CPU).
    """
    draws = jnp.arange(offsets.shape[0], dtype=jnp.int32)

    def step(i, state):
        places, values, drawn = state

        def value_at(place):  # the last value swapped to this place, or the place itself
            last = jnp.max(jnp.where(places == place, draws + 1, 0))
            return jnp.where(last > 0, values[last - 1], place)

        place = i + offsets[i]
        drawn = drawn.at[i].set(value_at(place))
        return places.at[i].set(place), values.at[i].set(value_at(i)), drawn

    nowhere = jnp.full_like(draws, -1)
    return lax.fori_loop(0, offsets.shape[0], step, (nowhere, draws, draws))[2]


def _turn(
    images: UInt8[Array, "ways examples side side channels"], turns: Int[Array, " ways"]
) -> UInt8[Array, "ways examples side side channels"]:
    """Turn all images of class i by 90° `turns[i]` times."""
    turns = turns.reshape(-1, 1, 1, 1, 1)
    return jnp.select([turns == k for k in range(4)], [jnp.rot90(images, k, (2, 3)) for k in range(4)])


def _batch(
    images: UInt8[Array, "ways examples height width channels"], invert: bool
) -> tuple[Float[Array, "total height width channels"], Int[Array, " total"]]:
    """Inputs and targets, class by class."""
    ways, examples, *shape = images.shape
    pixels = (255 - images if invert else images).reshape(ways * examples, *shape)
    return pixels.astype(jnp.float32) / 255, jnp.repeat(jnp.arange(ways, dtype=jnp.int32), examples)


def _padded(batch: tuple[Array, Array], present: Bool[Array, "ways examples"], ways: Array) -> tuple[Padded, Array]:
    """A batch of which only a part is there: zeros and labels of -1 elsewhere."""
    inputs, labels = batch
    present = present.reshape(-1)
    inputs = jnp.where(present.reshape(-1, *[1] * (inputs.ndim - 1)), inputs, 0)
    return Padded(inputs, present, jnp.full_like(labels, ways)), jnp.where(present, labels, -1)


def _check_varied(data: ClassImages, least_ways: int, ways: int, shots: int, queries: int) -> None:
    for name, size in {"least_ways": least_ways, "ways": ways, "shots": shots, "queries": queries}.items():
        _check_size(name, size)
    most = min(len(data.counts), MOST_SUPPORT)
    if not least_ways <= ways <= most:
        raise ValueError(
            f"least_ways={least_ways}, ways={ways}: give no more than `ways`, and at most {most} ways here"
        )
    smallest = int(np.min(data.counts))
    if queries >= smallest:
        raise ValueError(
            f"queries={queries}: the smallest of the {len(data.counts)} classes has {smallest} examples; leave one for the "
            f"support set, {smallest - 1} queries at most"
        )


def _check_sizes(data: ClassImages, **sizes: Any) -> None:
    for name, size in sizes.items():
        _check_size(name, size)
    classes = len(data.counts)
    if sizes["ways"] > classes:
        raise ValueError(f"ways={sizes['ways']}: this split has {classes} classes; give at most that many ways")
    smallest = int(np.min(data.counts))
    if sizes["shots"] + sizes["queries"] > smallest:
        raise ValueError(
            f"shots={sizes['shots']}, queries={sizes['queries']}: the smallest of the {classes} "
            f"classes has {smallest} examples; make shots + queries at most {smallest}"
        )


def _check_size(name: str, size: Any) -> None:
    if not whole(size, 1):
        raise ValueError(f"{name}={size!r}: give a whole number, 1 or more")


def _check_rotations(data: ClassImages, rotations: str) -> None:
    height, width = data.images.shape[1:3]
    if rotations not in ("none", "per_class"):
        raise ValueError(
            f"rotations={rotations!r}: give 'none', 'per_class', or for a data set 'classes' (for "
            "arrays: rotated_classes(data))"
        )
    if rotations == "per_class" and height != width:
        raise ValueError(
            f"rotations={rotations!r}: images of {height}x{width} are not square; resize them, or give 'none'"
        )
