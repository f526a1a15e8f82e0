"""N-way K-shot tasks from images grouped by class, drawn on the device from keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from maml.types import Key, Sampler, Task


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

    Raises:
      ValueError: for sizes below 1 or larger than the data, or rotations of images that are not
        square.
    """
    _check_sizes(data, ways=ways, shots=shots, queries=queries)
    _check_rotations(data, rotations)

    def task(data: ClassImages, key: Key) -> Task:
        key_images, key_turns = jax.random.split(key)
        images = data.images[_draw(data, ways, shots + queries, key_images)]
        if rotations == "per_class":
            images = _turn(images, jax.random.randint(key_turns, (ways,), 0, 4, jnp.int32))
        return Task(_batch(images[:, :shots], invert), _batch(images[:, shots:], invert))

    def draw(data: ClassImages, keys: Key) -> Task:
        return jax.vmap(task, (None, 0))(data, keys)

    return jax.tree_util.Partial(draw, ClassImages(*(jnp.asarray(x) for x in data)))


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


def _draw(data: ClassImages, ways: int, examples: int, key: Key) -> Int[Array, "ways examples"]:
    """Places in `data.images` of `examples` distinct images of each of `ways` distinct classes."""
    key_classes, key_examples = jax.random.split(key)
    left = data.starts.shape[0] - jnp.arange(ways)
    chosen = distinct(jax.random.randint(key_classes, (ways,), 0, left, jnp.int32))
    left = data.counts[chosen][:, None] - jnp.arange(examples)[None]
    offsets = jax.random.randint(key_examples, (ways, examples), 0, left, jnp.int32)
    return data.starts[chosen][:, None] + jax.vmap(distinct)(offsets)


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


def _check_sizes(data: ClassImages, **sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r}: give a whole number, 1 or more")
    classes = len(data.counts)
    if sizes["ways"] > classes:
        raise ValueError(f"ways={sizes['ways']}: this split has {classes} classes; give at most that many ways")
    smallest = int(np.min(data.counts))
    if sizes["shots"] + sizes["queries"] > smallest:
        raise ValueError(
            f"shots={sizes['shots']}, queries={sizes['queries']}: the smallest of the {classes} "
            f"classes has {smallest} examples; make shots + queries at most {smallest}"
        )


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
