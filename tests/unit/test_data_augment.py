"""Augmentation against a loop over the images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipnet.data.augment import flip, normalize, pad_crop, random_flips, random_offsets


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()


def crop_one_by_one(images: torch.Tensor, offsets: torch.Tensor, padding: int) -> torch.Tensor:
    num, _, height, width = images.shape
    out = torch.zeros_like(images)
    for n in range(num):
        for y in range(height):
            for x in range(width):
                row = y + int(offsets[n, 0]) - padding
                column = x + int(offsets[n, 1]) - padding
                if 0 <= row < height and 0 <= column < width:
                    out[n, :, y, x] = images[n, :, row, column]
    return out


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    padding=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_pad_crop(
    num: int, channels: int, height: int, width: int, padding: int, seed: int
) -> None:
    images = random_images(num, channels, height, width)
    offsets = random_offsets(num, padding, torch.Generator().manual_seed(seed))
    cropped = pad_crop(images, offsets, padding)
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped, crop_one_by_one(images, offsets, padding))


def test_centre_offset_changes_nothing() -> None:
    images = random_images(3, 3, 8, 8)
    assert torch.equal(pad_crop(images, torch.full((3, 2), 4), 4), images)


def test_offsets_cover_the_whole_range() -> None:
    offsets = random_offsets(2000, 4, torch.Generator().manual_seed(0))
    assert offsets.shape == (2000, 2) and offsets.dtype == torch.int64
    assert sorted(set(offsets.flatten().tolist())) == list(range(9))


def test_flip() -> None:
    images = random_images(6, 3, 4, 5)
    flips = torch.tensor([True, False, True, True, False, False])
    mirrored = flip(images, flips)
    for n in range(6):
        wanted = images[n, :, :, list(range(4, -1, -1))] if flips[n] else images[n]
        assert torch.equal(mirrored[n], wanted)


def test_about_half_is_flipped() -> None:
    flips = random_flips(2000, torch.Generator().manual_seed(0))
    assert flips.dtype == torch.bool and 900 < int(flips.sum()) < 1100


def test_draws_are_those_of_the_generator() -> None:
    draws = [
        (random_offsets(50, 4, generator), random_flips(50, generator))
        for generator in (torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
    ]
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize(channels: int) -> None:
    images = random_images(4, channels, 5, 5)
    before = images.clone()
    mean, std = (0.1, 0.5, 0.9)[:channels], (0.2, 0.3, 0.4)[:channels]
    normalized = normalize(images, mean, std)
    assert normalized.dtype == torch.float32
    for c in range(channels):
        wanted = (images[:, c].double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(normalized[:, c].double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(images, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_does_what_the_cpu_does() -> None:
    images = random_images(64, 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    offsets, flips = random_offsets(64, 4, generator), random_flips(64, generator)
    on_cpu = flip(pad_crop(images, offsets, 4), flips)
    on_gpu = flip(pad_crop(images.cuda(), offsets, 4), flips)
    assert torch.equal(on_gpu.cpu(), on_cpu)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    torch.testing.assert_close(normalize(on_gpu, mean, std).cpu(), normalize(on_cpu, mean, std))
