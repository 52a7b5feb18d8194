"""Loaders: every row once an epoch, pure in (seed, step), the same for any number of processes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipnet.data.loaders import TrainLoader, eval_batches
from skipnet.data.sources import ImageSet
from skipnet.errors import UserError
from skipnet.seeding import sub_seed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def numbered(num_images: int, size: int = 6) -> ImageSet:
    """Random images whose label is their row."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, size, size), generator=generator).byte()
    return ImageSet(images, torch.arange(num_images), tuple(map(str, range(num_images))))


def loader(images: ImageSet, **options: Any) -> TrainLoader:
    defaults = {"batch_size": 8, "seed": 0, "padding": 2, "flip": True, "mean": MEAN, "std": STD}
    return TrainLoader(images, **(defaults | options))


@settings(max_examples=25, deadline=None)
@given(num_images=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**40))
def test_an_epoch_shows_each_row_at_most_once(
    num_images: int, data: st.DataObject, seed: int
) -> None:
    batch_size = data.draw(st.integers(1, num_images))
    train = loader(numbered(num_images), batch_size=batch_size, seed=seed)
    assert train.steps_per_epoch == num_images // batch_size
    for epoch in range(2):
        first = epoch * train.steps_per_epoch
        labels = [train.batch(first + i)[1] for i in range(train.steps_per_epoch)]
        seen = torch.cat(labels).tolist()
        assert len(set(seen)) == len(seen) == train.steps_per_epoch * batch_size


def test_epochs_differ_in_order_and_in_what_is_left_over() -> None:
    train = loader(numbered(20))
    epochs = [torch.cat([train.batch(2 * e)[1], train.batch(2 * e + 1)[1]]) for e in range(30)]
    assert not torch.equal(epochs[0], epochs[1])
    assert len(set(torch.cat(epochs).tolist())) == 20


def test_without_augmentation_images_are_only_normalised() -> None:
    images = numbered(20)
    pixels, labels = loader(images, padding=0, flip=False).batch(3)
    assert pixels.dtype == torch.float32 and labels.dtype == torch.int64
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(pixels, (images.images[labels] / 255 - mean) / std)


def test_each_augmentation_is_used() -> None:
    images = numbered(20)
    plain, flipped, cropped, both = (
        loader(images, padding=padding, flip=flip).batch(0)[0]
        for padding, flip in [(0, False), (0, True), (2, False), (2, True)]
    )
    either = (flipped == plain) | (flipped == plain.flip(3))
    assert either.all() and not torch.equal(flipped, plain)
    assert not torch.equal(cropped, plain) and not torch.equal(both, cropped)


def test_a_step_is_the_same_in_a_new_loader_and_in_any_order() -> None:
    images = numbered(30)
    train = loader(images, seed=5)
    batches = [train.batch(step) for step in range(7)]
    for step in (6, 0, 3, 3):
        for old, new in zip(batches[step], loader(images, seed=5).batch(step), strict=True):
            assert torch.equal(old, new)
        assert torch.equal(batches[step][0], train.batch(step)[0])


def test_the_global_generator_is_not_touched() -> None:
    state = torch.get_rng_state()
    loader(numbered(20)).batch(0)
    assert torch.equal(state, torch.get_rng_state())


def test_seed_and_step_matter() -> None:
    images = numbered(64)
    labels = [loader(images, seed=seed).batch(step)[1] for seed in (0, 1) for step in (0, 8)]
    assert len({tuple(label.tolist()) for label in labels}) == 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_see_what_one_sees(world_size: int) -> None:
    images = numbered(30)
    ranks = [loader(images, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 4):
        pixels, labels = loader(images).batch(step)
        parts = [rank.batch(step) for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), pixels)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 21}, "has 20 images, less than one batch of 21"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world_size": 3}, "batch_size 8 cannot be split evenly over 3 processes"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_invalid_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader(numbered(20), **options)


@settings(max_examples=25, deadline=None)
@given(num_images=st.integers(1, 20), batch_size=st.integers(1, 25), world_size=st.integers(1, 4))
def test_evaluation_shows_each_row_once(num_images: int, batch_size: int, world_size: int) -> None:
    images = numbered(num_images)
    seen: list[int] = []
    for rank in range(world_size):
        labels: list[int] = []
        for pixels, batch_labels in eval_batches(
            images, batch_size=batch_size, mean=MEAN, std=STD, rank=rank, world_size=world_size
        ):
            assert pixels.shape == (len(batch_labels), 3, 6, 6) and len(batch_labels) <= batch_size
            labels += batch_labels.tolist()
        assert labels == sorted(labels)
        seen += labels
    assert sorted(seen) == list(range(num_images))


def test_evaluation_normalises_and_needs_a_batch() -> None:
    images = numbered(5)
    batches = list(eval_batches(images, batch_size=3, mean=MEAN, std=STD))
    assert [len(labels) for _, labels in batches] == [3, 2]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixels = torch.cat([pixels for pixels, _ in batches])
    torch.testing.assert_close(pixels, (images.images / 255 - mean) / std)
    with pytest.raises(UserError, match="batch_size is 0"):
        next(eval_batches(images, batch_size=0, mean=MEAN, std=STD))


def test_sub_seeds_are_distinct_and_fixed() -> None:
    seeds = [sub_seed(seed, tag, i) for seed in range(4) for tag in (0, 1) for i in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert sub_seed(3, 1, 2) == int(np.random.SeedSequence((3, 1, 2)).generate_state(1, "u8")[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_never_wait_for_the_gpu() -> None:
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(64, dtype=torch.int64)
    loader = TrainLoader(
        ImageSet(images, labels, ("one",)).to("cuda"),
        batch_size=8,
        seed=0,
        padding=2,
        flip=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    loader.batch(0)  # The order of an epoch is copied once.
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 8):
            loader.batch(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
