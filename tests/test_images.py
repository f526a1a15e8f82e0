"""Data sets from TFDS and from folders: what is read, cached, and said when it is not there."""

import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import requests
from hydra.utils import get_method
from omegaconf import OmegaConf
from PIL import Image

from experiments import prepare as prepare_program
from maml.tasks import decode, image_folder, images, omniglot
from maml.tasks.splits import classes_of, read_split

pytestmark = pytest.mark.usefixtures("own_image_cache")

ROOT = Path(__file__).parents[1]
NAMES = ["a_0", "a_1", "b_0"]
SPLIT = "[meta_train]\na_0\nb_0\n[meta_valid]\n[meta_test]\na_1\n"


@pytest.fixture
def tfds_dir():
    """Where Omniglot itself is, prepared by TFDS."""
    path = Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared" / "tensorflow_datasets"))
    if not (path / "omniglot").is_dir():
        pytest.skip(f"no Omniglot in {path}: set TFDS_DATA_DIR to a folder where TFDS prepared it")
    return str(path)


@pytest.fixture
def no_tensorflow(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name))


def drawing(seed) -> np.ndarray:
    return np.random.default_rng(seed).random((105, 105)) < 0.5


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_omniglot(tfds, root: Path, order, drawings=4) -> str:
    """A prepared data set of three classes, records in the given order; no TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = root / "omniglot" / "3.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(105, 105, 3)),
            "label": tfds.features.ClassLabel(names=NAMES),
        }
    )
    features.save_metadata(folder)
    serializer = ExampleSerializer(features.get_serialized_info())
    splits = {
        "train": [i for i in order if i < 2 * drawings],
        "test": [i for i in order if i >= 2 * drawings],
    }
    for split, numbers in splits.items():
        writer = ArrayRecordWriter(str(folder / f"omniglot-{split}.array_record-00000-of-00001"), "group_size:1")
        for i in numbers:
            example = {"image": png(drawing(i)), "label": i // drawings}
            writer.write(serializer.serialize_example(example))
        writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "omniglot", "version": "3.0.0", "fileFormat": "array_record"}
    info["splits"] = [
        {"name": s, "numBytes": "1", "shardLengths": [str(len(n))], "filepathTemplate": template}
        for s, n in splits.items()
    ]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(root)


@pytest.fixture
def tiny(tfds, tmp_path):
    return write_omniglot(tfds, tmp_path / "tiny", range(12))


def nearest(pixels, size=28) -> np.ndarray:
    rows = np.floor((np.arange(size) + 0.5) * len(pixels) / size).astype(int)
    return pixels[rows][:, rows].astype(np.uint8) * 255


def test_records_become_classes_of_binary_drawings(tiny):
    data, names = images.tfds_images("omniglot", tiny, size=28)
    assert names == tuple(NAMES)
    assert data.counts.tolist() == [4, 4, 4]
    assert data.images.shape == (12, 28, 28, 1)
    for c in range(3):
        got = {image.tobytes() for image in data.images[data.starts[c] : data.starts[c] + 4]}
        assert got == {nearest(drawing(i)).tobytes() for i in range(4 * c, 4 * c + 4)}


def test_the_order_of_records_does_not_matter(tfds, tiny, tmp_path):
    other = write_omniglot(tfds, tmp_path / "other", [3, 7, 0, 6, 5, 1, 4, 2, 11, 8, 9, 10])
    first, _ = images.tfds_images("omniglot", tiny, size=28, cache_dir=str(tmp_path / "1"))
    second, _ = images.tfds_images("omniglot", other, size=28, cache_dir=str(tmp_path / "2"))
    np.testing.assert_array_equal(first.images, second.images)


def test_omniglot_draws_from_the_classes_of_its_split(tiny, tmp_path):
    (tmp_path / "split.txt").write_text(SPLIT)
    kwargs = {"data_dir": tiny, "class_split": str(tmp_path / "split.txt")}
    keys = jax.random.split(jax.random.key(0), 20)
    wanted = {"meta_train": [*range(4), *range(8, 12)], "meta_test": range(4, 8)}
    for split, numbers in wanted.items():
        ways = len(numbers) // 4
        sampler = omniglot(split, ways, 2, 2, rotations="none", invert=False, **kwargs)
        drawn = np.asarray(sampler(keys).query[0] * 255).astype(np.uint8).reshape(-1, 28 * 28)
        assert {x.tobytes() for x in drawn} == {nearest(drawing(i)).tobytes() for i in numbers}
    assert omniglot(ways=8, rotations="classes", **kwargs).args[0].counts.tolist() == [4] * 8
    with pytest.raises(ValueError, match="ways=9: this split has 8 classes"):
        omniglot(ways=9, rotations="classes", **kwargs)
    with pytest.raises(ValueError, match="rotations='some'"):
        omniglot(ways=2, rotations="some", **kwargs)


def test_classes_that_the_data_lack_are_named(tiny):
    with pytest.raises(ValueError, match="class_split='finn': no class '.*' in the data .1100 such"):
        omniglot(data_dir=tiny)


def test_all_splits_decode_once_and_later_runs_never(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(images, "decode_all", lambda *args: calls.append(1) or decode.decode_all(*args))
    first, _ = images.tfds_images("omniglot", tiny, size=28)
    images.tfds_images("omniglot", tiny, size=28)
    images._tfds_images.cache_clear()  # as in another process
    later, _ = images.tfds_images("omniglot", tiny, size=28)
    assert calls == [1]
    jax.tree.map(np.testing.assert_array_equal, first, later)
    images.tfds_images("omniglot", tiny, size=14)
    assert calls == [1, 1]


def test_other_contents_have_another_cache(tfds, tiny, tmp_path):
    more = write_omniglot(tfds, tmp_path / "more", range(15), drawings=5)
    assert images.tfds_images("omniglot", tiny, size=28)[0].counts.tolist() == [4, 4, 4]
    assert images.tfds_images("omniglot", more, size=28)[0].counts.tolist() == [5, 5, 5]


@pytest.mark.parametrize("spoil", [b"", b"no archive", "half", "flip"])
def test_a_spoiled_cache_is_made_again(tiny, tmp_path, spoil):
    first, _ = images.tfds_images("omniglot", tiny, size=28)
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    flipped = good[:300] + bytes([good[300] ^ 255]) + good[301:]
    file.write_bytes({"half": good[: len(good) // 2], "flip": flipped}.get(spoil, spoil))
    images._tfds_images.cache_clear()
    again, _ = images.tfds_images("omniglot", tiny, size=28)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [file.name]
    with np.load(file) as stored:
        np.testing.assert_array_equal(stored["images"], first.images)


def test_a_cache_that_cannot_be_written_warns(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cache_dir=.*cannot write there .* set MAML_CACHE"):
        data, _ = images.tfds_images("omniglot", tiny, size=28, cache_dir=str(tmp_path / "file"))
    assert len(data.images) == 12


def test_nothing_is_printed_where_nobody_watches(tiny, capfd):
    images.tfds_images("omniglot", tiny, size=28)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize("there", ["nothing", "empty", "unfinished"])
def test_absent_data_are_a_sentence_with_the_three_ways(tmp_path, there):
    folder = tmp_path / "data"
    if there != "nothing":
        (folder / "omniglot" / "3.0.0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        omniglot(data_dir=str(folder))
    message = str(error.value)
    assert message.startswith(f"data_dir={str(folder)!r}: 'omniglot' is not there")
    for way in (
        "pip install -e '.[prepare]'",
        "python -m experiments.prepare name=omniglot data_dir=DIR",
        "task.data_dir=DIR",
        "DIR/downloads/manual/",
    ):
        assert way in message


@pytest.mark.usefixtures("no_tensorflow")
def test_without_an_argument_data_are_where_tfds_has_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tiny)
    assert len(images.tfds_images("omniglot", size=28)[0].images) == 12
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/tensorflow_datasets"):
        images.tfds_images("omniglot", size=28)


@pytest.mark.usefixtures("no_tensorflow")
def test_a_version_may_be_named_as_tfds_does(tiny):
    assert len(images.tfds_images("omniglot:3.0.0", size=28, data_dir=tiny)[0].images) == 12
    with pytest.raises(ValueError, match=r"name='omniglot:1.0.0': .*only: 3.0.0"):
        images.tfds_images("omniglot:1.0.0", size=28, data_dir=tiny)


class Builder:
    """A data set that is not there, and what happens on preparing it."""

    def __init__(self, error=None):
        self.error, self.prepared, self.version, self.data_dir = error, False, "3.0.0", "DIR/x"
        info = type("UrlInfo", (), {"filename": "archive.zip"})
        self.url_infos = {"http://example.invalid/archive.zip": info}

    def is_prepared(self):
        return self.prepared

    def download_and_prepare(self):
        if self.error:
            raise self.error
        self.prepared = True


@pytest.fixture
def with_tensorflow(monkeypatch):
    """As if TensorFlow were installed; the result sets the builder."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return lambda builder: monkeypatch.setattr(images, "_builder", lambda *_: builder) or builder


def test_without_network_tfds_is_not_even_asked(with_tensorflow, tmp_path, monkeypatch):
    builder = with_tensorflow(Builder())
    monkeypatch.setattr(images, "_reachable", lambda _: False)
    with pytest.raises(FileNotFoundError, match="'omniglot' is not there"):
        omniglot(data_dir=str(tmp_path))
    assert not builder.prepared
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    (manual / "archive.zip").write_text("")
    assert images.prepare("omniglot", str(tmp_path)) is builder  # the archives need no network
    assert builder.prepared


@pytest.mark.parametrize("error", [ConnectionError(), requests.exceptions.ConnectionError()])
def test_a_network_that_fails_is_a_sentence_too(with_tensorflow, tmp_path, monkeypatch, error):
    with_tensorflow(Builder(error))
    monkeypatch.setattr(images, "_reachable", lambda _: True)
    with pytest.raises(FileNotFoundError, match="'omniglot' is not there"):
        images.prepare("omniglot", str(tmp_path))


def test_a_server_that_answers_is_reachable_and_a_closed_port_is_not(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Quiet", (http.server.BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:  # knows no HEAD: status 501
        url = f"http://127.0.0.1:{server.server_port}/x.zip"
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert images._reachable(url)
        thread.join()
    assert not images._reachable(url)


@pytest.mark.usefixtures("no_tensorflow")
def test_the_program_prepares_or_says_why_not(tmp_path):
    with pytest.raises(SystemExit, match=r"needs TensorFlow: in a checkout, pip install -e"):
        prepare_program.main(["name=omniglot", f"data_dir={tmp_path}"])
    with pytest.raises(SystemExit, match="dir: no such option; give name=NAME and data_dir=DIR"):
        prepare_program.main(["dir=x"])


def test_the_program_says_where_the_data_are(with_tensorflow, tmp_path, monkeypatch, capsys):
    builder = with_tensorflow(Builder())
    monkeypatch.setattr(images, "_reachable", lambda _: True)
    prepare_program.main([f"data_dir={tmp_path}"])
    assert builder.prepared
    assert capsys.readouterr().out == "omniglot 3.0.0 is in DIR/x\n"


# --- folders ---


@pytest.fixture
def folder(tmp_path):
    """Four classes of three photographs: PNG, JPG and JPEG."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "a fox", "owl"):
        (root / name).mkdir(parents=True)
        for file in ("1.png", "2.jpg", "3.JPEG"):
            pixels = rng.integers(0, 256, (30, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / file)
        (root / name / "notes.txt").write_text("no image")
    (root / "meta_train.txt").write_text("cat\ndog\n")
    (root / "meta_valid.txt").write_text("a fox\n")
    (root / "meta_test.txt").write_text("owl\n")
    return root


def folder_data(root, split="meta_train", ways=1, **kwargs):
    sampler = image_folder(split, ways, 1, 2, data_dir=str(root), image_size=8, **kwargs)
    return sampler.args[0]


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_a_folder_is_read_as_pillow_reads_it(folder, channels, mode):
    data = folder_data(folder, channels=channels)
    assert data.counts.tolist() == [3, 3]
    files = [folder / name / file for name in ("cat", "dog") for file in ("1.png", "2.jpg", "3.JPEG")]
    for image, file in zip(data.images, files, strict=True):
        with Image.open(file) as original:
            small = original.convert(mode).resize((8, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(small).reshape(8, 8, channels))


def test_folder_tasks(folder):
    sampler = image_folder("meta_train", 2, 1, 2, data_dir=str(folder), image_size=8)
    task = sampler(jax.random.split(jax.random.key(0), 3))
    assert task.support[0].shape == (3, 2, 8, 8, 3)
    assert task.query[0].shape == (3, 4, 8, 8, 3)
    assert folder_data(folder, rotations="classes").counts.tolist() == [3] * 8


def csv_lists(where, first="filename,label"):
    """1.png and 2.jpg of three classes, one for each part."""
    where.mkdir(exist_ok=True)
    for name, label in (("train", "owl"), ("val", "dog"), ("test", "cat")):
        (where / f"{name}.csv").write_text(f"{first}\n1.png,{label}\n2.jpg,{label}\n")
    return where


def test_csv_lists_apart_from_the_images_and_no_image_that_they_do_not_list(folder, tmp_path):
    apart = csv_lists(tmp_path / "lists")
    data = image_folder("meta_train", 1, 1, 1, data_dir=str(folder), image_size=8, class_split=str(apart)).args[0]
    owl = folder_data(folder, "meta_test")
    assert data.counts.tolist() == [2]
    np.testing.assert_array_equal(data.images, owl.images[:2])


@pytest.mark.parametrize("sub", ["", "images"])
def test_the_layout_of_mini_imagenet(folder, tmp_path, sub):
    """All images in one folder, beside or above the lists."""
    root = tmp_path / "mini"
    (root / sub).mkdir(parents=True)
    for name in ("owl", "dog", "cat"):
        for file in ("1.png", "2.jpg", "3.JPEG"):
            shutil.copy(folder / name / file, root / sub / f"{name}{file}")
    csv_lists(root, "filename,class")
    for part in ("train", "val", "test"):
        (root / f"{part}.csv").write_text(re.sub(r"(\d\.\w+),(\w+)", r"\2\1,\2", (root / f"{part}.csv").read_text()))
    data = image_folder("meta_valid", 1, 1, 1, data_dir=str(root), image_size=8).args[0]
    np.testing.assert_array_equal(data.images, folder_data(folder).images[3:5])
    (root / sub / "dog1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no 'dog1.png' of the class 'dog' .1 of 2 such.; put what class_split"
    ):
        image_folder("meta_valid", 1, 1, 1, data_dir=str(root), image_size=8)


def test_the_lists_of_tiered_imagenet_name_classes_and_their_categories(folder, tmp_path):
    for name, rows in (("train", "cat,felid\ndog,canid\n"), ("val", "a fox,canid\n"), ("test", "owl,bird\n")):
        (tmp_path / f"{name}.csv").write_text(rows)
    for split in ("meta_train", "meta_valid", "meta_test"):
        data = folder_data(folder, split, class_split=str(tmp_path))
        np.testing.assert_array_equal(data.images, folder_data(folder, split).images)


def test_a_changed_image_is_decoded_again(folder, tmp_path, monkeypatch):
    before = folder_data(folder)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode_all", None)
        np.testing.assert_array_equal(folder_data(folder).images, before.images)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "cat" / "1.png")
    assert (np.asarray(folder_data(folder).images[0]) == [1, 2, 3]).all()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_folders_of_one_name_do_not_share_a_cache(folder, tmp_path):
    """Names, sizes and times of all files are the same."""
    other = tmp_path / "elsewhere" / folder.name
    shutil.copytree(folder, other)
    pixels = np.zeros((30, 20, 3), np.uint8)
    for name in ("1.bmp", "2.bmp"):
        Image.fromarray(pixels + 10 * int(name[0])).save(tmp_path / name)
    for root, name in ((folder, "1.bmp"), (other, "2.bmp")):
        shutil.copy(tmp_path / name, root / "cat" / "1.png")
        os.utime(root / "cat" / "1.png", (1e9, 1e9))
    assert [int(folder_data(root).images[0].max()) for root in (folder, other)] == [10, 20]


def test_sixteen_bits_and_transparent_grounds(folder):
    """Of 16 bits the upper 8; black ink on a transparent ground is ink on white, not black on black."""
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(grey).save(folder / "cat" / "1.png")
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2:4, :, 3], ink[4, 0, 3] = 255, 128
    Image.fromarray(ink).save(folder / "cat" / "2.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(folder / "cat" / "3.png", transparency=1)
    for file in ("2.jpg", "3.JPEG"):
        (folder / "cat" / file).unlink()
    data = np.asarray(folder_data(folder, channels=1).images)[..., 0]
    np.testing.assert_array_equal(data[0], grey // 256)
    expected = np.where(ink[..., 3] == 255, 0, 255)
    expected[4, 0] = 127
    np.testing.assert_array_equal(data[1], expected)
    expected = np.full((8, 8), 255)
    expected[0, 0] = 9
    np.testing.assert_array_equal(data[2], expected)


def test_an_image_that_is_listed_twice_is_refused(folder, tmp_path):
    """In one class it could be its own query, in two parts it would be in training and test; of two folders it is another."""
    lists = csv_lists(tmp_path / "lists")
    train = lists / "train.csv"
    before = train.read_text()
    train.write_text(before + "1.png,owl\n")
    with pytest.raises(ValueError, match=r"owl/1.png' is listed twice .1 such images."):
        folder_data(folder, class_split=str(lists))
    train.write_text(before)
    for name in ("owl", "cat", "dog"):  # all in one folder
        shutil.copy(folder / name / "1.png", folder / "1.png")
    with pytest.raises(ValueError, match=r"photos/1.png' is listed twice"):
        folder_data(folder, "meta_test", class_split=str(lists))


def test_the_digest_of_a_folder_is_that_of_its_classes_and_images(folder, tmp_path):
    before = images.folder_digest(str(folder))
    shutil.copytree(folder, tmp_path / "moved")
    shutil.copytree(folder, tmp_path / "lists", ignore=shutil.ignore_patterns("*.png", "*.j*"))
    assert images.folder_digest(str(tmp_path / "moved")) == before
    assert images.folder_digest(str(folder), str(tmp_path / "lists")) == before
    (folder / "meta_train.txt").write_text("cat\nowl\n")
    (folder / "meta_test.txt").write_text("dog\n")
    swapped = images.folder_digest(str(folder))
    (tmp_path / "moved" / "owl" / "1.png").write_bytes(b"other")
    assert len({before, swapped, images.folder_digest(str(tmp_path / "moved"))}) == 3


def test_spoiled_and_foreign_files_are_named(folder):
    whole = (folder / "cat" / "2.jpg").read_bytes()
    (folder / "cat" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot read the image .*cat/2.jpg .*runcated.*replace"):
        folder_data(folder)
    (folder / "cat" / "2.jpg").write_text("a letter")
    with pytest.raises(ValueError, match="cannot read the image .*cat/2.jpg .*cannot identify"):
        folder_data(folder)
    png_file = (folder / "cat" / "1.png").read_bytes()
    (folder / "cat" / "2.jpg").write_bytes(png_file[: len(png_file) // 2])
    with pytest.raises(ValueError, match="cannot read the image .*cat/2.jpg"):
        folder_data(folder)


def test_lists_that_do_not_fit_the_folder_are_refused(folder):
    (folder / "meta_train.txt").write_text("cat\nwolf\n")
    with pytest.raises(ValueError, match="no images of the class 'wolf'"):
        folder_data(folder)
    (folder / "meta_train.txt").write_text("cat\nowl\n")
    with pytest.raises(ValueError, match="'owl' is listed twice"):
        folder_data(folder)
    (folder / "meta_train.txt").unlink()
    with pytest.raises(FileNotFoundError, match="write meta_train.txt, meta_valid.txt and"):
        folder_data(folder)


def test_folder_arguments_that_do_not_fit_are_refused(folder):
    with pytest.raises(FileNotFoundError, match="data_dir='nowhere': no such folder"):
        image_folder(data_dir="nowhere")
    with pytest.raises(ValueError, match="channels=2: give a positive size, and 1"):
        image_folder(data_dir=str(folder), channels=2)
    with pytest.raises(ValueError, match="image_size=0"):
        image_folder(data_dir=str(folder), image_size=0)


# --- configuration ---


def factory(name, **changes):
    """What a configuration names, without Hydra's own partial: that refuses to return a Partial."""
    conf = OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml")
    node = OmegaConf.to_container(OmegaConf.merge(conf, changes), resolve=True)
    assert node.pop("_partial_")
    del node["loss"]
    return functools.partial(get_method(node.pop("_target_")), **node)


def test_the_configurations_make_samplers(tiny, folder, tmp_path):
    (tmp_path / "split.txt").write_text(SPLIT)
    keys = jax.random.split(jax.random.key(0), 1)
    small = {"ways": 2, "data_dir": tiny, "class_split": str(tmp_path / "split.txt"), "shots": 2}
    task = factory("omniglot", **small)(split="meta_train")(keys)
    assert task.query[0].shape == (1, 4, 28, 28, 1)  # as many queries as shots
    made = factory("image_folder", data_dir=str(folder), queries=2)
    assert made(split="meta_test", ways=1)(keys).query[0].shape == (1, 2, 84, 84, 3)


# --- Omniglot itself ---


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("omniglot"))


def test_omniglot_is_what_the_papers_describe(tfds_dir, real_cache):
    data, names = images.tfds_images("omniglot", tfds_dir, size=28, cache_dir=real_cache)
    assert data.images.shape == (32460, 28, 28, 1)
    assert data.counts.tolist() == [20] * 1623
    assert np.unique(data.images).tolist() == [0, 255]
    assert (data.images == 0).mean() == pytest.approx(0.0805, abs=5e-4)  # ink
    assert hashlib.sha256(data.images.tobytes()).hexdigest() == images.OMNIGLOT_SHA256
    assert set(names) == set(sum(read_split("finn"), ()))


def test_drawings_equal_pillows_own_resize(tfds, tfds_dir, real_cache):
    data, _ = images.tfds_images("omniglot", tfds_dir, size=28, cache_dir=real_cache)
    builder = tfds.builder("omniglot", data_dir=tfds_dir, file_format="array_record")
    skip = {"image": tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split="train", decoders=skip)
    for record in (source[0], source[12345]):
        with Image.open(io.BytesIO(record["image"])) as original:
            assert original.mode == "1"
            small = np.asarray(original.resize((28, 28), Image.Resampling.LANCZOS))
        start = data.starts[record["label"]]
        drawings = data.images[start : start + 20, :, :, 0] == 255
        assert (drawings == small).all((1, 2)).any()


def test_lake_is_the_split_of_tfds(tfds, tfds_dir):
    builder = tfds.builder("omniglot", data_dir=tfds_dir, file_format="array_record")
    names = builder.info.features["label"].names
    for split, tfds_split in (("meta_train", "train"), ("meta_test", "test")):
        skip = {"image": tfds.decode.SkipDecoding()}
        source = builder.as_data_source(split=tfds_split, decoders=skip)
        labels = {record["label"] for record in source.__getitems__(range(len(source)))}
        assert {names[label] for label in labels} == set(classes_of("lake", split))


def test_omniglot_tasks_of_every_split(tfds_dir, real_cache):
    keys = jax.random.split(jax.random.key(0), 2)
    for split, classes in (("meta_train", 1100), ("meta_valid", 100), ("meta_test", 423)):
        sampler = omniglot(split, data_dir=tfds_dir, cache_dir=real_cache)
        assert sampler.args[0].counts.shape == (classes,)
        inputs, targets = sampler(keys).support
        assert inputs.shape == (2, 5, 28, 28, 1)
        assert targets.shape == (2, 5)
        assert 0.02 < inputs.mean() < 0.2  # ink is 1
    kwargs = {"class_split": "vinyals", "rotations": "classes", "cache_dir": real_cache}
    for split, classes in (("meta_train", 4112), ("meta_valid", 688), ("meta_test", 1692)):
        assert omniglot(split, data_dir=tfds_dir, **kwargs).args[0].counts.shape == (classes,)
