"""Tables of images and labels: local parquet files, and which of their columns hold what."""

import glob
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipnet.data.decode import Encoded
from skipnet.data.rows import Rows
from skipnet.errors import UserError

if TYPE_CHECKING:  # datasets takes a second to import, so only the functions that read with it do
    import datasets

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def parquet_files(folder: Path, split_name: str) -> list[Path]:
    """The parquet files of a split in the layouts that are usual, none if there are none.

    Raises:
        UserError: There are such files in several folders.
    """
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


def parquet_rows(files: list[Path], image_column: str | None, label_column: str | None) -> Rows:
    """Opens parquet files as one split.

    Args:
        files: The files, in order.
        image_column: Column of the images; found by its type or name if None.
        label_column: Column of the labels; found by its name if None.

    Raises:
        UserError: A file cannot be read or has no rows, or a column is not found.
    """
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
        raise UserError(f"cannot read {files[0].parent} ({one_line(error)})") from error
    return table_rows(table, where, image_column, label_column)


def table_rows(
    table: "datasets.Dataset",
    where: Callable[[int], str],
    image_column: str | None,
    label_column: str | None,
) -> Rows:
    """Finds the images and labels of a table.

    Args:
        table: The table.
        where: Names the place of a row.
        image_column: Column of the images; found by its type or name if None.
        label_column: Column of the labels; found by its name if None.

    Raises:
        UserError: A column is not found, several may be meant, or it holds something else.
    """
    import datasets

    image_column = _image_column(image_column, table)
    label_column = _label_column(label_column, table)
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))
    feature = table.features[label_column]
    classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Rows(
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

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int, /) -> Encoded:
        return _encoded(self.table[row][self.column])

    def __iter__(self) -> Iterator[Encoded]:
        for piece in self.table.iter(batch_size=256):
            yield from map(_encoded, piece[self.column])


def _encoded(cell: Any) -> Encoded:
    """The image of a cell: bytes as they are, or bytes or a path in a struct."""
    if cell is None or isinstance(cell, bytes):
        return cell
    if cell["bytes"] is not None:
        encoded: bytes = cell["bytes"]
        return encoded
    path = cell.get("path")
    return Path(path) if path else None


def _image_column(column: str | None, table: "datasets.Dataset") -> str:
    """The column of the images, as configured, by its type or by its name."""
    import datasets

    features = table.features
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


def _label_column(column: str | None, table: "datasets.Dataset") -> str:
    """The column of the labels, as configured or by its name."""
    import datasets

    features = table.features
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
        f"{file} is not a readable parquet file ({one_line(error)}); copy or download it again"
    )


def one_line(error: BaseException) -> str:
    """Type and message of an error in one line of moderate length."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__
