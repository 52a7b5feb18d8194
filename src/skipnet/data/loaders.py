"""Batches as pure functions of (seed, step), so that a resumed run sees what it would have seen."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from skipnet.data.augment import flip, normalize, pad_crop, random_flips, random_offsets
from skipnet.data.sources import ImageSet
from skipnet.errors import UserError
from skipnet.seeding import AUGMENTATION, ORDER, sub_seed


class TrainLoader:
    """Shuffled, augmented, normalised training batches of any step.

    Nothing is carried from one call to the next: `batch(step)` depends on the arguments of the
    constructor and on `step` alone. With several processes, each takes its rows of what one
    process alone would see.

    Args:
        images: The training set, on the device that is to do the augmentation.
        batch_size: Images a step, over all processes together.
        seed: Seed of order and augmentation, 0 or more.
        padding: Pixels of zero padding before the random crop; 0 for no crop.
        flip: Whether to mirror half of the images, at random.
        mean: C means, for pixels in 0 … 1.
        std: C standard deviations, for pixels in 0 … 1.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        UserError: The batch size is larger than the training set or not divisible by `world_size`,
            or the seed is negative.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        seed: int,
        padding: int,
        flip: bool,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; set it to 1 or more")
        if batch_size > len(images):
            raise UserError(
                f"the training set has {len(images)} images, less than one batch of {batch_size}; "
                f"set batch_size to {len(images)} or less"
            )
        if batch_size % world_size:
            raise UserError(
                f"batch_size {batch_size} cannot be split evenly over {world_size} processes; set "
                f"it to a multiple of {world_size}"
            )
        if seed < 0:
            raise UserError(f"seed is {seed}; set it to 0 or more")
        assert 0 <= rank < world_size
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.padding = padding
        self.flip = flip
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.steps_per_epoch = len(images) // batch_size
        share = batch_size // world_size
        self._shard = slice(rank * share, (rank + 1) * share)
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of the batch of a step.

        Args:
            step: 0 or more, counted over all epochs. An epoch shows each image at most once; the
                len(images) % batch_size images left over are others in each epoch.

        Returns:
            float32 [b, C, H, W] and int64 [b] on the device of the images, with b = batch_size /
            world_size.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        rows = self._permutation(epoch)[start : start + self.batch_size][self._shard]
        pixels = self.images.images.index_select(0, rows)  # on the CPU, images[rows] is far slower
        # Drawn for the batch of all processes, so that their number does not change what is seen.
        generator = torch.Generator().manual_seed(sub_seed(self.seed, AUGMENTATION, step))
        if self.padding:
            offsets = random_offsets(self.batch_size, self.padding, generator)
            pixels = pad_crop(pixels, offsets[self._shard], self.padding)
        if self.flip:
            pixels = flip(pixels, random_flips(self.batch_size, generator)[self._shard])
        return normalize(pixels, self.mean, self.std), self.images.labels[rows]

    def _permutation(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, int64 [N] on their device; the last one is kept."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(sub_seed(self.seed, ORDER, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            self._order = epoch, order.to(self.images.labels.device)
        return self._order[1]


def eval_batches(
    images: ImageSet,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches in order, without augmentation.

    Args:
        images: The set to evaluate on.
        batch_size: Images a batch of this process; the last batch may have fewer.
        mean: C means, for pixels in 0 … 1.
        std: C standard deviations, for pixels in 0 … 1.
        rank: Index of this process, which takes the rows rank, rank + world_size, …
        world_size: Number of processes.

    Yields:
        float32 [b, C, H, W] and int64 [b] on the device of the images.

    Raises:
        UserError: The batch size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; set it to 1 or more")
    pixels, labels = images.images[rank::world_size], images.labels[rank::world_size]
    for start in range(0, len(labels), batch_size):
        rows = slice(start, start + batch_size)
        yield normalize(pixels[rows], mean, std), labels[rows]
