"""The original files of CIFAR and SVHN, which the tests write as their authors' programs did."""

import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch

from skipnet.data.sources import DataConfig, load, load_split
from skipnet.errors import UserError

NAMES = ("airplane", "automobile", "bird")
FINE, COARSE = tuple(f"fine{i}" for i in range(100)), tuple(f"coarse{i}" for i in range(20))


class Raw:
    """Opcodes put into a pickle as they are."""

    def __init__(self, opcodes: bytes) -> None:
        self.opcodes = opcodes


def python2(value: Any) -> bytes:
    """A value as cPickle of Python 2 wrote it in protocol 2: byte strings, numpy of those days."""
    if isinstance(value, Raw):
        return value.opcodes
    if isinstance(value, bytes):
        short = len(value) < 256
        size = bytes([len(value)]) if short else struct.pack("<i", len(value))
        return (b"U" if short else b"T") + size + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(python2(key) + python2(item) for key, item in value.items())
        return b"}(" + items + b"u"
    assert isinstance(value, np.ndarray)
    kind = value.dtype.str[1:].encode()
    new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    dtype = b"cnumpy\ndtype\n(" + python2(kind) + b"K\x00K\x01tR"
    dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    raw = value.tobytes(order="F" if fortran else "C")
    return (
        new + b"(K\x01" + shape + dtype + (b"\x88" if fortran else b"\x89") + python2(raw) + b"tb"
    )


def dump2(value: Any) -> bytes:
    return b"\x80\x02" + python2(value) + b"."


def dump3(protocol: int) -> Callable[[Any], bytes]:
    return lambda value: pickle.dumps(value, protocol=protocol)


def images(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 3, 32, 32), dtype=np.uint8)


def cifar10_files(dump: Callable[[Any], bytes] = dump2) -> dict[str, bytes]:
    """Five training batches of two images, one test batch, and the class names."""
    files = {
        f"data_batch_{i}": dump(
            {
                b"batch_label": b"training batch",
                b"labels": [i % 3, 0],
                b"data": images(2, i).reshape(2, -1),
                b"filenames": [b"a.png", b"b.png"],
            }
        )
        for i in range(1, 6)
    }
    files["test_batch"] = dump({b"labels": [2, 1], b"data": images(2, 9).reshape(2, -1)})
    names = [name.encode() for name in NAMES]
    files["batches.meta"] = dump({b"num_cases_per_batch": 10000, b"label_names": names})
    return files


def cifar100_files() -> dict[str, bytes]:
    files = {
        split: dump2(
            {
                b"fine_labels": [99, 3],
                b"coarse_labels": [19, 4],
                b"data": images(2, seed).reshape(2, -1),
            }
        )
        for seed, split in enumerate(("train", "test"))
    }
    names = {b"fine_label_names": FINE, b"coarse_label_names": COARSE}
    files["meta"] = dump2({key: [name.encode() for name in value] for key, value in names.items()})
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(archive: Path, folder: str, files: dict[str, bytes]) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


def read(path: Path, split: str = "train", **options: Any) -> Any:
    return load_split(DataConfig(name=str(path), **options), split)  # type: ignore[arg-type]


# CIFAR


@pytest.mark.parametrize("dump", [dump2, *(dump3(p) for p in range(6))])
def test_cifar10(tmp_path: Path, dump: Callable[[Any], bytes]) -> None:
    train, test = load(DataConfig(name=str(write(tmp_path, cifar10_files(dump)))))
    wanted = np.concatenate([images(2, seed) for seed in range(1, 6)])
    assert torch.equal(train.take(torch.arange(10)), torch.from_numpy(wanted))
    assert train.labels.tolist() == [1, 0, 2, 0, 0, 0, 1, 0, 2, 0]
    assert torch.equal(test.take(torch.arange(2)), torch.from_numpy(images(2, 9)))
    assert test.labels.tolist() == [2, 1] and train.classes == test.classes == NAMES


def test_cifar10_columns_in_fortran_order(tmp_path: Path) -> None:
    files = cifar10_files()
    turned = np.asfortranarray(images(2, 9).reshape(2, -1))
    files["test_batch"] = dump2({b"labels": [2, 1], b"data": turned})
    test = read(write(tmp_path, files), "test")
    assert torch.equal(test.images, torch.from_numpy(images(2, 9)))


def test_cifar100_fine_and_coarse(tmp_path: Path) -> None:
    folder = write(tmp_path, cifar100_files())
    train, test = load(DataConfig(name=str(folder)))
    assert train.classes == FINE and train.labels.tolist() == [99, 3]
    assert torch.equal(test.take(torch.arange(2)), torch.from_numpy(images(2, 1)))
    assert read(folder, label_column="fine_label").classes == FINE
    coarse = read(folder, label_column="coarse_label")
    assert coarse.classes == COARSE and coarse.labels.tolist() == [19, 4]
    with pytest.raises(UserError, match=r"CIFAR-100 has no colour; .*fine_label, coarse_label"):
        read(folder, label_column="colour")


@pytest.mark.parametrize("where", ["archive", "beside", "unpacked"])
def test_where_the_files_may_lie(tmp_path: Path, where: str) -> None:
    for number, folder, files in (
        (10, "cifar-10-batches-py", cifar10_files()),
        (100, "cifar-100-python", cifar100_files()),
    ):
        place = tmp_path / str(number)
        if where == "unpacked":
            write(place / folder, files)
        else:
            archive = write_archive(place / f"cifar-{number}-python.tar.gz", folder, files)
            place = archive if where == "archive" else place
        train, test = load(DataConfig(name=str(place)))
        assert train.classes == (NAMES if number == 10 else FINE) == test.classes
        assert len(test) == 2
        if where == "beside":  # nothing has been unpacked
            assert [path.name for path in place.rglob("*")] == [f"cifar-{number}-python.tar.gz"]


def test_train_and_test_of_different_sets(tmp_path: Path) -> None:
    """A test set of 100 classes beside a training set of 10, and the other way round."""
    files = cifar10_files()
    del files["test_batch"]
    write(tmp_path, files | {"test": cifar100_files()["test"], "meta": cifar100_files()["meta"]})
    with pytest.raises(UserError, match=r"test split has 100 classes that are not the 3 wanted"):
        load(DataConfig(name=str(tmp_path)))
    with pytest.raises(UserError, match="100 classes that are not the 3 wanted"):
        load_split(DataConfig(name=str(tmp_path)), "test", NAMES)


def test_labels_beyond_the_names(tmp_path: Path) -> None:
    files = cifar10_files()
    files["data_batch_4"] = dump2({b"labels": [0, 3], b"data": images(2).reshape(2, -1)})
    message = r"image 1 of .*data_batch_4 has label 3, outside the 3 classes"
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, files))


def test_joined_with_itself_is_refused() -> None:
    with pytest.raises(UserError, match=r"train_split is train\+train; .*each once"):
        DataConfig(train_split="train+train")
    with pytest.raises(UserError, match=r"test_split is test\+; give names"):
        DataConfig(test_split="test+")


def test_streamed_from_the_originals(tmp_path: Path) -> None:
    folder = write(tmp_path, cifar10_files())
    streamed = read(folder, stream="always", workers=0, image_size=16, channels=1)
    whole = read(folder, image_size=16, channels=1)
    rows = torch.tensor([7, 0, 3])
    assert streamed.shape == whole.shape == (1, 16, 16)
    assert torch.equal(streamed.take(rows), whole.take(rows))


class Trap:
    """Leaves a mark when it is unpickled by pickle's own rules."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def hostile(mark: Path) -> dict[str, bytes]:
    touch = b"cposix\nsystem\n(" + python2(f"touch {mark}".encode()) + b"tR"
    array = python2(images(2).reshape(2, -1))
    constructor = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "reduce": pickle.dumps({b"labels": [0, 1], b"data": Trap(mark)}, protocol=2),
        "newest protocol": pickle.dumps([Trap(mark)], protocol=5),
        "system": dump2({b"labels": Raw(touch), b"data": images(2).reshape(2, -1)}),
        "instance": b"(" + python2(f"touch {mark}".encode()) + b"iposix\nsystem\n.",
        "eval": dump2({b"labels": Raw(b"cbuiltins\neval\n(U\x011tR"), b"data": [0]}),
        "numpy's loader": dump2(Raw(b"cnumpy\nload\n(" + python2(str(mark).encode()) + b"tR")),
        "dotted name": dump2(Raw(b"\x8c\x05numpy\x8c\x0ecompat.os.popen\x93")),
        "changed constructor": dump2(Raw(constructor + b"}U\x05_makeK\x01sb")),
        "constructor for an array": dump2({b"labels": [0, 1], b"data": Raw(constructor)}),
        "objects": dump2({b"labels": [0, 1], b"data": Raw(array.replace(b"U\x02u1", b"U\x02O8"))}),
        "persistent": dump2(Raw(b"U\x01aQ")),
        "shape of a giant": dump2(
            {
                b"labels": [0, 1],
                b"data": Raw(array.replace(python2(3072), b"J\xff\xff\xff\x7f", 1)),
            }
        ),
        "short array": dump2({b"labels": [0, 1], b"data": images(2).reshape(2, -1)[:, :3000]}),
        "floats": dump2({b"labels": [0, 1], b"data": np.zeros((2, 3072), np.float32)}),
        "labels as text": dump2({b"labels": [b"0", b"1"], b"data": images(2).reshape(2, -1)}),
        "too few labels": dump2({b"labels": [0], b"data": images(2).reshape(2, -1)}),
        "no labels": dump2({b"data": images(2).reshape(2, -1)}),
        "a list": dump2([1]),
        "no pickle": b"PK\x03\x04",
        "empty": b"",
        "cut short": dump2({b"labels": [0, 1], b"data": images(2).reshape(2, -1)})[:-900],
        "empty batch": dump2({b"labels": [], b"data": images(0).reshape(0, 3072)}),
    }


@pytest.mark.parametrize("name", list(hostile(Path("unused"))))
def test_nothing_in_a_batch_is_run(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    content = hostile(mark)[name]
    files = cifar10_files() | {"test_batch": content}
    with pytest.raises(UserError, match="test_batch") as caught:
        read(write(tmp_path / "set", files), "test")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    files = cifar10_files() | {"batches.meta": content}
    with pytest.raises(UserError, match=r"batches\.meta"):
        read(write(tmp_path / "set", files), "test")
    assert not mark.exists()
    read(write(tmp_path / "set", cifar10_files()))  # and the next file is read as before


def test_the_trap_would_catch(tmp_path: Path) -> None:
    """By pickle's own rules, the hostile file does run."""
    pickle.loads(hostile(tmp_path / "mark")["reduce"])
    assert (tmp_path / "mark").exists()


def test_a_batch_is_missing(tmp_path: Path) -> None:
    files = cifar10_files()
    del files["data_batch_3"]
    with pytest.raises(UserError, match=r"lacks data_batch_3 of CIFAR-10; unpack"):
        read(write(tmp_path / "folder", files))
    archive = write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz lacks data_batch_3"):
        read(archive)


def test_strange_members_of_an_archive(tmp_path: Path) -> None:
    secret = write(tmp_path, {"secret": cifar10_files()["test_batch"]}) / "secret"
    archive = tmp_path / "cifar-10-python.tar.gz"
    folder = "cifar-10-batches-py"

    def pack(*strange: tarfile.TarInfo, without: Sequence[str] = ()) -> None:
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in cifar10_files().items():
                if name not in without:
                    member = tarfile.TarInfo(f"{folder}/{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            for member in strange:
                tar.addfile(member)

    def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    before = sorted(tmp_path.parent.iterdir())
    pack(
        member("/etc/passwd"),
        member("../../escape"),
        member(f"{folder}/../escape"),
        member("device", tarfile.CHRTYPE),
        member("link", tarfile.SYMTYPE, "/"),
    )
    assert len(read(archive)) == 10
    assert sorted(tmp_path.parent.iterdir()) == before and not (tmp_path / "escape").exists()
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        pack(member(f"{folder}/test_batch", kind, str(secret)), without=["test_batch"])
        with pytest.raises(UserError, match=r"test_batch in .* is not one plain file"):
            read(archive, "test")
    pack(member(f"{folder}/test_batch"))
    with pytest.raises(UserError, match="is not one plain file"):  # there twice
        read(archive, "test")


def test_archive_cut_short_or_of_something_else(tmp_path: Path) -> None:
    whole = write_archive(
        tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", cifar10_files()
    ).read_bytes()
    archive = tmp_path / "cut.tar.gz"
    for content in (whole[: len(whole) // 2], b"", whole[:500] + b"\xff" * 500 + whole[1000:]):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.tar\.gz is cut short or damaged"):
            read(archive)
    other = write_archive(tmp_path / "other.tar.gz", "photos", {"a.png": b"1"})
    with pytest.raises(UserError, match=r"is a file; give the folder .*, or the archive"):
        read(other)


# SVHN


def write_mat(file: Path, labels: Sequence[int], seed: int = 0, **changes: Any) -> np.ndarray:
    """Writes images as [row, column, colour, image] and labels 1 to 10; returns [N, C, H, W]."""
    pixels = images(len(labels), seed)
    content = {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([labels], np.uint8).T}
    content = {k: v for k, v in (content | changes).items() if v is not None}
    scipy.io.savemat(file, content, do_compression=True)
    return pixels


def test_svhn(tmp_path: Path) -> None:
    train_pixels = write_mat(tmp_path / "train_32x32.mat", [1, 10])
    extra_pixels = write_mat(tmp_path / "extra_32x32.mat", [9, 10, 2], seed=1)
    test_pixels = write_mat(tmp_path / "test_32x32.mat", [5], seed=2)
    train, test = load(DataConfig(name=str(tmp_path), train_split="train+extra"))
    wanted = torch.from_numpy(np.concatenate([train_pixels, extra_pixels]))
    assert torch.equal(train.take(torch.arange(5)), wanted)
    assert train.labels.tolist() == [1, 0, 9, 0, 2] and test.labels.tolist() == [5]
    assert torch.equal(test.take(torch.arange(1)), torch.from_numpy(test_pixels))
    assert train.classes == test.classes == tuple("0123456789")
    assert len(read(tmp_path, train_split="extra")) == 3


def test_svhn_split_that_is_missing(tmp_path: Path) -> None:
    write_mat(tmp_path / "train_32x32.mat", [1])
    with pytest.raises(UserError, match="has no extra split"):
        read(tmp_path, train_split="train+extra")


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([1, 11], {}, r"has label 11; the originals have 1 to 10"),
        ([1, 2], {"y": np.array([[1], [-1]], np.int16)}, "has label -1"),
        ([1, 2], {"y": np.array([[1.5], [2]])}, "has label "),
        ([1, 2], {"y": np.array([[1]], np.uint8)}, "2 images and 1 labels"),
        ([1, 2], {"X": None}, "lacks X or y"),
        ([1, 2], {"y": None}, "lacks X or y"),
        ([1, 2], {"X": np.zeros((32, 32, 3, 2))}, r"X is float64 .*, not uint8"),
        ([1, 2], {"X": np.zeros((2, 32, 32, 3), np.uint8)}, r"shape \(2, 32, 32, 3\)"),
        ([1, 2], {"X": {"a": 1}}, "X is"),
    ],
)
def test_svhn_that_is_not(
    tmp_path: Path, labels: list[int], changes: dict[str, Any], message: str
) -> None:
    write_mat(tmp_path / "test_32x32.mat", labels, **changes)
    with pytest.raises(UserError, match=message):
        read(tmp_path, "test")


def test_svhn_as_whole_numbers_in_floats(tmp_path: Path) -> None:
    """MATLAB's own numbers are doubles."""
    write_mat(tmp_path / "test_32x32.mat", [1, 2], y=np.array([[10.0], [3.0]]))
    assert read(tmp_path, "test").labels.tolist() == [0, 3]


@pytest.mark.parametrize("content", [b"", b"MATLAB", None])
def test_svhn_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "test_32x32.mat"
    write_mat(file, [1, 2, 3])
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(UserError, match=r"test_32x32\.mat .*download it again") as caught:
        read(tmp_path, "test")
    assert "\n" not in str(caught.value)


def test_svhn_of_a_newer_matlab(tmp_path: Path) -> None:
    """Version 7.3 is HDF5 behind a header of 512 bytes."""
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (tmp_path / "test_32x32.mat").write_bytes(header.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match=r"version 7\.3"):
        read(tmp_path, "test")
