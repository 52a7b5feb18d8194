"""Streamed sets: the batches of a set in memory, however many processes decode them."""

import io
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from skipnet.data.augment import normalize
from skipnet.data.crops import centre_crop, random_resized_crop
from skipnet.data.images import ImageSet, StreamedSet
from skipnet.data.loaders import TrainLoader, eval_batches
from skipnet.data.rows import Rows
from skipnet.data.sources import DataConfig, load, load_split, normalization
from skipnet.data.streaming import Plan, stream
from skipnet.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SIZES = [(20, 14), (14, 14), (17, 31)]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def png(height: int, width: int, seed: int, channels: int = 3) -> bytes:
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def rows_of(encoded: Sequence[Any]) -> Rows:
    names = tuple(map(str, range(len(encoded))))
    return Rows(list(encoded), list(range(len(encoded))), names, lambda row: f"row {row}")


def streamed(encoded: Sequence[Any], **options: Any) -> StreamedSet:
    """A set whose labels are its rows."""
    rows = rows_of(encoded)
    settings = {"shape": (3, 8, 8), "image_size": 8, "workers": 0} | options
    return StreamedSet(rows, torch.arange(len(encoded)), rows.classes, **settings)


def some(num: int = 12, **options: Any) -> StreamedSet:
    return streamed([png(*SIZES[i % 3], seed=i) for i in range(num)], **options)


def in_memory(images: StreamedSet) -> ImageSet:
    return ImageSet(images.take(torch.arange(len(images))), images.labels, images.classes)


def loader(images: ImageSet | StreamedSet, **options: Any) -> TrainLoader:
    defaults = {"batch_size": 4, "seed": 3, "padding": 2, "flip": True, "mean": MEAN, "std": STD}
    return TrainLoader(images, **(defaults | options))


def assert_same(one: Any, other: Any) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_training_batches_are_those_of_a_set_in_memory(workers: int) -> None:
    images = some(workers=workers)
    train, reference = loader(images), loader(in_memory(images))
    assert train.steps_per_epoch == reference.steps_per_epoch == 3
    for step in (0, 1, 2, 3, 4, 9, 10, 2):
        assert_same(train.batch(step), reference.batch(step))
    train.close()
    assert_same(train.batch(3), reference.batch(3))
    train.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_random_resized_batches_do_not_depend_on_the_workers(workers: int) -> None:
    reference = loader(some(random_resized=True))
    train = loader(some(random_resized=True, workers=workers))
    wanted = [reference.batch(step) for step in range(5)]
    for step in range(5):
        assert_same(train.batch(step), wanted[step])
    train.close()
    resumed = loader(some(random_resized=True, workers=workers))
    for step in (3, 4):
        assert_same(resumed.batch(step), wanted[step])
    resumed.close()


@pytest.mark.parametrize("random_resized", [False, True])
def test_processes_together_see_what_one_sees(random_resized: bool) -> None:
    images = some(random_resized=random_resized)
    ranks = [loader(images, rank=rank, world_size=2) for rank in range(2)]
    for step in (0, 4):
        parts = [rank.batch(step) for rank in ranks]
        together = [torch.cat([part[index] for part in parts]) for index in range(2)]
        assert_same(together, loader(images).batch(step))


def test_random_resized_crops_are_torchvision_s() -> None:
    """The crop of a seed is what RandomResizedCrop draws from torch's generator with that seed."""
    image = Image.open(io.BytesIO(png(40, 30, seed=0)))
    torch.manual_seed(11)
    wanted = v2.RandomResizedCrop(8)(image)
    assert random_resized_crop(8, 11)(image) == wanted
    assert random_resized_crop(8, 12)(image) != wanted
    centre = v2.CenterCrop(8)(v2.Resize(10)(image))
    assert centre_crop(10, 8)(image) == centre


def test_each_image_and_step_has_a_crop_of_its_own() -> None:
    images = streamed([png(40, 40, seed=0)] * 8, random_resized=True)
    train = loader(images, flip=False)
    crops = torch.cat([train.batch(step)[0] for step in range(4)])
    assert len(torch.unique(crops.flatten(1), dim=0)) == 16
    assert len({seed for step in range(4) for seed in train._plan(step).seeds or ()}) == 16


def test_the_global_generators_are_not_touched() -> None:
    for workers in (0, 1):
        train = loader(some(random_resized=True, workers=workers))
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        train.batch(0)
        list(eval_batches(train.images, batch_size=5, mean=MEAN, std=STD))
        assert torch.equal(before, torch.get_rng_state())
        assert (np.random.get_state()[1] == numpy_before).all()
        train.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_batches_are_those_of_a_set_in_memory(workers: int, world_size: int) -> None:
    images = some(11, workers=workers)
    for rank in range(world_size):
        options: dict[str, Any] = {"batch_size": 3, "mean": MEAN, "std": STD}
        options |= {"rank": rank, "world_size": world_size}
        batches = list(eval_batches(images, **options))
        wanted = list(eval_batches(in_memory(images), **options))
        assert len(batches) == len(wanted) > 0
        for one, other in zip(batches, wanted, strict=True):
            assert_same(one, other)


def test_evaluation_that_is_left_early_ends_its_workers() -> None:
    batches = eval_batches(some(workers=2), batch_size=3, mean=MEAN, std=STD)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches


# Bad images


def with_bad(*bad: int, **options: Any) -> StreamedSet:
    encoded: list[Any] = [png(*SIZES[i % 3], seed=i) for i in range(12)]
    for row in bad:
        encoded[row] = b"no image"
    return streamed(encoded, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_in_one_line(workers: int) -> None:
    images = with_bad(5, workers=workers)
    message = r"^row 5: the image cannot be read \(not in an image format .*on_bad_image"
    with pytest.raises(UserError, match=message):
        list(eval_batches(images, batch_size=4, mean=MEAN, std=STD))
    train = loader(images)
    with pytest.raises(UserError, match=message):
        for step in range(3):
            train.batch(step)
    with pytest.raises(UserError, match=message):
        images.take(torch.tensor([4, 5]))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_in_training_the_next_one_takes_its_place(workers: int) -> None:
    images = with_bad(5, 6, 11, on_bad_image="skip", workers=workers)
    train = loader(images, padding=0, flip=False, batch_size=12)
    with pytest.warns(UserWarning, match=r"left out row (5|6|11): the image cannot") as caught:
        batches = [train.batch(step) for step in range(3)]
    assert len(caught) == 3  # once an image, not once an epoch
    good = with_bad().take(torch.arange(12))
    for step, (pixels, labels) in enumerate(batches):
        order = train._rows(step).tolist()
        taken = [{5: 7, 6: 7, 11: 0}.get(row, row) for row in order]
        assert labels.tolist() == taken
        assert torch.equal(pixels, normalize(good[taken], MEAN, STD))
    train.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_in_evaluation_it_is_left_out(workers: int) -> None:
    images = with_bad(4, 5, 6, 7, 9, on_bad_image="skip", workers=workers)
    with pytest.warns(UserWarning, match="left out row") as caught:
        batches = list(eval_batches(images, batch_size=4, mean=MEAN, std=STD))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2, 3], [8, 10, 11]]
    assert [len(pixels) for pixels, _ in batches] == [4, 3]
    assert len(caught) == 5 and "further ones are left out silently" in str(caught[4].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(eval_batches(images, batch_size=4, mean=MEAN, std=STD))) == 2


def test_taken_without_those_that_cannot_be_read() -> None:
    images = with_bad(2, on_bad_image="skip")
    assert torch.equal(images.take(torch.tensor([2, 3])), images.take(torch.tensor([3])))


def test_none_can_be_read() -> None:
    images = with_bad(*range(12), on_bad_image="skip")
    with pytest.raises(UserError, match="none of 2 images can be read; the first is row 7"):
        images.take(torch.tensor([7, 8]))
    with pytest.raises(UserError, match="none of the 12 images can be read"):
        loader(images).batch(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_go_with_the_others_stops_always(workers: int) -> None:
    options: dict[str, Any] = {"image_size": None, "on_bad_image": "skip", "workers": workers}
    other_size = streamed([png(8, 8, 0), png(8, 9, 1)], **options)
    with pytest.raises(UserError, match=r"row 1: the image is 8×9, .* 8×8 pixels; set image_size"):
        list(eval_batches(other_size, batch_size=2, mean=MEAN, std=STD))
    colour = streamed([png(8, 8, 0, channels=1), png(8, 8, 1)], shape=(1, 8, 8), **options)
    with pytest.raises(UserError, match="row 1: the image is in colour, the first one is grey"):
        list(eval_batches(colour, batch_size=2, mean=MEAN[:1], std=STD[:1]))


def test_a_grey_image_among_colour_ones() -> None:
    images = streamed([png(8, 8, 0), png(8, 8, 1, channels=1)])
    grey = images.take(torch.tensor([1]))
    assert grey.shape == (1, 3, 8, 8) and torch.equal(grey[:, 0], grey[:, 2])


# Processes


class Slow:
    """An image that takes a while, so that its worker is there when something happens to it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int, /) -> bytes:
        time.sleep(0.2)
        return png(8, 8, row)

    def __iter__(self) -> Iterator[bytes]:
        return iter([])


def slow(workers: int) -> StreamedSet:
    rows = Rows(Slow(), [0] * 4, ("a",), str)
    return StreamedSet(rows, torch.zeros(4, dtype=torch.int64), ("a",), (3, 8, 8), workers=workers)


PLANS = [Plan([row], None, replace_bad=False) for row in (0, 1, 2, 3)] * 3


def test_a_worker_that_is_killed_is_told_in_one_line() -> None:
    batches = stream(slow(1), PLANS)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"has died, perhaps .*try fewer data\.workers") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_workers_are_no_part_of_the_terminal_s_group() -> None:
    batches = stream(slow(2), PLANS)
    next(batches)
    workers = multiprocessing.active_children()
    groups = {os.getpgid(worker.pid) for worker in workers if worker.pid}
    assert groups == {worker.pid for worker in workers} and os.getpgid(0) not in groups
    for worker in workers:
        status = (Path("/proc") / str(worker.pid) / "status").read_text()
        (blocked,) = [line for line in status.splitlines() if line.startswith("SigBlk")]
        assert int(blocked.split()[1], 16) & (1 << (signal.SIGTERM - 1)) == 0
    batches.close()  # type: ignore[attr-defined]


def test_signals_are_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    list(stream(slow(1), PLANS[:2]))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


# Configuration


def write_folder(folder: Path, num: int = 6, size: int | None = None) -> None:
    for split, seed in (("train", 0), ("val", 50)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(num):
                height, width = (size, size) if size else SIZES[i % 3]
                content = png(height, width, seed + i)
                (folder / split / label / f"{i}.png").write_bytes(content)


def config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(name=str(folder), **({"workers": 0} | options))


def test_small_sets_are_kept_in_memory_and_large_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, size=8)
    train, test = load(config(tmp_path))
    assert isinstance(train, ImageSet) and isinstance(test, ImageSet)
    monkeypatch.setattr("skipnet.data.sources.LARGEST_IN_MEMORY", 12 * 3 * 8 * 8 - 1)
    large = load(config(tmp_path))
    assert all(isinstance(images, StreamedSet) for images in large)
    for one, other in zip(large, (train, test), strict=True):
        assert torch.equal(one.take(torch.arange(12)), other.images)
        assert torch.equal(one.labels, other.labels) and one.shape == other.shape == (3, 8, 8)
    monkeypatch.setattr("skipnet.data.sources.LARGEST_IN_MEMORY", 12 * 3 * 8 * 8)
    assert isinstance(load(config(tmp_path))[0], ImageSet)
    assert isinstance(load(config(tmp_path, stream="always"))[0], StreamedSet)
    monkeypatch.setattr("skipnet.data.sources.LARGEST_IN_MEMORY", 0)
    assert isinstance(load(config(tmp_path, stream="never"))[0], ImageSet)


def test_the_size_of_imagenet_is_streamed_and_that_of_svhn_is_not() -> None:
    from skipnet.data.sources import LARGEST_IN_MEMORY

    assert 604_388 * 3 * 32 * 32 < LARGEST_IN_MEMORY < 50_000 * 3 * 224 * 224


def test_random_resized_streams_and_evaluates_the_centre(tmp_path: Path) -> None:
    write_folder(tmp_path)
    options: dict[str, Any] = {"crop": "random-resized", "image_size": 8, "resize": 10}
    train, test = load(config(tmp_path, test_split="validation", **options))
    assert isinstance(train, StreamedSet) and train.random_resized
    assert train.shape == test.shape == (3, 8, 8)
    file = tmp_path / "val" / "cat" / "0.png"
    centre = v2.Compose([v2.Resize(10), v2.CenterCrop(8), v2.PILToTensor()])(Image.open(file))
    assert torch.equal(test.take(torch.tensor([0]))[0], centre)
    kept = load_split(config(tmp_path, image_size=8, resize=10, test_split="val"), "test")
    assert isinstance(kept, ImageSet) and torch.equal(kept.images[0], centre)


def test_normalization_of_a_streamed_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, size=8)
    whole, _ = load(config(tmp_path))
    large, _ = load(config(tmp_path, stream="always"))
    assert normalization(config(tmp_path), large) == normalization(config(tmp_path), whole)
    monkeypatch.setattr("skipnet.data.sources.STREAMED_SAMPLE", 4)
    four = ImageSet(whole.take(torch.tensor([0, 3, 7, 11])), whole.labels[:4], whole.classes)
    assert normalization(config(tmp_path), large) == normalization(config(tmp_path), four)


def test_first_image_bad(tmp_path: Path) -> None:
    write_folder(tmp_path, size=8)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png: the image cannot be read"):
        load(config(tmp_path, stream="always"))
    train, _ = load(config(tmp_path, stream="always", on_bad_image="skip"))
    assert train.shape == (3, 8, 8) and len(train) == 12


def test_workers_are_a_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, size=8)
    for cores, processes, expected in [(1, 1, 0), (8, 1, 7), (64, 1, 16), (64, 8, 7), (4, 8, 0)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        train, _ = load(config(tmp_path, stream="always", workers=None))
        assert isinstance(train, StreamedSet) and train.workers == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": "sometimes"}, "stream is 'sometimes'; set it to one of auto, always, never"),
        ({"crop": "centre"}, "crop is 'centre'"),
        ({"workers": -1}, "workers is -1"),
        ({"resize": 8}, "resize is 8, image_size None"),
        ({"resize": 8, "image_size": 9}, "resize is 8, image_size 9"),
        ({"crop": "random-resized"}, "needs an image_size"),
        ({"crop": "random-resized", "image_size": 8, "stream": "never"}, "needs streamed images"),
    ],
)
def test_invalid_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**options)
