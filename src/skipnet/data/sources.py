"""Where images come from: digits, the hub, parquet, original files and image folders, to sets."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from skipnet.data.decode import (
    Crop,
    bad_image,
    decode,
    decode_images,
    image_files,
    pillow_warnings,
    reason,
)
from skipnet.data.hub import hub_table
from skipnet.data.images import Images, ImageSet, StreamedSet
from skipnet.data.originals import Pixels, original_rows
from skipnet.data.rows import Files, Rows, join
from skipnet.data.tables import parquet_files, parquet_rows, table_rows
from skipnet.errors import UserError

Split = Literal["train", "test"]

ALIASES = {
    "test": ("validation", "valid", "val"),
    **dict.fromkeys(("validation", "valid", "val"), ("validation", "valid", "val", "test")),
}
"""Names a local folder may call a test split by."""
DIGITS_TEST_IMAGES = 360
LARGEST_IN_MEMORY = 4 * 2**30
"""Bytes of pixels; a larger set is streamed. SVHN has 1.9e9, ImageNet at 224 pixels 1.9e11."""
STREAMED_SAMPLE = 1024


@dataclass(kw_only=True)
class DataConfig:
    """Which images to learn from, and how they are prepared."""

    name: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "digits"
    """digits, a hub name (uoft-cs/cifar10), or a folder of parquet files, images or originals."""
    subset: str | None = None
    """Which of the configurations of a hub data set that has several (cropped_digits)."""
    train_split: str = "train"
    """Name of the training split, or of several joined by + (train+extra)."""
    test_split: str = "test"
    """Name of the test split; a local folder may also call it validation, valid or val."""
    image_column: str | None = None
    """Column of the images; found by its type or name if not given."""
    label_column: str | None = None
    """Column of the labels; label, labels or fine_label if not given."""
    image_size: int | None = None
    """Resize the shorter side to this many pixels and crop the centre; needed if sizes differ."""
    resize: int | None = None
    """Resize the shorter side of test images to this many pixels before image_size is cropped out
    of the centre (256 for 224); image_size if not given."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; as the first training image if not given."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Stop at an image that cannot be read, or leave it out with a warning; in streamed training
    the next one takes its place."""
    stream: Literal["auto", "always", "never"] = "auto"
    """Decode images while training instead of before: auto does if they take more than 4 GiB."""
    workers: int | None = None
    """Processes that decode streamed images, each process of a training run its own; all cores but
    one, at most 16, if not given; 0 decodes in between."""
    crop: Literal["pad", "random-resized"] = "pad"
    """Random crop of training images: of its padding, or of 8 to 100 % of the original's area,
    resized to image_size (ImageNet; always streamed, without padding)."""
    padding: int = 4
    """Pixels of zero padding before the random crop of training images; 0 for no crop."""
    flip: bool = True
    """Mirror half of the training images left to right, at random."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel for pixels in 0 to 1; computed from the training set if not given."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, like mean."""

    def __post_init__(self) -> None:
        """Raises UserError for a value that cannot work."""
        for field in ("name", "train_split", "test_split"):
            if not getattr(self, field):
                raise UserError(f"{field} is empty; give a name")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}; set it to 1 or more pixels")
        if self.channels not in (None, 1, 3):
            raise UserError(f"channels is {self.channels}; set it to 1 (grey) or 3 (RGB)")
        if self.on_bad_image not in ("stop", "skip"):
            raise UserError(f'on_bad_image is {self.on_bad_image!r}; set it to "stop" or "skip"')
        for field, known in (
            ("stream", ("auto", "always", "never")),
            ("crop", ("pad", "random-resized")),
        ):
            if (value := getattr(self, field)) not in known:
                raise UserError(f"{field} is {value!r}; set it to one of {', '.join(known)}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers is {self.workers}; set it to 0 or more")
        for field in ("train_split", "test_split"):
            parts = getattr(self, field).split("+")
            if not all(parts) or len(set(parts)) < len(parts):
                raise UserError(
                    f"{field} is {getattr(self, field)}; give names joined by +, each once"
                )
        if self.resize is not None and (self.image_size is None or self.resize < self.image_size):
            raise UserError(
                f"resize is {self.resize}, image_size {self.image_size}; set image_size to at most "
                "as many pixels"
            )
        if self.crop == "random-resized":
            if self.image_size is None:
                raise UserError("crop random-resized needs an image_size; set it, to 224 perhaps")
            if self.stream == "never":
                raise UserError("crop random-resized needs streamed images; leave stream at auto")
        if self.padding < 0:
            raise UserError(f"padding is {self.padding}; set it to 0 or more pixels")
        if (self.mean is None) != (self.std is None):
            raise UserError("only one of mean and std is given; give both or neither")
        if self.mean is not None and self.std is not None:
            if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
                raise UserError(
                    f"mean has {len(self.mean)} and std {len(self.std)} values; give each one "
                    "value a channel (1 or 3)"
                )
            if min(self.std) <= 0:
                raise UserError(f"std is {self.std}; each value must be above 0")


def load(config: DataConfig) -> tuple[Images, Images]:
    """Loads the training and the test set.

    Args:
        config: What to load.

    Returns:
        Training and test set, with the same classes and images of the same shape; either in memory
        or, if it is large or configured so, streamed.

    Raises:
        UserError: As `load_split`; or the two differ in classes or shape.
    """
    train = load_split(config, "train")
    channels: Literal[1, 3] = 1 if train.shape[0] == 1 else 3
    test = load_split(replace(config, channels=channels), "test", train.classes)
    if train.shape != test.shape:
        (_, height, width), (_, test_height, test_width) = train.shape, test.shape
        raise UserError(
            f"{config.name}: training images are {height}×{width}, test images {test_height}×"
            f"{test_width} pixels; set image_size to resize all to one size"
        )
    return train, test


def load_split(config: DataConfig, split: Split, classes: tuple[str, ...] | None = None) -> Images:
    """Loads one split; images of the other one are not decoded.

    Args:
        config: What to load.
        split: "train" or "test".
        classes: The classes the split must have, for instance those of a trained model. If not
            given, they come from the data: class names in its schema, else the training labels.

    Returns:
        The split, on the CPU.

    Raises:
        UserError: The data set or a column is not found, a file or an image cannot be read, images
            differ in size, or a label is missing or outside the classes.
    """
    source = _open(config, split)
    if source.classes is not None:
        _demand_same_classes(config, split, source.classes, classes)
        classes = source.classes
    elif classes is None:
        classes = _classes(source if split == "train" else _open(config, "train"))
    labels = _label_indices(source, classes)
    crop = None
    if config.resize is not None:
        from skipnet.data.crops import centre_crop

        assert config.image_size is not None
        crop = centre_crop(config.resize, config.image_size)
    if config.stream != "never":
        shape = _shape(source, config, crop)
        size = len(labels) * math.prod(shape)
        if config.stream == "always" or config.crop == "random-resized" or size > LARGEST_IN_MEMORY:
            return StreamedSet(
                source,
                torch.from_numpy(labels),
                classes,
                shape,
                channels=config.channels,
                image_size=config.image_size,
                resize=config.resize,
                random_resized=config.crop == "random-resized",
                on_bad_image=config.on_bad_image,
                workers=_free_cores() if config.workers is None else config.workers,
            )
    pixels, rows = decode_images(
        source.encoded,
        len(labels),
        channels=config.channels,
        image_size=config.image_size,
        crop=crop,
        on_bad_image=config.on_bad_image,
        where=source.where,
    )
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels[rows]), classes)


def _shape(source: Rows, config: DataConfig, crop: Crop | None) -> tuple[int, int, int]:
    """Channels, height and width of the first image that can be read, as configured."""
    for row, item in enumerate(source.encoded):
        try:
            with pillow_warnings():
                found = decode(item, config.channels, config.image_size, crop).shape
        except Exception as error:  # Pillow's plugins raise nearly every type on broken files
            if config.on_bad_image == "stop":
                raise bad_image(source.where(row), reason(error)) from error
            continue
        return found[0], found[1], found[2]
    raise UserError(
        f"none of the {len(source.labels)} images can be read; the first is {source.where(0)}"
    )


def _free_cores() -> int:
    """Cores that decoding may have: this process's share of the machine but one, at most 16."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(16, max(0, len(os.sched_getaffinity(0)) // processes - 1))


def normalization(config: DataConfig, train: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation to normalise with.

    Args:
        config: Whose `mean` and `std` are used if given.
        train: The training set, from which they are computed otherwise; of a streamed one, from
            1,024 images evenly spread over it.

    Returns:
        One mean and one standard deviation a channel, for pixels in 0 … 1.

    Raises:
        UserError: The configuration gives another number of channels than the images have, or all
            pixels of a channel are the same.
    """
    channels = train.shape[0]
    if config.mean is not None and config.std is not None:
        if len(config.mean) != channels:
            raise UserError(
                f"mean and std have {len(config.mean)} values, the images {channels} channels; "
                f"give {channels}, or set channels to {len(config.mean)}"
            )
        return config.mean, config.std
    if isinstance(train, StreamedSet):
        spread = torch.linspace(0, len(train) - 1, min(len(train), STREAMED_SAMPLE)).long()
        images = train.take(spread)
    else:
        images = train.images
    # From counts of the 256 values: exact, and no float copy of the set, four times its size.
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(channels):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).cpu()
        share = counts / counts.sum(dtype=torch.float64)
        mean.append(float((share * values).sum()))
        std.append(float((share * (values - mean[-1]) ** 2).sum().sqrt()))
    if min(std) == 0:
        raise UserError(
            f"all pixels of channel {std.index(0)} of the training images are the same; check "
            "the images, or give mean and std"
        )
    return tuple(mean), tuple(std)


def _digits(split: Split) -> Rows:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey: 1,437 to train with, 360 to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_IMAGES,
        stratify=digits.target,
        random_state=0,
    )[0 if split == "train" else 1]
    grey = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    return Rows(
        Pixels(grey[:, None]),
        digits.target[rows].tolist(),
        tuple(str(name) for name in digits.target_names),
        lambda row: f"digit {row}",
    )


def _open(config: DataConfig, split: Split) -> Rows:
    """Finds a split of the configured data set."""
    if config.name == "digits":
        return _digits(split)
    path = Path(config.name).expanduser()
    names = (config.train_split if split == "train" else config.test_split).split("+")
    if path.is_file():
        archive = path.name.endswith((".tar.gz", ".tgz"))
        parts = [original_rows(path, name, config.label_column) for name in names if archive]
        found = [part for part in parts if part is not None]
        if len(found) < len(names):
            raise UserError(
                f"{config.name} is a file; give the folder that holds the data set, or the archive "
                "of CIFAR's python version (splits train and test)"
            )
        return join(found, names)
    if not path.is_dir():
        if config.name.startswith((".", "~", "/")) or config.name.count("/") > 1:
            raise UserError(f"there is no folder {config.name}; correct the name of the data set")
        return join([_hub_rows(config, name) for name in names], names)
    return join([_local_rows(config, path, name) for name in names], names)


def _hub_rows(config: DataConfig, split_name: str) -> Rows:
    """Opens a split on the hub."""
    table = hub_table(config.name, config.subset, split_name)

    def where(row: int) -> str:
        return f"row {row} of {config.name} {split_name}"

    return table_rows(table, where, config.image_column, config.label_column)


def _local_rows(config: DataConfig, folder: Path, split_name: str) -> Rows:
    """Finds a split in a folder: parquet files, original files, or a folder of images a class."""
    names = (split_name, *(name for name in ALIASES.get(split_name, ()) if name != split_name))
    for name in names:
        if files := parquet_files(folder, name):
            return parquet_rows(files, config.image_column, config.label_column)
        if rows := original_rows(folder, name, config.label_column):
            return rows
        if (folder / name).is_dir():
            return _folder_rows(folder / name)
    raise UserError(
        f"{config.name} has no {' or '.join(names)} split; it needs a file {names[0]}.parquet, the "
        f"original files of CIFAR or SVHN, or a folder {names[0]} with one folder of images a class"
    )


def _folder_rows(folder: Path) -> Rows:
    """Finds the images below a folder that has one folder a class; hidden files are left out."""
    files: list[Path] = []
    labels: list[str] = []
    for class_folder in sorted(f for f in folder.iterdir() if _is_class_folder(f)):
        images = image_files(class_folder)
        if not images:
            raise UserError(f"{class_folder} has no images; add some or remove the folder")
        files += images
        labels += [class_folder.name] * len(images)
    if not files:
        raise UserError(
            f"{folder} has neither parquet files nor folders; give it one folder of images a class"
        )
    found = Files(files)
    return Rows(found, labels, None, lambda row: str(found[row]))


def _is_class_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _classes(train: Rows) -> tuple[str, ...]:
    """The classes of a training split: of its schema, or those its labels have.

    Strings are sorted; integers name themselves, "0" to the largest one.
    """
    if train.classes is not None:
        return train.classes
    labels = [label for label in train.labels if label is not None]
    if not labels:
        raise UserError(f"{train.where(0)}: no row has a label; add labels to the training set")
    if isinstance(labels[0], str):
        return tuple(sorted(set(labels)))
    return tuple(str(index) for index in range(max(labels) + 1))


def _label_indices(source: Rows, classes: Sequence[str]) -> np.ndarray:
    """Labels as class indices, int64 [N]; raises UserError for one that is not in the classes."""
    index = {name: number for number, name in enumerate(classes)}
    indices = np.empty(len(source.labels), dtype=np.int64)
    for row, label in enumerate(source.labels):
        if label is None:
            raise UserError(f"{source.where(row)} has no label; add it or remove the row")
        number = index.get(label, -1) if isinstance(label, str) else label
        if not 0 <= number < len(classes):
            raise UserError(
                f"{source.where(row)} has label {label!r}, outside the {len(classes)} classes "
                f"({classes[0]} to {classes[-1]}); correct it or remove the row"
            )
        indices[row] = number
    return indices


def _demand_same_classes(
    config: DataConfig, split: Split, found: tuple[str, ...], wanted: tuple[str, ...] | None
) -> None:
    """Raises UserError if the classes of a split are not those that are wanted."""
    if wanted is not None and found != wanted:
        differ = sorted(set(found) ^ set(wanted))
        detail = f"{differ[0]} is in only one of them" if differ else "their order differs"
        raise UserError(
            f"{config.name}: the {split} split has {len(found)} classes that are not the "
            f"{len(wanted)} wanted ({detail}); give splits with the same classes"
        )
