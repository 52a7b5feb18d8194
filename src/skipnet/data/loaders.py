"""Batches as pure functions of (seed, step), so that a resumed run sees what it would have seen."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from skipnet.data.augment import flip, normalize, pad_crop, random_flips, random_offsets
from skipnet.data.images import Images, ImageSet, StreamedSet
from skipnet.data.streaming import Ahead, Plan, stream
from skipnet.errors import UserError
from skipnet.seeding import AUGMENTATION, CROP, ORDER, sub_seed


class TrainLoader:
    """Shuffled, augmented, normalised training batches of any step.

    Nothing is carried from one call to the next: `batch(step)` depends on the arguments of the
    constructor and on `step` alone. With several processes, each takes its rows of what one
    process alone would see. A streamed set is decoded ahead by worker processes; it gives the
    batches that the same set in memory gives, unless it takes random-resized crops.

    Args:
        images: The training set, on the device that is to do the augmentation.
        batch_size: Images a step, over all processes together.
        seed: Seed of order and augmentation, 0 or more.
        padding: Pixels of zero padding before the random crop; 0 for no crop. A set
            that takes random-resized crops is not padded.
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
        images: Images,
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
        random_resized = isinstance(images, StreamedSet) and images.random_resized
        self.padding = 0 if random_resized else padding
        self.flip = flip
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.steps_per_epoch = len(images) // batch_size
        share = batch_size // world_size
        self._shard = slice(rank * share, (rank + 1) * share)
        self._order: tuple[int, Tensor] | None = None
        self._ahead = Ahead(images, self._plan) if isinstance(images, StreamedSet) else None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of the batch of a step.

        Args:
            step: 0 or more, counted over all epochs. An epoch shows each image at most once; the
                len(images) % batch_size images left over are others in each epoch.

        Returns:
            float32 [b, C, H, W] and int64 [b] on the device of the images, with b = batch_size /
            world_size.
        """
        pixels, labels = self._read(step)
        # Drawn for the batch of all processes, so that their number does not change what is seen.
        generator = torch.Generator().manual_seed(sub_seed(self.seed, AUGMENTATION, step))
        if self.padding:
            offsets = random_offsets(self.batch_size, self.padding, generator)
            pixels = pad_crop(pixels, offsets[self._shard], self.padding)
        if self.flip:
            pixels = flip(pixels, random_flips(self.batch_size, generator)[self._shard])
        return normalize(pixels, self.mean, self.std), labels

    def close(self) -> None:
        """Ends the processes that decode; batches can be asked for all the same."""
        if self._ahead is not None:
            self._ahead.close()

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """The images of a step as they are, and their labels."""
        if self._ahead is not None:
            return self._ahead.take(step)
        assert isinstance(self.images, ImageSet)
        rows = self._rows(step)
        # On the CPU, images[rows] is far slower.
        return self.images.images.index_select(0, rows), self.images.labels[rows]

    def _plan(self, step: int) -> Plan:
        """What a streamed batch is to hold."""
        assert isinstance(self.images, StreamedSet)
        seeds = None
        if self.images.random_resized:
            generator = torch.Generator().manual_seed(sub_seed(self.seed, CROP, step))
            drawn = torch.randint(2**62, (self.batch_size,), generator=generator)
            seeds = drawn[self._shard].tolist()
        return Plan(self._rows(step).tolist(), seeds, replace_bad=True)

    def _rows(self, step: int) -> Tensor:
        """This process's rows of the set at a step, int64 [b] on the device of the labels."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self._permutation(epoch)[start : start + self.batch_size][self._shard]

    def _permutation(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, int64 [N] on their device; the last one is kept."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(sub_seed(self.seed, ORDER, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            self._order = epoch, order.to(self.images.labels.device)
        return self._order[1]


def eval_batches(
    images: Images,
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
        batch_size: Images a batch of this process; the last batch may have fewer, and so may
            batches of a streamed set that leaves images out.
        mean: C means, for pixels in 0 … 1.
        std: C standard deviations, for pixels in 0 … 1.
        rank: Index of this process, which takes the rows rank, rank + world_size, …
        world_size: Number of processes.

    Yields:
        float32 [b, C, H, W] and int64 [b] on the device of the images.

    Raises:
        UserError: The batch size is below 1, or an image of a streamed set cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; set it to 1 or more")
    starts = range(rank, len(images), batch_size * world_size)
    batches = [range(i, len(images), world_size)[:batch_size] for i in starts]
    if isinstance(images, StreamedSet):
        plans = [Plan(list(rows), None, replace_bad=False) for rows in batches]
        for pixels, labels in stream(images, plans):
            if len(labels):
                yield normalize(pixels, mean, std), labels
        return
    for rows in batches:
        part = slice(rows.start, rows.stop, rows.step)
        yield normalize(images.images[part], mean, std), images.labels[part]
