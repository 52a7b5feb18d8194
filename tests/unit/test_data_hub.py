"""The hub, by a stand-in for its client that fails as the client does; there is no network here."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.errors as hub_errors
import numpy as np
import pytest
import torch
from PIL import Image

from skipnet.data.sources import DataConfig, load, load_split
from skipnet.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


def table(rows: slice) -> datasets.Dataset:
    encoded = []
    for image in PIXELS[rows]:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        encoded.append({"bytes": stream.getvalue(), "path": None})
    names = ["cat", "dog", "emu"]
    return datasets.Dataset.from_dict(
        {"image": encoded, "label": [0, 1, 2, 0][rows]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        ),
    )


class Builder:
    """What load_dataset_builder returns."""

    def __init__(self, folder: Path, fail: Exception | None = None) -> None:
        self.cache_dir = str(folder / "someone___animals" / "default" / "0.0.0")
        self.info = datasets.DatasetInfo(download_size=170_500_000, dataset_size=66_000_000)
        self.fail = fail

    def download_and_prepare(self) -> None:
        if self.fail is not None:
            raise self.fail
        Path(self.cache_dir).mkdir(parents=True, exist_ok=True)

    def as_dataset(self, split: str) -> datasets.Dataset:
        splits = {"train": slice(0, 2), "extra": slice(2, 3), "valid": slice(3, 4)}
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
        return table(splits[split])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts a builder, or an error, in place of the client; returns what it was asked for."""

    def install(outcome: Exception | Builder | None = None) -> list[Any]:
        asked: list[Any] = []

        def load_dataset_builder(name: str, subset: str | None) -> Builder:
            asked.append((name, subset))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome or Builder(tmp_path)

        monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
        return asked

    return install


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error of the client as an answer of the server makes it."""
    library = hub_errors.HTTPError.__module__.split(".")[0]
    httpx = __import__(library)
    request = httpx.Request("GET", "https://huggingface.co/datasets/a/b")
    return kind("Cannot access\nthe files", response=httpx.Response(status, request=request))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_splits_and_subset(hub: Callable[..., list[Any]]) -> None:
    asked = hub()
    config = DataConfig(
        name="someone/animals", subset="cropped", train_split="train+extra", test_split="valid"
    )
    train, test = load(config)
    assert set(asked) == {("someone/animals", "cropped")}
    wanted = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert torch.equal(train.take(torch.arange(3)), wanted[:3])
    assert torch.equal(test.take(torch.arange(1)), wanted[3:])
    assert train.labels.tolist() == [0, 1, 2] and train.classes == ("cat", "dog", "emu")


def test_download_says_how_large_it_is_and_only_once(
    hub: Callable[..., list[Any]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub()
    config = DataConfig(name="someone/animals")
    load_split(config, "train")
    assert capfd.readouterr() == (
        "",
        f"downloading someone/animals to {tmp_path / 'someone___animals' / 'default'}: 0.2 GB to "
        "download, 66.0 MB on the disk besides; if it is interrupted, the same command goes on "
        "with it\n",
    )
    load_split(config, "train")
    assert capfd.readouterr() == ("", "")


def test_only_one_process_of_a_machine_says_it(
    hub: Callable[..., list[Any]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub()
    monkeypatch.setenv("LOCAL_RANK", "1")
    load_split(DataConfig(name="someone/animals"), "train")
    assert capfd.readouterr() == ("", "")


NOT_FOUND = datasets.exceptions.DatasetNotFoundError
GENERATION = datasets.exceptions.DatasetGenerationError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NOT_FOUND("Dataset 'a/b' doesn't exist on the Hub"), "there is no data set a/b .*login"),
        (http_error(hub_errors.RepositoryNotFoundError, 404), "there is no data set a/b"),
        (NOT_FOUND("Dataset 'a/b' is a gated dataset on the Hub."), "terms .*`hf auth login`"),
        (http_error(hub_errors.GatedRepoError, 401), "terms on https://hug.*datasets/a/b"),
        (
            caused(NOT_FOUND("cannot be accessed"), http_error(hub_errors.GatedRepoError, 403)),
            "a/b needs a login",
        ),
        (ConnectionError("Couldn't reach\nthe hub"), "cannot reach .* local folder"),
        (hub_errors.OfflineModeIsEnabled("offline"), "cannot reach"),
        (hub_errors.HFValidationError("Repo id must be"), "correct the name"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['cropped_digits']"),
            r"a/b needs a subset \(.*cropped_digits.*\); set subset",
        ),
        (RuntimeError("something\nelse"), r"cannot load train of a/b .*RuntimeError: something el"),
    ],
)
def test_opening_fails(hub: Callable[..., list[Any]], error: Exception, message: str) -> None:
    hub(error)
    with pytest.raises(UserError, match=message) as caught:
        load(DataConfig(name="a/b"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("Consistency check failed: file should be of size 9 but has size 5"),
            "the download of a/b was cut short .*same command again",
        ),
        (
            caused(GENERATION("An error occurred"), hub_errors.XetDownloadError("Xet")),
            "cut short",
        ),
        (datasets.exceptions.NonMatchingSplitsSizesError("[{}]"), "cut short"),
        (datasets.exceptions.NonMatchingChecksumError("sha"), "cut short"),
        (
            caused(GENERATION("An error"), OSError(28, "No space left on device")),
            "not enough disk space for a/b .*HF_HOME",
        ),
        (OSError("Not enough disk space. Needed: 160 GB"), "not enough disk space"),
        (
            caused(GENERATION("An error occurred"), http_error(hub_errors.GatedRepoError, 403)),
            "needs a login",
        ),
    ],
)
def test_download_fails(
    hub: Callable[..., list[Any]], tmp_path: Path, error: Exception, message: str
) -> None:
    hub(Builder(tmp_path, fail=error))
    with pytest.raises(UserError, match=message) as caught:
        load(DataConfig(name="a/b"))
    assert "\n" not in str(caught.value)


def test_unknown_split(hub: Callable[..., list[Any]]) -> None:
    hub()
    with pytest.raises(UserError, match=r"a/b has no split test \(.*valid.*\); correct"):
        load_split(DataConfig(name="a/b"), "test")


def test_the_real_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the installed version of the client fails, and not as we think that it does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot reach the Hugging Face hub for test of a/b"):
        load_split(DataConfig(name="a/b"), "test")
