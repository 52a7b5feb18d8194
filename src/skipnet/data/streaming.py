"""Batches decoded by worker processes, in the order in which they will be asked for.

What a batch holds is decided before it is handed to a worker, so it does not depend on which of
them decodes it, how many there are, or when the run began.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from skipnet.data.decode import SHOWN_BAD_IMAGES, bad_image, reason
from skipnet.data.images import StreamedSet
from skipnet.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Plan(NamedTuple):
    """What a batch is to hold.

    Attributes:
        rows: Rows of the set.
        seeds: Of each row's random-resized crop; None crops as for testing.
        replace_bad: Whether the next row takes the place of one that cannot be read, so that the
            batch is full; otherwise it is left out.
    """

    rows: list[int]
    seeds: list[int] | None
    replace_bad: bool


class Decoded(NamedTuple):
    """What a worker made of a plan.

    Attributes:
        pixels: uint8 [b, C, H, W].
        labels: int64 [b].
        bad: Rows that cannot be read, and why.
        error: The message of a mistake that ends the run, or None.
    """

    pixels: Tensor
    labels: Tensor
    bad: list[tuple[int, str]]
    error: str | None


class Ahead:
    """Training batches by step, decoded ahead of the step that is asked for.

    Steps in order are quick; any other step is decoded anew.

    Args:
        images: The set.
        plan: The plan of each step, a pure function.
    """

    def __init__(self, images: StreamedSet, plan: Callable[[int], Plan]) -> None:
        self.images = images
        self._plan = plan
        self._next: int | None = None
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: uint8 [b, C, H, W] and int64 [b] on the set's device.

        Raises:
            UserError: An image cannot be read, or does not go with the others.
        """
        if self._batches is None or step != self._next:
            self.close()
            self._batches = stream(self.images, _PlansFrom(self._plan, step))
        self._next = None  # Until the batch is here: it may fail, or be interrupted.
        batch = next(self._batches)
        self._next = step + 1
        return batch

    def close(self) -> None:
        """Ends the worker processes; a later batch starts new ones."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
            self._batches = None


def stream(images: StreamedSet, plans: Iterable[Plan]) -> Iterator[tuple[Tensor, Tensor]]:
    """Decodes planned batches in order, ahead of their use; closing it ends the workers.

    Args:
        images: The set.
        plans: What each batch is to hold.

    Yields:
        uint8 [b, C, H, W] and int64 [b] on the set's device.

    Raises:
        UserError: An image cannot be read (unless such images are skipped) or does not go with the
            others, or a worker was killed, for instance for want of memory.
    """
    with warnings.catch_warnings(), _signals_held():
        # It advises against more workers than cores; their number is the user's.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(
            DataLoader(
                _Decoder(images),
                sampler=plans,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=images.workers,
                worker_init_fn=_stand_apart if images.workers else None,
                # The set is shared, not copied; and nothing is imported again.
                multiprocessing_context="fork" if images.workers else None,
                pin_memory=images.device.type == "cuda",
                generator=torch.Generator(),  # Its own, or it would draw from everybody's.
            )
        )
    try:
        while (decoded := _next(batches)) is not None:
            if decoded.error is not None:
                raise UserError(decoded.error)
            _report(images, decoded.bad)
            yield (
                decoded.pixels.to(images.device, non_blocking=True),
                decoded.labels.to(images.device, non_blocking=True),
            )
    finally:
        del batches  # Its end is the workers' end.


def _next(batches: Iterator[Decoded]) -> Decoded | None:
    """The next batch, None at the end; the death of a worker becomes a UserError."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reported = " ".join(str(error).split())[:200]
    # Outside of the except clause, or the error would keep the other workers alive.
    raise UserError(
        f"a process that decodes images has died, perhaps for want of memory ({reported}); try "
        "fewer data.workers, or 0"
    )


class _PlansFrom:
    """The plans of a step and all that follow it."""

    def __init__(self, plan: Callable[[int], Plan], step: int) -> None:
        self._plan = plan
        self._step = step

    def __iter__(self) -> Iterator[Plan]:
        step = self._step
        while True:
            yield self._plan(step)
            step += 1


class _Decoder(Dataset[Decoded]):
    """What runs in a worker. Mistakes are returned, not raised: they are told in one line."""

    def __init__(self, images: StreamedSet) -> None:
        self.images = images

    def __getitem__(self, plan: Plan) -> Decoded:
        images = self.images
        pixels: list[np.ndarray] = []
        kept: list[int] = []
        bad: list[tuple[int, str]] = []
        seeds: Sequence[int | None] = plan.seeds or [None] * len(plan.rows)
        for row, seed in zip(plan.rows, seeds, strict=True):
            for _ in range(len(images) if plan.replace_bad else 1):
                try:
                    pixels.append(images.decode(row, seed))
                except UserError as error:
                    return _failed(str(error))
                except Exception as error:  # Pillow's plugins raise nearly every type
                    why = reason(error)
                    if images.on_bad_image == "stop":
                        return _failed(str(bad_image(images.rows.where(row), why)))
                    bad.append((row, why))
                    row = (row + 1) % len(images)
                else:
                    kept.append(row)
                    break
            else:
                if plan.replace_bad:
                    return _failed(f"none of the {len(images)} images can be read")
        shape = (len(kept), *images.shape)
        stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
        return Decoded(torch.from_numpy(stacked), images.labels[kept], bad, None)


def _failed(message: str) -> Decoded:
    nothing = torch.empty(0, dtype=torch.uint8)
    return Decoded(nothing, nothing, [], message)


def _report(images: StreamedSet, bad: list[tuple[int, str]]) -> None:
    """Warns of each image that cannot be read, the first time it is met; of many, of some."""
    for row, why in bad:
        if row in images.reported:
            continue
        images.reported.add(row)
        if len(images.reported) <= SHOWN_BAD_IMAGES:
            last = len(images.reported) == SHOWN_BAD_IMAGES
            warnings.warn(
                f"left out {images.rows.where(row)}: the image cannot be read ({why})"
                + ("; further ones are left out silently" if last else ""),
                stacklevel=3,
            )


def _as_it_is(decoded: Any) -> Any:
    return decoded


def _stand_apart(_: int) -> None:
    """Take a worker out of the group of processes that the terminal sends its Ctrl-C to.

    Only the process that started it ends it, or the end of that process does.
    """
    os.setpgid(0, 0)
    while signal.sigtimedwait(_SIGNALS, 0) is not None:
        pass  # Sent to all of the group before this one had left it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep signals for later while workers start, which inherit this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
