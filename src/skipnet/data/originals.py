"""The files that CIFAR-10, CIFAR-100 and SVHN are published as.

CIFAR's python batches are pickles. They are read by an unpickler that knows only the few
constructors such files hold, and knows them as stand-ins of its own: nothing in a file can name
anything that runs.
"""

import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from skipnet.data.rows import Rows
from skipnet.data.tables import one_line
from skipnet.errors import UserError

CIFAR_SHAPE = (3, 32, 32)
LARGEST_BATCH = 512 * 2**20
"""Bytes; the largest of the originals, CIFAR-100's train, has 155 million."""


@dataclass(frozen=True)
class CifarLayout:
    """How one of the CIFAR sets is laid out.

    Attributes:
        name: What the set is called.
        archive: Its archive.
        folder: The folder in the archive.
        batches: Files of each split.
        meta: File of the class names.
        label_keys: Names of labels and class names, by label column; None is the default one.
    """

    name: str
    archive: str
    folder: str
    batches: dict[str, tuple[str, ...]]
    meta: str
    label_keys: dict[str | None, tuple[str, str]]


CIFAR10 = CifarLayout(
    name="CIFAR-10",
    archive="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    batches={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    meta="batches.meta",
    label_keys={None: ("labels", "label_names"), "label": ("labels", "label_names")},
)
CIFAR100 = CifarLayout(
    name="CIFAR-100",
    archive="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    batches={"train": ("train",), "test": ("test",)},
    meta="meta",
    label_keys={
        None: ("fine_labels", "fine_label_names"),
        "fine_label": ("fine_labels", "fine_label_names"),
        "coarse_label": ("coarse_labels", "coarse_label_names"),
    },
)
SVHN_CLASSES = tuple("0123456789")


class Pixels:
    """Images that are decoded already.

    Args:
        images: uint8 [N, C, H, W].
    """

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int, /) -> np.ndarray:
        image: np.ndarray = self.images[row]
        return image

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.images)


def original_rows(path: Path, split_name: str, label_column: str | None) -> Rows | None:
    """Reads a split from the original files of CIFAR-10, CIFAR-100 or SVHN.

    Args:
        path: A folder that holds the files, or CIFAR's folder or archive, or CIFAR's archive.
        split_name: "train" or "test"; SVHN has "extra" too.
        label_column: None, or for CIFAR-100 "fine_label" or "coarse_label".

    Returns:
        The split, or None if the path holds no such files.

    Raises:
        UserError: A file is missing, damaged, or holds what the original does not.
    """
    mat = path / f"{split_name}_32x32.mat"
    if mat.is_file():
        return _svhn_rows(mat)
    for layout in (CIFAR10, CIFAR100):
        if split_name not in layout.batches:
            continue
        found = _find_cifar(path, layout, layout.batches[split_name])
        if found is not None:
            return _cifar_rows(layout, split_name, found, label_column)
    return None


def _find_cifar(
    path: Path, layout: CifarLayout, batches: Sequence[str]
) -> dict[str, tuple[str, bytes]] | None:
    """The files of a split as {name: (where, content)}, or None if there is no sign of the set."""
    names = (*batches, layout.meta)
    if path.is_file():
        return _from_archive(path, layout, names)
    for folder in (path, path / layout.folder):
        if any((folder / name).is_file() for name in batches):
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(
                    f"{folder} lacks {', '.join(missing)} of {layout.name}; unpack the archive "
                    "again, or give it as it is"
                )
            return {name: (str(folder / name), _read(folder / name)) for name in names}
    if (path / layout.archive).is_file():
        return _from_archive(path / layout.archive, layout, names)
    return None


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > LARGEST_BATCH:
            raise UserError(f"{file} is too large for a batch of CIFAR; download it again")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _from_archive(
    archive: Path, layout: CifarLayout, names: Sequence[str]
) -> dict[str, tuple[str, bytes]] | None:
    """Reads files out of a tar archive, without unpacking it; None if it is another set's."""
    wanted = {f"{layout.folder}/{name}": name for name in names}
    found: dict[str, tuple[str, bytes]] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                # Links are not followed and other paths not looked at: only these files count.
                if (name := wanted.get(member.name.removeprefix("./"))) is None:
                    continue
                where = f"{member.name} in {archive}"
                if not member.isreg() or name in found or member.size > LARGEST_BATCH:
                    raise UserError(
                        f"{where} is not one plain file of moderate size, as in the original; "
                        "download the archive again"
                    )
                stream = tar.extractfile(member)
                assert stream is not None
                found[name] = where, stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"{archive} is cut short or damaged ({one_line(error)}); download it again"
        ) from error
    if not found:
        return None
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{archive} lacks {', '.join(missing)}; download it again")
    return found


def _cifar_rows(
    layout: CifarLayout,
    split_name: str,
    files: dict[str, tuple[str, bytes]],
    label_column: str | None,
) -> Rows:
    if label_column not in layout.label_keys:
        known = ", ".join(key for key in layout.label_keys if key)
        raise UserError(f"{layout.name} has no {label_column}; set label_column to {known}")
    label_key, names_key = layout.label_keys[label_column]
    names = _unpickled(*files[layout.meta]).get(names_key)
    if not isinstance(names, list) or not names:
        raise UserError(f"{files[layout.meta][0]} holds no {names_key}; download it again")
    classes = tuple(_text(name, files[layout.meta][0]) for name in names)
    images, labels, ends, places = [], [], [], []
    for name in layout.batches[split_name]:
        where, content = files[name]
        batch = _unpickled(where, content)
        pixels, own = batch.get("data"), batch.get(label_key)
        if isinstance(own, _Array):
            own = own.values(where).tolist()
        if not isinstance(pixels, _Array) or not isinstance(own, list):
            raise UserError(f"{where} lacks data or {label_key}; is it a batch of {layout.name}?")
        pixels = pixels.values(where)
        if pixels.dtype != np.uint8 or pixels.shape != (len(own), math.prod(CIFAR_SHAPE)):
            raise UserError(
                f"{where}: {len(own)} labels beside {pixels.dtype} data of shape {pixels.shape}, "
                f"not uint8 ({len(own)}, 3072); download it again"
            )
        if not all(type(label) is int for label in own):
            raise UserError(f"{where} holds labels that are not integers; download it again")
        images.append(pixels.reshape(-1, *CIFAR_SHAPE))
        labels += own
        ends.append(len(labels))
        places.append(where)
    if not labels:
        raise UserError(f"{places[0]} holds no images; download it again")

    def where_is(row: int) -> str:
        index = int(np.searchsorted(ends, row, side="right"))
        return f"image {row - (ends[index - 1] if index else 0)} of {places[index]}"

    return Rows(Pixels(np.concatenate(images)), labels, classes, where_is)


def _svhn_rows(file: Path) -> Rows:
    """Reads X, uint8 [32, 32, 3, N], and y, [N, 1], in which 10 stands for the digit 0."""
    import scipy.io

    try:
        content = scipy.io.loadmat(file, variable_names=("X", "y"))
    except NotImplementedError as error:
        raise UserError(
            f"{file} is a MATLAB file of version 7.3, the originals are of version 5; download it "
            "again"
        ) from error
    except Exception as error:  # its parser raises nearly every type on broken files
        raise UserError(f"{file} is not readable ({one_line(error)}); download it again") from error
    images, labels = content.get("X"), content.get("y")
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
        raise UserError(f"{file} lacks X or y; download it again")
    labels = labels.ravel()
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
        raise UserError(
            f"{file}: X is {images.dtype} of shape {images.shape}, not uint8 (32, 32, 3, N); "
            "give the cropped digits (train_32x32.mat …)"
        )
    if images.shape[3] != len(labels) or not len(labels):
        raise UserError(f"{file} has {images.shape[3]} images and {len(labels)} labels")
    if strange := [label for label in labels.tolist() if label not in range(11)]:
        raise UserError(
            f"{file} has label {strange[0]}; the originals have 1 to 10, and 10 means 0"
        )
    digits = (labels.astype(np.int64) % 10).tolist()
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return Rows(Pixels(pixels), digits, SVHN_CLASSES, lambda row: f"image {row} of {file}")


# CIFAR's pickles


def _unpickled(where: str, content: bytes) -> dict[str, Any]:
    """The dictionary in a batch, its keys as text."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(batch, dict):
            raise pickle.UnpicklingError(f"a {type(batch).__name__}, not a dictionary")
        return {_text(key, where): value for key, value in batch.items()}
    except UserError:
        raise
    except Exception as error:  # the unpickler raises nearly every type on broken files
        raise UserError(
            f"{where} is not a batch of CIFAR as it was published ({one_line(error)}); nothing of "
            "it was run; download it again"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, strings and arrays; anything else is an error."""

    def find_class(self, module: str, name: str) -> "_Constructor":
        make = _ADMITTED.get((module, name))
        if make is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Constructor(make)


class _Constructor:
    """Stands for a constructor; made anew each time, so that a file cannot change it for others."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("it changes a constructor")


class _Kind:
    """Stands for a numpy.dtype: its code and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "="
        if self.code not in ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8"):
            raise pickle.UnpicklingError(f"an array of {code!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of structures")
        self.order = order


class _Array:
    """Stands for a numpy.ndarray: its shape, kind and raw bytes."""

    __slots__ = ("_state",)

    def __init__(self, *_: Any) -> None:
        self._state: tuple[Any, Any, Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        self._state = shape, kind, fortran, raw

    def values(self, where: str) -> np.ndarray:
        """The array; raises UserError if its bytes do not fill its shape."""
        try:
            assert self._state is not None
            shape, kind, fortran, raw = self._state
            dtype = np.dtype(kind.code).newbyteorder(kind.order)
            flat = np.frombuffer(raw, dtype=dtype)
            return flat.reshape(shape, order="F" if fortran else "C")
        except Exception as error:
            raise UserError(
                f"{where} holds a damaged array ({one_line(error)}); download it again"
            ) from error


def _frombuffer(raw: Any, kind: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, kind, order == "F", raw))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the old protocols that the originals use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin-1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2 name it so
    _ADMITTED[_core + ".multiarray", "_reconstruct"] = _Array
    _ADMITTED[_core + ".numeric", "_frombuffer"] = _frombuffer


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        raise UserError(f"{where} holds a {type(value).__name__} where a name belongs")
    return value
