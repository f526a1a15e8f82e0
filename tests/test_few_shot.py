"""Few-shot tasks from any TFDS data set: the committed class splits, and what is drawn from them."""

import functools
import importlib.util
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf
from PIL import Image

from maml.tasks import images, omniglot, splits, tfds_few_shot
from maml.tasks.splits import SHA256, classes_of, digest, read_split
from tests.helpers import twins
from tests.test_images import write_omniglot

pytestmark = pytest.mark.usefixtures("own_image_cache")

ROOT = Path(__file__).parents[1]
COUNTS = {
    "cifar_fs": (64, 16, 20),
    "fc100": (60, 20, 20),
    "cub": (140, 30, 30),
    "flowers": (71, 15, 16),
    "dtd": (33, 7, 7),
    "quickdraw": (241, 52, 52),
}
DATA = {  # what TFDS calls them, their version there, and the parts that it has
    "cifar_fs": ("cifar100", "3.0.2", ("train", "test")),
    "fc100": ("cifar100", "3.0.2", ("train", "test")),
    "cub": ("caltech_birds2011", "0.2.0", ("train", "test")),
    "flowers": ("oxford_flowers102", "2.1.1", ("train", "validation", "test")),
    "dtd": ("dtd", "3.0.1", ("train", "validation", "test")),
    "quickdraw": ("quickdraw_bitmap", "3.0.0", ("train",)),
}
KEYS = jax.random.split(jax.random.key(0), 100)
draw = jax.jit(lambda sampler, keys: sampler(keys))


def encoded(pixels, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write(root: Path, name: str, version: str, features, parts: dict[str, list]) -> str:
    """A prepared data set of the given examples; no TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = root / name / version
    folder.mkdir(parents=True)
    features.save_metadata(folder)
    serializer = ExampleSerializer(features.get_serialized_info())
    for part, examples in parts.items():
        writer = ArrayRecordWriter(str(folder / f"{name}-{part}.array_record-00000-of-00001"), "group_size:1")
        for example in examples:
            writer.write(serializer.serialize_example(example))
        writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    lengths = [
        {"name": part, "numBytes": "1", "shardLengths": [str(len(examples))], "filepathTemplate": template}
        for part, examples in parts.items()
    ]
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": lengths}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(root)


def labelled(tfds, **names):
    labels = {label: tfds.features.ClassLabel(names=values) for label, values in names.items()}
    return tfds.features.FeaturesDict({"image": tfds.features.Image(), **labels})


def stand_in(tfds, root: Path, class_split: str) -> str:
    """Two images of each class in each part, in the features of the real data set: red tells the class, green the part."""
    name, version, parts = DATA[class_split]
    features = tfds.builder(name, data_dir=root / "none").info.features
    if name == "cifar100":  # the others' names are in TFDS itself, or nowhere
        features["label"].names = sorted(sum(read_split("cifar_fs"), ()))
    other = {"id": b"0", "coarse_label": 0, "file_name": b"x", "image/filename": b"x", "label_name": b"x"}
    other |= {"bbox": np.zeros(4, np.float32), "segmentation_mask": b"no image"}

    def example(label, part, number):
        shape = (32, 32) if name == "cifar100" else (20 + label % 7, 30 - label % 5)
        pixels = np.full((*shape, 3), (label, part, number), np.uint8)
        own = {"image": encoded(pixels), "label": label}
        return own | {k: other[k] for k in features if k not in own}

    classes = features["label"].num_classes
    examples = {p: [example(c, i, n) for c in range(classes) for n in range(2)] for i, p in enumerate(parts)}
    return write(root, name, version, features, examples)


# --- the committed lists ---


@pytest.mark.parametrize("name", COUNTS)
def test_committed_lists_have_the_published_counts_and_no_class_twice(name):
    split = read_split(name)
    assert tuple(map(len, split)) == COUNTS[name]
    assert len(set().union(*split)) == sum(COUNTS[name])
    assert digest(split) == SHA256[name]


@pytest.mark.parametrize("name", ["cub", "flowers", "dtd", "quickdraw"])
def test_committed_lists_split_the_classes_that_tfds_names(tfds, tmp_path, name):
    label = tfds.builder(DATA[name][0], data_dir=tmp_path).info.features["label"]
    assert set(sum(read_split(name), ())) == set(label.names)


def test_both_splits_of_cifar_100_split_the_same_classes():
    assert {*sum(read_split("cifar_fs"), ())} == {*sum(read_split("fc100"), ())}


def test_fc100_splits_superclasses():
    """CIFAR-100's own twenty, five classes each."""
    part, found = None, {}
    for line in (splits.FOLDER / "fc100.txt").read_text().split("[", 1)[1].splitlines():
        if "]" in line:
            part = line.strip("[]")
        elif line.startswith("# "):
            superclass = found.setdefault(line[2:], (part, []))
        elif line:
            superclass[1].append(line)
    assert {len(classes) for _, classes in found.values()} == {5}
    assert [sum(p == part for p, _ in found.values()) for part in ("meta_train", "meta_valid", "meta_test")] == [
        12,
        4,
        4,
    ]
    assert found["people"] == ("meta_test", ["baby", "boy", "girl", "man", "woman"])
    assert found["trees"][1] == ["maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"]


def test_cub_numbers_are_one_below_those_of_the_archive():
    lines = (splits.FOLDER / "cub.txt").read_text().splitlines()
    named = [(a, b) for a, b in zip(lines, lines[1:], strict=False) if b.isdigit()]
    assert len(named) == 200
    assert all(int(number) == int(name[2:5]) - 1 for name, number in named)


def test_a_changed_committed_list_is_refused(tmp_path, monkeypatch):
    text = (splits.FOLDER / "cub.txt").read_text()
    monkeypatch.setattr(splits, "FOLDER", tmp_path)
    (tmp_path / "cub.txt").write_text(text.replace("\n17\n", "\n", 1))
    with pytest.raises(ValueError, match="class_split='cub': .* was changed .* restore it"):
        read_split("cub")


# --- what is drawn ---


def factory(name, **changes):
    """What a configuration names, without Hydra's own partial: that refuses to return a Partial."""
    node = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml"), changes))
    assert node.pop("_partial_")
    del node["loss"]
    return functools.partial(get_method(node.pop("_target_")), **node)


@pytest.mark.parametrize("name", twins(("fc100",), sorted(set(COUNTS) - {"quickdraw"})))
def test_every_configuration_draws_from_the_classes_of_its_split(tfds, tmp_path, name):
    """The whole path, from the prepared records: labels in class order, classes of the split, images of all parts."""
    make = factory(name, data_dir=stand_in(tfds, tmp_path, name), shots=1, queries=2)
    size = 32 if DATA[name][0] == "cifar100" else 84
    order = images.tfds_images(DATA[name][0], str(tmp_path), size=size, mode="RGB")[1]
    for split, classes in zip(("meta_train", "meta_valid", "meta_test"), COUNTS[name], strict=True):
        sampler = make(split)
        assert sampler.args[0].counts.tolist() == [2 * len(DATA[name][2])] * classes
        support, query = jax.device_get(draw(sampler, KEYS))
        assert support[0].shape == (100, 5, size, size, 3)
        assert query[0].shape == (100, 10, size, size, 3)
        np.testing.assert_array_equal(support[1], np.tile(np.arange(5), (100, 1)))
        np.testing.assert_array_equal(query[1], np.tile(np.repeat(np.arange(5), 2), (100, 1)))
        assert (support[0] == support[0][:, :, :1, :1]).all()  # of one colour, also after the resize
        red, green = (np.round(255 * support[0][..., 0, 0, i]).astype(int) for i in (0, 1))
        np.testing.assert_array_equal(np.repeat(red, 2, 1), np.round(255 * query[0][..., 0, 0, 0]))
        assert all(len(set(row)) == 5 for row in red)
        drawn = {order[i] for i in red.ravel()}
        assert drawn <= set(classes_of(name, split))
        assert len(drawn) > 0.9 * classes
        assert set(green.ravel()) == set(range(len(DATA[name][2])))


def test_quickdraw_reads_a_share_of_its_only_part(tfds, tmp_path):
    features = tfds.builder("quickdraw_bitmap", data_dir=tmp_path / "none").info.features
    order = features["label"].names

    def example(label, number):
        pixels = np.zeros((28, 28), np.uint8)
        pixels[0, :3] = label % 256, label // 256, number
        return {"image": encoded(pixels), "label": label}

    examples = {"train": [example(c, n) for n in range(200) for c in range(0, 345, 3)]}
    (tmp_path / "some.txt").write_text("[meta_train]\n" + "\n".join(order[c] for c in range(0, 345, 3)) + "\n")
    root = write(tmp_path, "quickdraw_bitmap", "3.0.0", features, examples)
    make = factory("quickdraw", data_dir=root, class_split=str(tmp_path / "some.txt"), queries=1, ways=20)
    sampler = make()
    assert sampler.args[0].counts.tolist() == [2] * 115  # a hundredth of 200
    support, query = (np.round(255 * np.asarray(b[0])).astype(int)[..., 0] for b in draw(sampler, KEYS))
    assert support.shape == (100, 20, 28, 28)
    words = support[..., 0, 0] + 256 * support[..., 0, 1]
    assert set(words.ravel()) == set(range(0, 345, 3))
    np.testing.assert_array_equal(words, query[..., 0, 0] + 256 * query[..., 0, 1])
    assert (support[..., 0, 2] + query[..., 0, 2] == 1).all()  # the first two of each word, each once


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("resample", ["lanczos", "nearest", "bilinear"])
def test_images_of_any_size_and_colour_are_resized_as_pillow_does(tfds, tmp_path, channels, mode, resample):
    """What is transparent in the fifth shows white."""
    rng = np.random.default_rng(0)
    shapes = [(30, 20, 3), (7, 50, 3), (16, 16, 3), (9, 40), (40, 9, 4), (16, 16)]
    drawn = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    drawn[4][..., 3] = 255 * (drawn[4][..., 3] > 127)
    sources, opaque = [encoded(pixels) for pixels in drawn], dict(enumerate(drawn))
    opaque[4] = np.where(drawn[4][..., 3:] == 255, drawn[4][..., :3], np.uint8(255))
    sources.append(encoded(rng.integers(0, 256, (33, 44, 3), np.uint8), "JPEG"))
    examples = [{"image": source, "label": 0} for source in sources]
    root = write(tmp_path, "dtd", "3.0.1", labelled(tfds, label=["banded"]), {"train": examples})
    (tmp_path / "one.txt").write_text("[meta_train]\nbanded\n")
    kwargs = {"name": "dtd", "class_split": str(tmp_path / "one.txt"), "data_dir": root, "parts": "train"}
    sampler = tfds_few_shot(ways=1, queries=1, image_size=16, channels=channels, resample=resample, **kwargs)
    wanted = set()
    for i, source in enumerate(sources):
        image = Image.fromarray(opaque[i]) if i in opaque else Image.open(io.BytesIO(source))
        small = image.convert(mode).resize((16, 16), Image.Resampling[resample.upper()])
        wanted.add(np.asarray(small).tobytes())
    got = np.asarray(sampler.args[0].images)
    assert got.shape == (7, 16, 16, channels)
    assert {image.tobytes() for image in got} == wanted


def test_omniglot_is_one_of_them(tfds, tmp_path):
    """With the nearest neighbour, one channel and ink at 1: the same tasks from the same keys."""
    root = write_omniglot(tfds, tmp_path / "omniglot", range(12))
    (tmp_path / "split.txt").write_text("[meta_train]\na_0\nb_0\n")
    kwargs = {"shots": 2, "queries": 1, "data_dir": root, "class_split": str(tmp_path / "split.txt")}
    ours = {"name": "omniglot", "image_size": 28, "channels": 1, "resample": "nearest", "invert": True}
    for rotations, ways in (("per_class", 2), ("classes", 8)):
        both = kwargs | {"rotations": rotations, "ways": ways}
        tasks = (draw(sampler, KEYS[:5]) for sampler in (omniglot(**both), tfds_few_shot(**ours, **both)))
        jax.tree.map(np.testing.assert_array_equal, *tasks)


@pytest.fixture
def two_labels(tfds, tmp_path):
    """A data set with classes and superclasses: tasks of either."""
    features = labelled(tfds, label=list("abcd"), coarse_label=["low", "high"])
    pixels = [np.full((8, 8, 3), i, np.uint8) for i in range(8)]
    examples = [{"image": encoded(x), "label": i // 2, "coarse_label": i // 4} for i, x in enumerate(pixels)]
    (tmp_path / "coarse.txt").write_text("[meta_train]\nhigh\nlow\n[meta_test]\n")
    root = write(tmp_path, "cifar100", "3.0.2", features, {"train": examples})
    given = {"data_dir": root, "class_split": str(tmp_path / "coarse.txt"), "name": "cifar100", "image_size": 8}
    return functools.partial(tfds_few_shot, **given, parts="train", label="coarse_label", ways=2, queries=3)


def test_another_label_makes_other_classes(two_labels):
    support, query = draw(two_labels(), KEYS)
    drawn = np.round(255 * np.concatenate([support[0], query[0]], 1)[..., 0, 0, 0]).astype(int)
    high = np.concatenate([support[1], query[1]], 1) == np.where(drawn[:, :1] >= 4, 0, 1)
    np.testing.assert_array_equal(drawn >= 4, high)
    assert all(set(row) == set(range(8)) for row in drawn)  # all four images of both, none twice


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "meta_tset"}, "split='meta_tset': give one of meta_train, meta_valid, meta_test"),
        ({"split": "meta_test"}, "split='meta_test': .* has no classes there, only meta_train"),
        ({"label": "fine"}, "label='fine': 'cifar100' has no such class label; give one of label, coarse_label"),
        ({"label": "image"}, "label='image': 'cifar100' has no such class label"),
        ({"label": "label"}, "no class 'high' in the data .2 such.; classes are named like 'a'"),
        ({"class_split": "fc100"}, "class_split='fc100': no class 'aquarium_fish' in the data"),
        ({"resample": "best"}, "resample='best': give one of nearest, .*lanczos"),
        ({"channels": 2}, "channels=2: give a positive size, and 1"),
        ({"image_size": 0}, "image_size=0"),
        ({"rotations": "some"}, "rotations='some'"),
        ({"ways": 3}, "ways=3: this split has 2 classes"),
        ({"queries": 4}, "the smallest of the 2 classes has 4 examples"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(two_labels, wrong, message):
    with pytest.raises(ValueError, match=message):
        two_labels(**wrong)


def test_an_unknown_class_split_is_refused_with_the_names_that_there_are():
    with pytest.raises(FileNotFoundError, match="class_split='cifar': neither one of finn, .*cifar_fs, fc100, cub"):
        tfds_few_shot(name="cifar100", class_split="cifar")


@pytest.mark.parametrize("name", COUNTS)
def test_absent_data_are_a_sentence_with_the_ways_to_get_them(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == "tensorflow" else find(module))
    with pytest.raises(FileNotFoundError) as error:
        factory(name, data_dir=str(tmp_path))("meta_train")
    message = str(error.value)
    assert message.startswith(f"data_dir={str(tmp_path)!r}: {DATA[name][0]!r} is not there")
    assert f"python -m experiments.prepare name={DATA[name][0]} data_dir=DIR" in message
