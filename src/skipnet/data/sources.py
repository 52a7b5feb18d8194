"""Where images come from: digits, Hugging Face datasets, parquet and image folders, to tensors."""

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipnet.data.decode import Encoded, decode_images, image_files, to_pixels
from skipnet.errors import UserError

if TYPE_CHECKING:  # datasets takes a second to import, so only the functions that read with it do
    import datasets

Split = Literal["train", "test"]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "valid", "val")
DIGITS_TEST_IMAGES = 360


@dataclass(kw_only=True)
class DataConfig:
    """Which images to learn from, and how they are prepared."""

    name: str = "digits"
    """digits, a Hugging Face hub name (uoft-cs/cifar10), or a folder of parquet files or images."""
    train_split: str = "train"
    """Name of the training split."""
    test_split: str = "test"
    """Name of the test split; a local folder may also call it validation, valid or val."""
    image_column: str | None = None
    """Column of the images; found by its type or name if not given."""
    label_column: str | None = None
    """Column of the labels; label, labels or fine_label if not given."""
    image_size: int | None = None
    """Resize the shorter side to this many pixels and crop the centre; needed if sizes differ."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for RGB; as the first training image if not given."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """Stop at an image that cannot be read, or leave it out with a warning."""
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


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled set of images in memory.

    Attributes:
        images: uint8 [N, C, H, W] with N above 0.
        labels: int64 [N], each in 0 … len(classes) − 1.
        classes: Names of the classes.

    Raises:
        UserError: There are no images, or a label is outside the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises UserError as the class says."""
        assert self.images.dtype == torch.uint8 and self.images.ndim == 4
        assert self.labels.dtype == torch.int64 and self.labels.shape == self.images.shape[:1]
        if len(self) == 0:
            raise UserError("the set has no images; give at least one")
        outside = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero()
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"row {row} has label {int(self.labels[row])}, outside the {len(self.classes)} "
                f"classes (0 to {len(self.classes) - 1}); correct it or remove the row"
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set with its tensors on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, num_images: int) -> "ImageSet":
        """The first images of the set, all of them if it has fewer; a view, no copy."""
        return replace(self, images=self.images[:num_images], labels=self.labels[:num_images])


@dataclass(frozen=True)
class _Split:
    """One split, not yet decoded.

    Attributes:
        encoded: The images, in order; each call of iter() reads them anew.
        labels: As stored: integers, strings or None.
        classes: Names of the classes if the source has a list of them.
        where: Names the place of a row, for messages.
    """

    encoded: Iterable[Encoded]
    labels: list[Any]
    classes: tuple[str, ...] | None
    where: Callable[[int], str]


def load(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Loads the training and the test set.

    Args:
        config: What to load.

    Returns:
        Training and test set, with the same classes and images of the same shape.

    Raises:
        UserError: As `load_split`; or the two differ in classes or shape.
    """
    train = load_split(config, "train")
    channels: Literal[1, 3] = 1 if train.images.shape[1] == 1 else 3
    test = load_split(replace(config, channels=channels), "test", train.classes)
    if train.images.shape[2:] != test.images.shape[2:]:
        (height, width), (test_height, test_width) = train.images.shape[2:], test.images.shape[2:]
        raise UserError(
            f"{config.name}: training images are {height}×{width}, test images {test_height}×"
            f"{test_width} pixels; set image_size to resize all to one size"
        )
    return train, test


def load_split(
    config: DataConfig, split: Split, classes: tuple[str, ...] | None = None
) -> ImageSet:
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
    if config.name == "digits":
        digits = _digits(config, split)
        _demand_same_classes(config, split, digits.classes, classes)
        return digits
    source = _open(config, split)
    if source.classes is not None:
        _demand_same_classes(config, split, source.classes, classes)
        classes = source.classes
    elif classes is None:
        classes = _classes(source if split == "train" else _open(config, "train"))
    labels = _label_indices(source, classes)
    pixels, rows = decode_images(
        source.encoded,
        len(labels),
        channels=config.channels,
        image_size=config.image_size,
        on_bad_image=config.on_bad_image,
        where=source.where,
    )
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels[rows]), classes)


def normalization(
    config: DataConfig, train: ImageSet
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation to normalise with.

    Args:
        config: Whose `mean` and `std` are used if given.
        train: The training set, from which they are computed otherwise.

    Returns:
        One mean and one standard deviation a channel, for pixels in 0 … 1.

    Raises:
        UserError: The configuration gives another number of channels than the images have, or all
            pixels of a channel are the same.
    """
    channels = train.images.shape[1]
    if config.mean is not None and config.std is not None:
        if len(config.mean) != channels:
            raise UserError(
                f"mean and std have {len(config.mean)} values, the images {channels} channels; "
                f"give {channels}, or set channels to {len(config.mean)}"
            )
        return config.mean, config.std
    # From counts of the 256 values: exact, and no float copy of the set, four times its size.
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(channels):
        counts = torch.bincount(train.images[:, channel].flatten(), minlength=256).cpu()
        share = counts / counts.sum(dtype=torch.float64)
        mean.append(float((share * values).sum()))
        std.append(float((share * (values - mean[-1]) ** 2).sum().sqrt()))
    if min(std) == 0:
        raise UserError(
            f"all pixels of channel {std.index(0)} of the training images are the same; check "
            "the images, or give mean and std"
        )
    return tuple(mean), tuple(std)


def _digits(config: DataConfig, split: Split) -> ImageSet:
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
    pixels = [to_pixels(Image.fromarray(i), config.channels, config.image_size) for i in grey]
    return ImageSet(
        torch.from_numpy(np.stack(pixels)),
        torch.from_numpy(digits.target[rows].astype(np.int64)),
        tuple(str(name) for name in digits.target_names),
    )


def _open(config: DataConfig, split: Split) -> _Split:
    """Finds a split of the configured data set."""
    folder = Path(config.name).expanduser()
    split_name = config.train_split if split == "train" else config.test_split
    if folder.is_file():
        raise UserError(f"{config.name} is a file; give the folder that holds the data set")
    if not folder.is_dir():
        if config.name.startswith((".", "~", "/")) or config.name.count("/") > 1:
            raise UserError(f"there is no folder {config.name}; correct the name of the data set")
        table = _hub_table(config.name, split_name)
        return _parquet_split(config, table, lambda row: f"row {row} of {config.name} {split_name}")
    names = TEST_SPLITS if split == "test" and split_name == "test" else (split_name,)
    for name in names:
        if files := _parquet_files(folder, name):
            return _parquet_split(config, *_local_table(files))
        if (folder / name).is_dir():
            return _folder_split(folder / name)
    raise UserError(
        f"{config.name} has no {' or '.join(names)} split; it needs a file {names[0]}.parquet or a "
        f"folder {names[0]} with one folder of images a class"
    )


def _parquet_files(folder: Path, split_name: str) -> list[Path]:
    """The parquet files of a split in the layouts that are usual, none if there are none."""
    single = folder / f"{split_name}.parquet"
    if single.is_file():
        return [single]
    name = glob.escape(split_name)
    for pattern in (f"{name}*.parquet", f"{name}/*.parquet", f"*/{name}-*.parquet"):
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))
        parents = sorted({file.parent.name for file in files})
        if len(parents) > 1:
            raise UserError(
                f"{folder} has a {split_name} split in several folders ({', '.join(parents)}); "
                "give one of them as the name of the data set"
            )
        if files:
            return files
    return []


def _local_table(files: list[Path]) -> tuple["datasets.Dataset", Callable[[int], str]]:
    """Opens parquet files; also returns a function that names the place of a row."""
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    ends = []
    for file in files:
        try:
            ends.append(pyarrow.parquet.read_metadata(file).num_rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise _corrupt(file, error) from error
    ends = np.cumsum(ends).tolist()
    if ends[-1] == 0:
        raise UserError(f"{files[0]} has no rows; give a file with images")

    def where(row: int) -> str:
        file = int(np.searchsorted(ends, row, side="right"))
        return f"row {row - (ends[file - 1] if file else 0)} of {files[file]}"

    try:
        with _without_progress_bars():
            table = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train"
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        for file in files:  # datasets does not say which file it was
            try:
                pyarrow.parquet.read_table(file)
            except (OSError, pyarrow.ArrowException) as cause:
                raise _corrupt(file, cause) from error
        raise UserError(f"cannot read {files[0].parent} ({_one_line(error)})") from error
    return table, where


def _hub_table(name: str, split_name: str) -> "datasets.Dataset":
    """Opens a split of a data set of the Hugging Face hub, from the local cache if it is there."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split_name)
    except Exception as error:  # the hub's client has dozens of unrelated types for its failures
        raise UserError(
            f"cannot load {split_name} of {name} from the Hugging Face hub ({_one_line(error)}); "
            "correct the name, connect or log in, or give a local folder"
        ) from error


def _parquet_split(
    config: DataConfig, table: "datasets.Dataset", where: Callable[[int], str]
) -> _Split:
    """Finds the images and labels of a table."""
    import datasets

    image_column = _image_column(config, table)
    label_column = _label_column(config, table)
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))
    feature = table.features[label_column]
    classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return _Split(
        encoded=_EncodedColumn(table.select_columns(image_column), image_column),
        labels=table.select_columns(label_column)[:][label_column],
        classes=classes,
        where=where,
    )


@dataclass(frozen=True)
class _EncodedColumn:
    """The encoded images of a table, read in pieces so that they are never all in memory."""

    table: "datasets.Dataset"
    column: str

    def __iter__(self) -> Iterator[Encoded]:
        for piece in self.table.iter(batch_size=256):
            for cell in piece[self.column]:
                if cell is None or isinstance(cell, bytes):
                    yield cell
                elif cell["bytes"] is not None:
                    yield cell["bytes"]
                else:
                    path = cell.get("path")
                    yield Path(path) if path else None


def _image_column(config: DataConfig, table: "datasets.Dataset") -> str:
    """The column of the images, as configured, by its type or by its name."""
    import datasets

    features = table.features
    column = config.image_column
    if column is None:
        found = [name for name in features if isinstance(features[name], datasets.Image)]
        found = found or [name for name in features if name in IMAGE_COLUMNS]
        column = _only("image_column", found, features)
    elif column not in features:
        raise UserError(_no_column("image_column", column, features))
    feature = features[column]
    is_struct = isinstance(feature, dict) and "bytes" in feature
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    if not (isinstance(feature, datasets.Image) or is_struct or is_binary):
        raise UserError(
            f"column {column} does not hold encoded images (its type is {feature}); set "
            f"image_column to another of {', '.join(features)}, or store JPEG or PNG bytes"
        )
    return column


def _label_column(config: DataConfig, table: "datasets.Dataset") -> str:
    """The column of the labels, as configured or by its name."""
    import datasets

    features = table.features
    column = config.label_column
    if column is None:
        column = _only("label_column", [n for n in features if n in LABEL_COLUMNS], features)
    elif column not in features:
        raise UserError(_no_column("label_column", column, features))
    feature = features[column]
    dtype = str(getattr(feature, "dtype", feature))
    if not isinstance(feature, datasets.ClassLabel) and not dtype.startswith(
        ("int", "uint", "string", "large_string")
    ):
        raise UserError(
            f"column {column} holds {dtype}, not labels; set label_column to a column of integers "
            "or strings"
        )
    return column


def _only(option: str, found: list[str], columns: Iterable[str]) -> str:
    """The one column that was found; otherwise a UserError that asks for the option."""
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"several columns may be meant: {', '.join(found)}; set {option} to one")
    raise UserError(f"no {option} found; set {option} to one of {', '.join(columns)}")


def _no_column(option: str, column: str, columns: Iterable[str]) -> str:
    return f"there is no column {column}; set {option} to one of {', '.join(columns)}"


def _folder_split(folder: Path) -> _Split:
    """Finds the images below a folder that has one folder a class; hidden files are left out."""
    files: list[Path] = []
    labels: list[str] = []
    for class_folder in _class_folders(folder):
        images = image_files(class_folder)
        if not images:
            raise UserError(f"{class_folder} has no images; add some or remove the folder")
        files += images
        labels += [class_folder.name] * len(images)
    if not files:
        raise UserError(
            f"{folder} has neither parquet files nor folders; give it one folder of images a class"
        )
    return _Split(files, labels, None, lambda row: str(files[row]))


def _class_folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _classes(train: _Split) -> tuple[str, ...]:
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


def _label_indices(source: _Split, classes: Sequence[str]) -> np.ndarray:
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


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keeps datasets quiet; the switch is global, so it is put back afterwards."""
    import datasets

    disabled = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def _corrupt(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} is not a readable parquet file ({_one_line(error)}); copy or download it again"
    )


def _one_line(error: BaseException) -> str:
    """Type and message of an error in one line of moderate length."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__
