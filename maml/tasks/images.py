"""Few-shot image classification from TFDS and from folders."""

import collections
import functools
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maml.tasks.decode import DECODING, cache_folder, cached, decode_all, decoder, digest
from maml.tasks.episodes import ClassImages, episodes, group, rotated_classes, select
from maml.tasks.splits import ClassSplit, classes_of, files_of, read_split
from maml.types import Sampler

OMNIGLOT_SHA256 = "922f914a43b43bc347694d5536e487b22ac1433ed8cad8db913d1d1b0b95ba86"
"""Of the 32,460 drawings at 28x28 by class, sorted within a class: `tfds_images`."""

SUFFIXES = (".png", ".jpg", ".jpeg")


def omniglot(
    split: str = "meta_train",
    ways: int = 5,
    shots: int = 1,
    queries: int = 1,
    *,
    data_dir: str | None = None,
    class_split: str = "finn",
    rotations: str = "per_class",
    invert: bool = True,
    cache_dir: str | None = None,
    least_ways: int | None = None,
) -> Sampler:
    """Omniglot as in Finn et al. 2017 (arXiv 1703.03400), section 5.2; shapes as of `episodes`.

    Drawings are 28x28x1 and binary: the nearest neighbour of the 105x105 1-bit drawing, as in the
    authors' resize script (loaders that convert to grey first make another, anti-aliased data set).
    With `invert` ink is 1, without it 0.

    Args:
      split: meta_train, meta_valid or meta_test.
      data_dir: where TFDS has prepared data sets; None for its own default (TFDS_DATA_DIR or
        ~/tensorflow_datasets).
      class_split: 'finn' (1100/100/423 characters), 'mamlpp' (1150/50/423), 'nichol' (1200/0/423), 'vinyals' (1028/172/423),
        'vinyals_trainval' (1200/0/423), 'lake' (964/0/659) or a path: `read_split`.
      rotations: 'none', 'per_class' (each class of a task turned at random) or 'classes' (four
        times the classes).
      cache_dir: for the decoded arrays; None for MAML_CACHE or ~/.cache/maml.
      least_ways: tasks of that many to `ways` classes, 1 to `shots` examples of each (`episodes`); None: all of the same sizes.

    Raises:
      FileNotFoundError: the data set is not there and cannot be prepared.
      ValueError: for names and sizes that do not fit.
    """
    wanted = classes_of(class_split, split)
    data, names = tfds_images("omniglot", data_dir, size=28, cache_dir=cache_dir)
    data = classes_named(data, names, wanted, class_split)
    if rotations == "classes":
        # The rows that 105 -> 28 keeps lie symmetrically, so this equals turning before resizing.
        data, rotations = rotated_classes(data), "none"
    return episodes(data, ways, shots, queries, rotations=rotations, invert=invert, least_ways=least_ways)


def image_folder(
    split: str = "meta_train",
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    *,
    data_dir: str,
    class_split: str | None = None,
    image_size: int = 84,
    channels: int = 3,
    rotations: str = "none",
    invert: bool = False,
    cache_dir: str | None = None,
    least_ways: int | None = None,
) -> Sampler:
    """A folder of classes, `data_dir/class/*.png|jpg|jpeg`; shapes as of `episodes`.

    Where the class split lists images by name (the CSV of mini-ImageNet), those alone: in `data_dir`, `data_dir/images` or
    `data_dir/class`.

    Images are resized to image_size x image_size with the Lanczos filter (the mini-ImageNet of
    MAML's authors), and are RGB for 3 channels, grey for 1.

    Args:
      class_split: where the lists of classes are (see `read_split`); None to find them in
        `data_dir`.
      rotations: 'none', 'per_class' or 'classes', as for `omniglot`.
      cache_dir: for the decoded arrays; None for MAML_CACHE or ~/.cache/maml.
      least_ways: tasks of that many to `ways` classes, 1 to `shots` examples of each (`episodes`); None: all of the same sizes.

    Raises:
      FileNotFoundError: no such folder, no lists of classes, or none of a listed image.
      ValueError: for an unreadable image, a class that is not there, an image that is listed twice, and names and sizes that do
        not fit.
    """
    check_image(image_size, channels)
    root, where = _folder(data_dir, class_split)
    classes, listed = classes_of(where, split), files_of(where, split)
    there = _folder_files(root, where)[split]
    files = [_complete(root, name, listed.get(name), there[name]) for name in classes]
    data = _folder_images(root, files, image_size, channels, cache_dir)
    if rotations == "classes":
        data, rotations = rotated_classes(data), "none"
    return episodes(data, ways, shots, queries, rotations=rotations, invert=invert, least_ways=least_ways)


def folder_digest(data_dir: str, class_split: str | None = None) -> str:
    """Changes with the classes of each part of the split, and with the names and sizes of their images; not with where these are.

    Raises:
      FileNotFoundError, ValueError: as `image_folder`.
    """
    parts = _folder_files(*_folder(data_dir, class_split))
    facts = [
        (name, [(f.name, f.stat().st_size) for f in files]) for part in parts.values() for name, files in part.items()
    ]
    return digest([len(part) for part in parts.values()], facts)


def check_image(image_size: int, channels: int) -> None:
    """ValueError for a size below 1, and other than 1 or 3 channels."""
    if channels not in (1, 3) or image_size < 1:
        raise ValueError(
            f"image_size={image_size}, channels={channels}: give a positive size, and 1 (grey) or 3 (RGB) channels"
        )


def tfds_images(
    name: str,
    data_dir: str | None = None,
    *,
    label: str = "label",
    size: int,
    mode: str = "L",
    parts: str = "train+test",
    resample: Image.Resampling = Image.Resampling.NEAREST,
    cache_dir: str | None = None,
) -> tuple[ClassImages, tuple[str, ...]]:
    """All images of a TFDS data set by class, and the classes' names; needs no TensorFlow.

    Images are uint8 size x size in Pillow's `mode` ('L' or 'RGB'). Within a class they are sorted
    by their bytes: the order of records differs between preparations, and the same keys must draw
    the same tasks from each.

    Raises:
      FileNotFoundError: the data set is not there and cannot be prepared.
      ValueError: it has no class label of that name.
    """
    return _tfds_images(name, _data_dir(data_dir), label, size, mode, parts, resample, cache_folder(cache_dir))


@functools.lru_cache(maxsize=2)  # meta_train, meta_valid and meta_test read the same arrays
def _tfds_images(name, data_dir, label, size, mode, parts, resample, cache_dir):
    builder = _prepared(name, data_dir)
    names = _class_names(builder, label)
    shards = {k: (v.num_bytes, v.shard_lengths) for k, v in sorted(builder.info.splits.items())}
    key = digest(str(builder.version), label, size, mode, parts, resample, shards)

    def build() -> ClassImages:
        records = _records(builder, parts)
        images = decode_all([r["image"] for r in records], decoder(size, mode, resample), name, 1)
        labels = np.array([r[label] for r in records])
        order = sorted(range(len(labels)), key=lambda i: (labels[i], images[i].tobytes()))
        return group(images[order], labels[order], len(names))

    data = cached(cache_dir / f"{name}-{size}-{key}.npz", build)
    return data, names


def _class_names(builder: Any, label: str) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    features = builder.info.features.items()
    labels = {k: feature for k, feature in features if isinstance(feature, tfds.features.ClassLabel)}
    if label not in labels:
        raise ValueError(f"label={label!r}: {builder.name!r} has no such class label; give one of {', '.join(labels)}")
    return tuple(labels[label].names)


def _records(builder: Any, parts: str) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    # Decoding with TFDS would make 1-bit drawings RGB, and would decode masks that nobody asks for.
    pictures = [k for k, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    skip = {k: tfds.decode.SkipDecoding() for k in pictures}
    source = builder.as_data_source(split=parts, decoders=skip)
    chunks = (range(i, min(i + 1000, len(source))) for i in range(0, len(source), 1000))
    return [record for chunk in chunks for record in source.__getitems__(chunk)]


def _prepared(name: str, data_dir: str) -> Any:
    """The builder of a data set that is there, if need be after preparing it."""
    if any(Path(data_dir, name.partition(":")[0]).glob("**/dataset_info.json")):
        builder = _builder(name, data_dir)
        if builder.is_prepared():
            return builder
    if importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(_absent(name, data_dir))
    return prepare(name, data_dir)


def _data_dir(data_dir: str | None) -> str:
    """The absolute path; None is TFDS's own default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return str(Path(data_dir or default).expanduser().resolve())


def _builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds  # slow, and not needed for folders

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except AssertionError as error:  # another version than there is
        raise ValueError(f"name={name!r}: {error}") from error


def prepare(name: str, data_dir: str | None = None) -> Any:
    """Download and prepare a TFDS data set as array_record; its builder. Needs TensorFlow.

    Raises:
      ModuleNotFoundError: no TensorFlow.
      FileNotFoundError: the archives are neither in data_dir/downloads/manual nor to be had from
        the network.
    """
    import requests  # TFDS downloads with it

    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError("preparing a data set needs TensorFlow: in a checkout, pip install -e '.[prepare]'")
    data_dir = _data_dir(data_dir)
    builder = _builder(name, data_dir)
    manual = Path(data_dir, "downloads", "manual")
    missing = [url for url, x in (builder.url_infos or {}).items() if not (manual / x.filename).exists()]
    if not builder.is_prepared():
        if missing and not _reachable(missing[0]):  # TFDS itself would retry for minutes
            raise FileNotFoundError(_absent(name, data_dir))
        try:
            builder.download_and_prepare()
        except (ConnectionError, requests.exceptions.ConnectionError) as error:
            raise FileNotFoundError(_absent(name, data_dir)) from error
    return builder


def _reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True  # somebody answered
    except OSError:
        return False
    return True


def _absent(name: str, data_dir: str) -> str:
    return (
        f"data_dir={data_dir!r}: {name!r} is not there as array_record. Either (1) on a machine "
        "with network and a checkout run `pip install -e '.[prepare]'` and `python -m experiments.prepare "
        f"name={name} data_dir=DIR`, or (2) copy a prepared directory and set task.data_dir=DIR, "
        "or (3) put the original archives into DIR/downloads/manual/ and run (1) without network"
    )


def classes_named(data: ClassImages, names: Sequence[str], wanted: Sequence[str], where: str) -> ClassImages:
    """The classes of these names, in that order; `where` is the split that names them, for the message.

    Raises:
      ValueError: for a name that the data have not.
    """
    index = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in wanted if name not in index]:
        raise ValueError(
            f"class_split={where!r}: no class {unknown[0]!r} in the data ({len(unknown)} such); "
            f"classes are named like {names[0]!r}"
        )
    return select(data, np.array([index[name] for name in wanted]))


def _folder(data_dir: str, class_split: str | None) -> tuple[Path, str]:
    """The folder of the images, and where its classes are listed."""
    root = Path(data_dir).expanduser().resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir={data_dir!r}: no such folder; give one that holds class/*.png")
    return root, class_split or str(root)


def _folder_files(root: Path, where: str) -> dict[str, dict[str, list[Path]]]:
    """The images that are there, of every class of every part of a split.

    Raises:
      ValueError: for an image that is listed twice: it could be in the support and the query set, or in training and test.
    """
    lists = Path(where).expanduser()
    told = [lists, *(lists.iterdir() if lists.is_dir() else ()), root, *root.iterdir()]
    return _listed_files(root, where, tuple((path, path.stat().st_mtime_ns) for path in told if path.exists()))


@functools.lru_cache(maxsize=2)  # of 60,000 images it takes seconds, and each sampler and protocol asks
def _listed_files(root: Path, where: str, changed: tuple) -> dict[str, dict[str, list[Path]]]:
    """`_folder_files` as they were when lists and folders had `changed`."""
    del changed
    split, found = read_split(where), {}
    for part in ClassSplit._fields:
        listed = files_of(where, part)
        found[part] = {name: _there(root, name, listed.get(name)) for name in getattr(split, part)}
    times = collections.Counter(file for part in found.values() for files in part.values() for file in files)
    if twice := [file for file, count in times.items() if count > 1]:
        raise ValueError(
            f"class_split={where!r}: {str(twice[0])!r} is listed twice ({len(twice)} such images), but an image belongs to one "
            "class of one split; remove it from the others"
        )
    return found


def _there(root: Path, name: str, listed: list[str] | None) -> list[Path]:
    """The images of a class, or of those that a list names the ones that are there."""
    if listed is None:
        return sorted(f for f in (root / name).glob("*") if f.suffix.lower() in SUFFIXES)
    found = (
        next((folder / file for folder in _folders(root, name) if (folder / file).is_file()), None) for file in listed
    )
    return sorted(file for file in found if file is not None)


def _folders(root: Path, name: str) -> tuple[Path, ...]:
    """Where the listed images of a class may be."""
    return root, root / "images", root / name


def _complete(root: Path, name: str, listed: list[str] | None, there: list[Path]) -> list[Path]:
    """The images of a class; an error for those that are not there."""
    if listed is not None and len(there) < len(listed):
        absent = next(f for f in listed if not any((folder / f).is_file() for folder in _folders(root, name)))
        raise FileNotFoundError(
            f"data_dir={str(root)!r}: no {absent!r} of the class {name!r} ({len(listed) - len(there)} of {len(listed)} such); "
            f"put what class_split lists into {', '.join(map(str, _folders(root, name)))}"
        )
    if not there:
        raise ValueError(
            f"data_dir={str(root)!r}: no images of the class {name!r} that class_split lists; put "
            f"{', '.join(SUFFIXES)} files into {root / name}, or remove it from the list"
        )
    return there


def _folder_images(root: Path, files: list[list[Path]], size: int, channels: int, cache_dir: str | None) -> ClassImages:
    flat = [file for class_files in files for file in class_files]
    labels = np.repeat(np.arange(len(files)), [len(class_files) for class_files in files])
    facts = [(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in flat]
    decode = decoder(size, {1: "L", 3: "RGB"}[channels], Image.Resampling.LANCZOS)

    def build() -> ClassImages:
        return group(decode_all(flat, decode, root.name, os.cpu_count()), labels, len(files))

    key = digest(str(root), facts, labels.tolist(), size, channels, DECODING)
    return cached(cache_folder(cache_dir) / f"{root.name}-{size}-{key}.npz", build)
