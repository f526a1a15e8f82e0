"""Few-shot classification from any TFDS data set of labelled images."""

from PIL import Image

from maml.tasks.episodes import episodes, rotated_classes
from maml.tasks.images import check_image, classes_named, tfds_images
from maml.tasks.splits import classes_of
from maml.types import Sampler

MODES = {1: "L", 3: "RGB"}


def tfds_few_shot(
    split: str = "meta_train",
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    *,
    name: str,
    class_split: str,
    data_dir: str | None = None,
    label: str = "label",
    parts: str = "train+test",
    image_size: int = 84,
    channels: int = 3,
    resample: str = "lanczos",
    rotations: str = "none",
    invert: bool = False,
    cache_dir: str | None = None,
    least_ways: int | None = None,
) -> Sampler:
    """Tasks of the classes of a TFDS data set, such as CIFAR-FS over 'cifar100'; shapes as of `episodes`.

    The data set's own parts are pooled: what is split is classes. Images of any size are made RGB (grey for 1 channel) and
    then image_size x image_size without regard to their aspect ratio; those of that size stay as they are. Inputs are in
    [0, 1], with no mean or deviation of a data set taken out. The whole data set must fit into memory, and the images of a
    split, once resized, into that of the device.

    Args:
      split: meta_train, meta_valid or meta_test.
      name: of the data set in TFDS.
      class_split: 'cifar_fs' (64/16/20 classes) or 'fc100' (60/20/20) for cifar100, 'cub' (140/30/30) for
        caltech_birds2011, 'flowers' (71/15/16) for oxford_flowers102, 'dtd' (33/7/7) for dtd, 'quickdraw' (241/52/52) for
        quickdraw_bitmap, or a path: `read_split`. The last four are Meta-Dataset's classes (arXiv 1903.03096).
      data_dir: where TFDS has prepared data sets; None for its own default (TFDS_DATA_DIR or ~/tensorflow_datasets).
      label: the class label, one of the data set's features.
      parts: those of the data set that are pooled, such as 'train+test', or a share of one, 'train[:1%]'.
      resample: the filter of Pillow: nearest, box, bilinear, hamming, bicubic or lanczos.
      rotations: 'none', 'per_class' (each class of a task turned at random) or 'classes' (four times the classes).
      cache_dir: for the decoded arrays; None for MAML_CACHE or ~/.cache/maml.
      least_ways: tasks of that many to `ways` classes, 1 to `shots` examples of each (`episodes`); None: all of the same sizes.

    Raises:
      FileNotFoundError: the data set is not there and cannot be prepared, or there is no such class split.
      ValueError: for names and sizes that do not fit.
    """
    wanted = classes_of(class_split, split)
    _check(image_size, channels, resample)
    data, names = tfds_images(
        name,
        data_dir,
        label=label,
        size=image_size,
        mode=MODES[channels],
        parts=parts,
        resample=Image.Resampling[resample.upper()],
        cache_dir=cache_dir,
    )
    data = classes_named(data, names, wanted, class_split)
    if rotations == "classes":
        data, rotations = rotated_classes(data), "none"
    return episodes(data, ways, shots, queries, rotations=rotations, invert=invert, least_ways=least_ways)


def _check(image_size: int, channels: int, resample: str) -> None:
    check_image(image_size, channels)
    filters = [f.name.lower() for f in Image.Resampling]
    if resample not in filters:
        raise ValueError(f"resample={resample!r}: give one of {', '.join(filters)}")
