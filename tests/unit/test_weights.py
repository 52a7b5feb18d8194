"""Model files: what is written comes back, and what is not ours is refused and never run."""

import errno
import io
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import skipnet
from skipnet import ModelInfo, SkipNet, UserError
from skipnet.models import Architecture
from skipnet.models.weights import FORMAT_VERSION, read_tensors, write_tensors

ARCHITECTURE = Architecture(name="cifar_resnet20", gate="rnn", num_classes=3, in_channels=1)
INFO = ModelInfo(
    architecture=ARCHITECTURE,
    classes=("null", "eins", "zwölf"),
    mean=(0.1,),
    std=(0.3,),
    image_size=(8, 12),
    results={"accuracy": 0.75, "keep_rates": [0.5, 1.0]},
)


@pytest.fixture(scope="module")
def network() -> SkipNet:
    torch.manual_seed(0)
    return ARCHITECTURE.build()


@pytest.fixture
def path(network: SkipNet, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    skipnet.save(network, path, INFO)
    return path


def test_everything_comes_back(network: SkipNet, path: Path) -> None:
    loaded, info = skipnet.load(path)
    assert info == INFO
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


def test_a_path_may_be_a_string(path: Path) -> None:
    assert skipnet.load(str(path))[1] == INFO


def test_the_file_is_plain_safetensors_with_json(network: SkipNet, path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == set(network.state_dict())
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["skipnet"])
    assert metadata == INFO.to_dict()
    assert metadata["format_version"] == FORMAT_VERSION == 1
    assert metadata["architecture"] == {
        "name": "cifar_resnet20",
        "gate": "rnn",
        "num_classes": 3,
        "in_channels": 1,
    }


def test_memory_format_and_device_views_do_not_matter(network: SkipNet, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    other = ARCHITECTURE.build()
    other.load_state_dict(network.state_dict())
    skipnet.save(other.to(memory_format=torch.channels_last), path, INFO)
    loaded = skipnet.load(path)[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def assert_refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        skipnet.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.safetensors", "no model file")
    assert_refused(tmp_path, "is a folder: name the model file")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 500, 0.5, 0.999])
def test_truncated_file(path: Path, size: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: size if size in range(501) else int(size * len(data))])
    assert_refused(path, "truncated")


def test_file_with_something_appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    assert_refused(path, "truncated or not a safetensors file")


@pytest.mark.parametrize("offset", [0, 7, 8, 30])
def test_corrupt_header(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
    assert_refused(path, "truncated or not a safetensors file")


EXECUTED: list[str] = []


def explode(word: str) -> None:
    EXECUTED.append(word)


class Bomb:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return explode, ("boom",)


@pytest.mark.parametrize("kind", ["pickle", "torch", "legacy torch"])
def test_pickles_are_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, buffer = tmp_path / "model.safetensors", io.BytesIO()
    if kind == "pickle":
        pickle.dump(Bomb(), buffer)
        pickle.loads(buffer.getvalue())
        assert EXECUTED == ["boom"]
    else:
        torch.save(Bomb(), buffer, _use_new_zipfile_serialization=kind == "torch")
    EXECUTED.clear()
    path.write_bytes(buffer.getvalue())
    assert_refused(path, "not a safetensors file")
    assert EXECUTED == []


def write(path: Path, tensors: dict[str, Tensor], metadata: Any) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    safetensors.torch.save_file(tensors, path, {"skipnet": text})


def test_a_safetensors_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}, {"skipnet": "{"}):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata)
        assert_refused(path, "not written by skipnet")


@pytest.mark.parametrize("metadata", ["[]", "1", "null", '"text"'])
def test_metadata_that_is_no_object(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"weight": torch.zeros(2)}, metadata)
    assert_refused(path, "metadata")


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_format_version(tmp_path: Path, network: SkipNet, version: object) -> None:
    path = tmp_path / "model.safetensors"
    write(path, network.state_dict(), INFO.to_dict() | {"format_version": version})
    assert_refused(path, f"format version {version}; this skipnet reads 1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in sorted(set(INFO.to_dict()) - {"format_version"})
        for value in ("missing", None, 3)
        if key != "results" or value == "missing"  # What results hold is free.
    ],
)
def test_metadata_of_the_wrong_form(
    tmp_path: Path, network: SkipNet, key: str, value: object
) -> None:
    path = tmp_path / "model.safetensors"
    metadata = INFO.to_dict() | {key: value}
    if value == "missing":
        del metadata[key]
    write(path, network.state_dict(), metadata)
    assert_refused(path, "metadata")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ["cifar_resnet20"]},
        {"gate": ["rnn"]},
        {"num_classes": "3"},
        {"num_classes": 2.5},
        {"in_channels": None},
        {"depth": 20},
    ],
    ids=str,
)
def test_architecture_of_the_wrong_form(
    tmp_path: Path, network: SkipNet, change: dict[str, object]
) -> None:
    path = tmp_path / "model.safetensors"
    architecture = INFO.to_dict()["architecture"] | change
    write(path, network.state_dict(), INFO.to_dict() | {"architecture": architecture})
    with pytest.raises(UserError):
        skipnet.load(path)


@pytest.mark.parametrize("change", [{"name": "cifar_resnet21"}, {"gate": "lstm"}], ids=str)
def test_architecture_that_this_version_does_not_know(
    tmp_path: Path, network: SkipNet, change: dict[str, str]
) -> None:
    path = tmp_path / "model.safetensors"
    architecture = INFO.to_dict()["architecture"] | change
    write(path, network.state_dict(), INFO.to_dict() | {"architecture": architecture})
    with pytest.raises(UserError, match="did you mean"):
        skipnet.load(path)


def test_misfit_weights_are_named(tmp_path: Path, network: SkipNet) -> None:
    path = tmp_path / "model.safetensors"
    good = network.state_dict()
    without = {name: value for name, value in good.items() if name != "head.2.bias"}
    for tensors, message in [
        (without, r"head\.2\.bias is missing"),
        (good | {"extra": torch.zeros(1)}, "extra is left over"),
        (good | {"head.2.bias": torch.zeros(5)}, r"head\.2\.bias is \[5\] instead of \[3\]"),
        (without | {"extra": torch.zeros(1)}, r"head\.2\.bias is missing; extra is left over$"),
        ({"extra": torch.zeros(1)}, rf"and {len(good) + 1 - 3} more$"),
    ]:
        write_tensors(path, tensors, INFO.to_dict())
        assert_refused(path, message)


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
def test_a_failing_write_leaves_the_previous_file(
    path: Path, network: SkipNet, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.open" if function == "open" else f"os.{function}", fail)
    with pytest.raises(UserError, match=r"No space left.*previous file is untouched"):
        skipnet.save(network, path, INFO)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_first_write_that_fails_leaves_nothing(
    network: SkipNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="Input/output error") as caught:
        skipnet.save(network, tmp_path / "model.safetensors", INFO)
    assert "previous" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(network: SkipNet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        skipnet.save(network, tmp_path / "no" / "model.safetensors", INFO)


def test_a_file_too_large_for_the_system_leaves_the_previous_one(tmp_path: Path) -> None:
    """For real: the system refuses to write more than 64 KiB to a file."""
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"weight": torch.ones(4)}, {"which": "first"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(UserError, match="File too large; the previous file is untouched"):
            write_tensors(path, {"weight": torch.ones(100_000)}, {"which": "second"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tensors, metadata = read_tensors(path)
    assert tensors["weight"].tolist() == [1, 1, 1, 1] and metadata == {"which": "first"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_file_is_on_the_disk_before_it_takes_its_place(
    network: SkipNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "model.safetensors", []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noting_replace(source: Path, target: Path) -> None:
        calls.append(("replace", os.path.getsize(source)))
        replace(source, target)

    monkeypatch.setattr("os.fsync", noting_fsync)
    monkeypatch.setattr("os.replace", noting_replace)
    skipnet.save(network, path, INFO)
    size = path.stat().st_size
    assert calls[:2] == [("fsync", size), ("replace", size)]


def test_a_file_of_the_first_version() -> None:
    """Written on 2026-11-23 and kept: whatever the format becomes, such files stay loadable."""
    network, info = skipnet.load(Path(__file__).parent / "files" / "first_version.safetensors")
    assert info == ModelInfo(
        architecture=Architecture(name="cifar_resnet20", gate="rnn", num_classes=10),
        classes=tuple("abcdefghij"),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        image_size=(32, 32),
        results={"accuracy": 91.0, "macs_fraction": 0.5},
    )
    for index, (_, value) in enumerate(sorted(network.state_dict().items())):
        wanted = (index + 1) / 1000 if value.is_floating_point() else index
        assert torch.equal(value, torch.full_like(value, wanted))
