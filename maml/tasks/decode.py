"""Image files to arrays, once: decoding, and the cache of what was decoded."""

import hashlib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from maml.tasks.episodes import ClassImages

DECODING = 2
"""Of which kind decoded folders in the cache are: raise it where pixels change."""


def decoder(size: int, mode: str, resample: Image.Resampling) -> Callable[[Any], np.ndarray]:
    """A function from encoded bytes, or a path, to uint8 [size, size, channels].

    Raises:
      ValueError: that function, for an image that cannot be read.

    Of 16 bits the upper 8 are taken, and what is transparent shows white: Pillow alone would make nearly all of the one white,
    and drop the other.
    """

    def decode(source: bytes | Path) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                pixels = np.asarray(_opaque(image).convert(mode).resize((size, size), resample))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's for spoiled files
            what = "a record" if isinstance(source, bytes) else str(source)
            raise ValueError(f"data_dir: cannot read the image {what} ({error}); replace or remove it") from error
        return pixels.reshape(size, size, -1)

    return decode


def _opaque(image: Image.Image) -> Image.Image:
    """The image in 8 bits on white ground."""
    if image.mode.startswith("I"):  # a PNG of 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    drawn = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)


def decode_all(
    sources: Sequence[Any], decode: Callable[[Any], np.ndarray], name: str, threads: int | None
) -> np.ndarray:
    """Decode all, with a progress bar where it takes longer than two seconds and somebody watches.

    Threads help large images only: on small ones they wait for each other (28x28: twice the time
    with two threads).
    """
    chunks = [sources[i : i + 64] for i in range(0, len(sources), 64)]

    def decode_chunk(chunk: Sequence[Any]) -> np.ndarray:
        return np.stack([decode(source) for source in chunk])

    bar = tqdm(total=len(sources), desc=f"decoding {name}", unit="image", delay=2, disable=None)
    with bar, ThreadPoolExecutor(threads) as pool:
        arrays = []
        for array in pool.map(decode_chunk, chunks):
            arrays.append(array)
            bar.update(len(array))
    return np.concatenate(arrays)


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for decoded arrays: the argument, MAML_CACHE, or ~/.cache/maml."""
    return Path(cache_dir or os.environ.get("MAML_CACHE") or "~/.cache/maml").expanduser()


def digest(*facts: Any) -> str:
    """Sixteen hexadecimal digits that change with the facts: the part of a cache's name."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def cached(path: Path, build: Callable[[], ClassImages]) -> ClassImages:
    """What the file holds, or else what `build` makes, written there; only warns if it cannot."""
    data = _load(path)
    if data is None:
        data = build()
        _save(path, data)
    return data


def _load(path: Path) -> ClassImages | None:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return ClassImages(*(arrays[name] for name in ClassImages._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # no such file, or one that a full disk has spoiled: it is made again


def _save(path: Path, data: ClassImages) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **data._asdict())
        temporary.replace(path)  # other processes see the whole file or none
    except OSError as error:
        warnings.warn(
            f"cache_dir={str(path.parent)!r}: cannot write there ({error}), so images are decoded "
            "in every run; give another cache_dir or set MAML_CACHE",
            stacklevel=2,
        )
