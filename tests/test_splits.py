"""Class splits: the committed lists and a user's own."""

import numpy as np
import pytest

from maml.tasks import splits
from maml.tasks.splits import SHA256, ClassSplit, classes_of, digest, files_of, read_split

ONE = "# mine\n[meta_train]\na b\nc\n\n[meta_valid]\n[meta_test]\nd\n"


@pytest.mark.parametrize(
    ("name", "counts"),
    [("finn", (1100, 100, 423)), ("vinyals", (1028, 172, 423)), ("lake", (964, 0, 659))],
)
def test_committed_lists_have_the_published_counts_and_no_class_twice(name, counts):
    split = read_split(name)
    assert tuple(map(len, split)) == counts
    assert len(set().union(*split)) == sum(counts) == 1623
    assert digest(split) == SHA256[name]


def test_committed_lists_split_the_same_characters():
    finn, vinyals, lake = ({*sum(read_split(name), ())} for name in ("finn", "vinyals", "lake"))
    assert finn == vinyals == lake


@pytest.mark.parametrize(
    ("name", "of", "counts"),
    [
        ("mamlpp", "finn", (1150, 50, 423)),
        ("nichol", "finn", (1200, 0, 423)),
        ("vinyals_trainval", "vinyals", (1200, 0, 423)),
    ],
)
def test_wider_splits_train_on_classes_of_validation_and_test_on_the_same(name, of, counts):
    found, base = read_split(name), read_split(of)
    assert tuple(map(len, found)) == counts
    assert set(base.meta_train) <= set(found.meta_train)
    assert set(found.meta_train) | set(found.meta_valid) == set(base.meta_train) | set(base.meta_valid)
    assert not set(found.meta_train) & set(found.meta_valid)
    assert found.meta_test == base.meta_test
    if not counts[1]:
        with pytest.raises(ValueError, match="has no classes there, only meta_train, meta_test"):
            classes_of(name, "meta_valid")


def test_finn_is_the_draw_that_its_header_describes():
    split = read_split("finn")
    order = np.random.RandomState(1).permutation(sorted(sum(split, ()))).tolist()  # noqa: NPY002
    assert [set(part) for part in split] == [
        set(order[:1100]),
        set(order[1100:1200]),
        set(order[1200:]),
    ]


def test_vinyals_splits_alphabets_but_for_gurmukhi():
    alphabets = [{name.rpartition("_")[0] for name in part} for part in read_split("vinyals")]
    assert alphabets[1] == {
        "Armenian",
        "Bengali",
        "Early_Aramaic",
        "Hebrew",
        "Mkhedruli_(Georgian)",
    }
    assert len(alphabets[2]) == 13
    assert alphabets[0] & alphabets[2] == {"Gurmukhi"}
    assert not alphabets[1] & (alphabets[0] | alphabets[2])
    test = [name for name in read_split("vinyals").meta_test if name.startswith("Gurmukhi")]
    assert test == [f"Gurmukhi_{i}" for i in (41, 42, 43, 44)]  # character42 to character45


def test_a_changed_committed_list_is_refused(tmp_path, monkeypatch):
    text = (splits.FOLDER / "omniglot_finn.txt").read_text()
    monkeypatch.setattr(splits, "FOLDER", tmp_path)
    copy = tmp_path / "omniglot_finn.txt"
    copy.write_bytes(text.replace("# Omniglot", "# OMNIGLOT").replace("\n", "\r\n").encode())
    read_split("finn")  # comments and line ends are nobody's split
    copy.write_text(text.replace("Angelic_1\n", "", 1))
    with pytest.raises(ValueError, match="class_split='finn': .* was changed .* restore it"):
        read_split("finn")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(ONE)
    assert read_split(str(path)) == ClassSplit(("a b", "c"), (), ("d",))
    assert classes_of(str(path), "meta_test") == ("d",)


def test_a_folder_of_lists(tmp_path):
    for name, text in (("meta_train", "a\nb\n"), ("meta_valid", "# c\nc"), ("meta_test", "d")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert read_split(str(tmp_path)) == ClassSplit(("a", "b"), ("c",), ("d",))


def test_the_csv_files_of_ravi_and_larochelle(tmp_path):
    for name, labels in (("train", "aba"), ("val", "c"), ("test", "d")):
        rows = [f"{label}{i}.jpg,{label}" for i, label in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["filename,label", *rows]))
    assert read_split(str(tmp_path)) == ClassSplit(("a", "b"), ("c",), ("d",))
    assert files_of(str(tmp_path), "meta_train") == {"a": ["a0.jpg", "a2.jpg"], "b": ["b1.jpg"]}
    (tmp_path / "val.csv").write_text("file,class\nx.jpg,c\n")
    with pytest.raises(ValueError, match="val.csv': its first line is 'file,class', but must be filename,label"):
        read_split(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + "c\n", "'c' is listed twice .1 such classes., but a class belongs to one split"),
        ("a\n" + ONE, r"found 'a', but a class stands below one of \[meta_train\]"),
        (ONE.replace("meta_test", "test"), r"found '\[test\]'"),
    ],
)
def test_faulty_files_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(str(path))


def test_names_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="class_split='fin': neither one of finn, vinyals"):
        read_split("fin")
    with pytest.raises(FileNotFoundError, match="no lists of classes there; write meta_train.txt"):
        read_split(str(tmp_path))
    with pytest.raises(ValueError, match="split='train': give one of meta_train, meta_valid"):
        classes_of("finn", "train")
    with pytest.raises(ValueError, match="'meta_valid': class_split='lake' has no classes there"):
        classes_of("lake", "meta_valid")
