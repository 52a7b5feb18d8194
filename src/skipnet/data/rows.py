"""One split before anything of it is decoded: encoded images, labels as stored, names of places."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from skipnet.data.decode import Encoded
from skipnet.errors import UserError


class EncodedImages(Protocol):
    """Encoded images, read one after the other or by row; never all in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Encoded: ...

    def __iter__(self) -> Iterator[Encoded]: ...


@dataclass(frozen=True)
class Rows:
    """One split, not yet decoded.

    Attributes:
        encoded: The images, in order.
        labels: As stored: integers, strings or None.
        classes: Names of the classes if the source has a list of them.
        where: Names the place of a row, for messages.
    """

    encoded: EncodedImages
    labels: list[Any]
    classes: tuple[str, ...] | None
    where: Callable[[int], str]


class Files:
    """Image files by their paths, held as one array: worker processes share it without a copy.

    Args:
        files: The paths, at least one.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._paths = np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int, /) -> Path:
        return Path(os.fsdecode(bytes(self._paths[row])))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[row] for row in range(len(self)))


def join(parts: Sequence[Rows], names: Sequence[str]) -> Rows:
    """Puts splits behind each other.

    Args:
        parts: The splits, at least one.
        names: What they are called, for messages.

    Raises:
        UserError: The splits have other classes.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part, name in zip(parts, names, strict=True):
        if part.classes != first.classes:
            raise UserError(
                f"{names[0]} and {name} have other classes ({len(first.classes or ())} and "
                f"{len(part.classes or ())}); join splits of the same classes"
            )
    ends = list(accumulate(len(part.labels) for part in parts))

    def place(row: int) -> tuple[Rows, int]:
        index = bisect_right(ends, row)
        return parts[index], row - (ends[index - 1] if index else 0)

    def where(row: int) -> str:
        part, own = place(row)
        return part.where(own)

    labels = list(chain.from_iterable(part.labels for part in parts))
    return Rows(_Joined(parts, place), labels, first.classes, where)


@dataclass(frozen=True)
class _Joined:
    """The images of several splits, one behind the other."""

    parts: Sequence[Rows]
    place: Callable[[int], tuple[Rows, int]]

    def __len__(self) -> int:
        return sum(len(part.labels) for part in self.parts)

    def __getitem__(self, row: int, /) -> Encoded:
        part, own = self.place(row)
        return part.encoded[own]

    def __iter__(self) -> Iterator[Encoded]:
        return chain.from_iterable(part.encoded for part in self.parts)
