"""Augmentation and normalisation of whole batches, on the device the images are on.

Random draws are apart from what is done with them: `random_offsets` and `random_flips` draw on the
CPU, so that one seed gives the same images on every device, and so that a process that owns part of
a batch can draw for the whole of it and use its own rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_offsets(num_images: int, padding: int, generator: torch.Generator) -> Tensor:
    """Draws where `pad_crop` places its window.

    Args:
        num_images: How many offsets to draw.
        padding: Pixels of padding on each side.
        generator: CPU generator; advanced by the draw.

    Returns:
        int64 [num_images, 2] on the CPU: row and column offset, uniform in 0 … 2·padding.
    """
    return torch.randint(0, 2 * padding + 1, (num_images, 2), generator=generator)


def random_flips(num_images: int, generator: torch.Generator) -> Tensor:
    """Draws which images `flip` mirrors: bool [num_images] on the CPU, each with probability ½."""
    return torch.randint(0, 2, (num_images,), generator=generator).bool()


def pad_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Pads each image with zero pixels and cuts a window of the original size out of it.

    The zeros are put in before normalisation (black, not the mean), as in the SkipNet authors'
    pipeline.

    Args:
        images: uint8 [N, C, H, W].
        offsets: int64 [N, 2] of `random_offsets`, on any device; (padding, padding) is the
            original image.
        padding: Pixels of padding on each side.

    Returns:
        uint8 [N, C, H, W].
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    # A view of every possible window, [N, C, rows, columns, H, W]: indexing copies only those used.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = offsets.to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirrors some images left to right.

    Args:
        images: [N, C, H, W], any type.
        flips: bool [N] of `random_flips`, on any device: which images to mirror.

    Returns:
        [N, C, H, W] of the same type.
    """
    mirrored = flips.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(mirrored, images.flip(3), images)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scales pixels to 0 … 1 and standardises each channel.

    Args:
        images: uint8 [N, C, H, W].
        mean: C means, for pixels in 0 … 1.
        std: C standard deviations, for pixels in 0 … 1.

    Returns:
        float32 [N, C, H, W]: (images / 255 − mean) / std.
    """
    # Asynchronous copies: a plain torch.tensor(…, device=…) would wait for the device each step.
    shift = 255 * torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
    scale = 255 * torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)
    shift, scale = (t.to(images.device, non_blocking=True) for t in (shift, scale))
    return images.float().sub_(shift).div_(scale)
