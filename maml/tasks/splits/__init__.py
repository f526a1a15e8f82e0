"""Class splits: which classes are for meta-training, meta-validation and meta-test.

The committed lists are text files beside this one, in the format that a user's own file
has too:

    # comment
    [meta_train]
    Angelic_0
    [meta_valid]
    ...
    [meta_test]
    ...
"""

import collections
import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

SHA256 = {
    "finn": "11d82aae5508d13cd341aa833d8f0584989aca5bada8f5c2b654bd3e10b12333",
    "vinyals": "407bcdc964ff39d8fa3baaedaf27306d8a6898c10dbd4fb8d5a65bc20c6ec255",
    "lake": "dc953a360618d154f5b33e9c477a8ff85761f60415ea02d89ad892797370765b",
    "cifar_fs": "4c0f916f68d8255053179106fca6e7950b978901a1ed0d04fefe25dae03f803d",
    "fc100": "db90407126e185e4e4fa5659e57bfb7ff705109f33498f724738f981ae388ab6",
    "cub": "72277ebd270234fd5f639e4c19cceb04fc0d01b52743bdf03a8b505de23e6952",
    "flowers": "bbf9f07207e6830fb0cabc2bf3ab26b4e433f1ca3346e4684d7fce8ed0b394f0",
    "dtd": "0eae95eebfd6da972337cbad2559e8115e945090a34fcbfbe3069d7e6c3d49d6",
    "quickdraw": "52968dbe95a43cb30c87e9ac75925977ff3967b9d7863ce90354c7a95fa67d22",
}
"""The digests of the committed lists (`<name>.txt`, those of Omniglot `omniglot_<name>.txt`), comments left out."""

OMNIGLOT = ("finn", "vinyals", "lake")

WIDER = {"mamlpp": ("finn", 2), "nichol": ("finn", 1), "vinyals_trainval": ("vinyals", 1)}
"""Splits of Omniglot that meta-train on every n-th class of another's meta-validation too, and test on the same classes.

The counts of the authors' codes: 1150/50/423 characters of MAML++ (arXiv 1810.09502), 1200/0/423 of Reptile (arXiv 1803.02999),
and 1200/0/423 of the last training of prototypical networks (arXiv 1703.05175).
"""

FOLDER = Path(__file__).parent

TXT = ("meta_train.txt", "meta_valid.txt", "meta_test.txt")
CSV = ("train.csv", "val.csv", "test.csv")


class ClassSplit(NamedTuple):
    """Names of classes; no class is in two of them. Any may be empty."""

    meta_train: tuple[str, ...]
    meta_valid: tuple[str, ...]
    meta_test: tuple[str, ...]


def read_split(class_split: str) -> ClassSplit:
    """A committed split by name, or a user's: a file as above, or a folder of lists.

    A folder holds meta_train.txt, meta_valid.txt and meta_test.txt (one class a line), or train.csv, val.csv and test.csv: those
    of mini-ImageNet (Ravi & Larochelle 2017; columns filename and label, or class, whose images alone are meant: `files_of`), or
    those of tiered-ImageNet (Ren et al. 2018, arXiv 1803.00676; class,category and no first line of names).

    Raises:
      FileNotFoundError: nothing there.
      ValueError: an unreadable or overlapping list, or a committed one that was changed.
    """
    if class_split in SHA256:
        return _committed(class_split)
    if class_split in WIDER:
        name, every = WIDER[class_split]
        train, valid, test = _committed(name)
        more = valid[::every]
        return ClassSplit(train + more, tuple(c for c in valid if c not in more), test)
    path = Path(class_split).expanduser()
    if path.is_dir():
        return _checked(_from_folder(path), path)
    if path.is_file():
        return _checked(_from_file(path), path)
    names = ", ".join([*SHA256, *WIDER])
    raise FileNotFoundError(
        f"class_split={class_split!r}: neither one of {names} nor a file or folder; give one of these"
    )


def classes_of(class_split: str, split: str) -> tuple[str, ...]:
    """The classes of one part of a split, never empty.

    Raises:
      ValueError: `split` is not one of meta_train, meta_valid, meta_test, or this class split has
        no such classes.
    """
    if split not in ClassSplit._fields:
        raise ValueError(f"split={split!r}: give one of {', '.join(ClassSplit._fields)}")
    parts = read_split(class_split)._asdict()
    if not parts[split]:
        filled = ", ".join(name for name, classes in parts.items() if classes)
        raise ValueError(
            f"split={split!r}: class_split={class_split!r} has no classes there, only {filled}; "
            "give another split or class_split"
        )
    return parts[split]


def files_of(class_split: str, split: str) -> dict[str, list[str]]:
    """The names of the images that a folder of lists has for each class; none where it has the names of classes alone."""
    folder = Path(class_split).expanduser()
    path = folder / CSV[ClassSplit._fields.index(split)]
    listed = not (folder / TXT[0]).is_file() and path.is_file()  # as `read_split` looks for them
    return {name: files for name, files in _listed(path).items() if files} if listed else {}


def digest(split: ClassSplit) -> str:
    """The sha256 of the lists: names and their order, not comments or line ends."""
    lines = [line for name in split._fields for line in (f"[{name}]", *getattr(split, name))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _committed(name: str) -> ClassSplit:
    path = FOLDER / (f"omniglot_{name}.txt" if name in OMNIGLOT else f"{name}.txt")
    split = _checked(_from_file(path), path)
    if digest(split) != SHA256[name]:
        raise ValueError(
            f"class_split={name!r}: {path} was changed (its sha256 is not the committed one), so "
            "results would not compare; restore it, or keep your own list in another file and "
            "give its path"
        )
    return split


def _from_file(path: Path) -> ClassSplit:
    parts: dict[str, list[str]] = {name: [] for name in ClassSplit._fields}
    section = None
    for line in _lines(path):
        if line.startswith("["):
            section = line.strip("[]")
        elif section in parts:
            parts[section].append(line)
        if section not in parts:
            raise ValueError(
                f"class_split={str(path)!r}: found {line!r}, but a class stands below one of "
                f"{', '.join(f'[{name}]' for name in parts)}; mend the file"
            )
    return ClassSplit(*map(tuple, parts.values()))


def _from_folder(folder: Path) -> ClassSplit:
    for files, read in ((TXT, _lines), (CSV, _listed)):
        if (folder / files[0]).is_file():
            paths = [folder / file for file in files]
            return ClassSplit(*(tuple(read(path)) if path.is_file() else () for path in paths))
    raise FileNotFoundError(
        f"class_split={str(folder)!r}: no lists of classes there; write meta_train.txt, "
        "meta_valid.txt and meta_test.txt (one class a line), or put train.csv, val.csv and "
        "test.csv (filename,label) there"
    )


def _lines(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _listed(path: Path) -> dict[str, list[str]]:
    """The classes of a CSV, in order, and the images that it lists of each."""
    with path.open(encoding="utf-8", newline="") as file:
        first, *rows = [row for row in csv.reader(file) if row] or [[]]
    label = next((name for name in ("label", "class") if name in first), None)
    found: dict[str, list[str]] = {}
    if "filename" in first and label:
        for row in rows:
            found.setdefault(row[first.index(label)], []).append(row[first.index("filename")])
    elif all(len(row) == 2 and not Path(row[0]).suffix for row in (first, *rows)):  # of tiered-ImageNet
        found = {name: [] for name, _ in (first, *rows)}
    else:
        raise ValueError(
            f"class_split={str(path)!r}: its first line is {','.join(first)!r}, but must be filename,label"
        )
    return found


def _checked(split: ClassSplit, path: Path) -> ClassSplit:
    times = collections.Counter(name for part in split for name in part)
    if twice := sorted(name for name, count in times.items() if count > 1):
        raise ValueError(
            f"class_split={str(path)!r}: {twice[0]!r} is listed twice ({len(twice)} such classes), "
            "but a class belongs to one split; remove it from the others"
        )
    return split
