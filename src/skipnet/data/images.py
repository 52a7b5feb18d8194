"""Sets of labelled images: in memory, or decoded when they are asked for."""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from skipnet.data.decode import (
    Crop,
    Encoded,
    bad_image,
    decode,
    demand_shape,
    pillow_warnings,
    reason,
)
from skipnet.data.rows import Rows
from skipnet.errors import UserError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled set of images in memory.

    Attributes:
        images: uint8 [N, C, H, W] with N above 0.
        labels: int64 [N], each in 0 … len(classes) − 1.
        classes: Names of the classes.

    Raises:
        UserError: There are no images, or a label is outside the classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises UserError as the class says."""
        assert self.images.dtype == torch.uint8 and self.images.ndim == 4
        assert self.labels.dtype == torch.int64 and self.labels.shape == self.images.shape[:1]
        if len(self) == 0:
            raise UserError("the set has no images; give at least one")
        outside = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero()
        if len(outside):
            row = int(outside[0])
            raise UserError(
                f"row {row} has label {int(self.labels[row])}, outside the {len(self.classes)} "
                f"classes (0 to {len(self.classes) - 1}); correct it or remove the row"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the images are, and batches come to be."""
        return self.images.device

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same set with its tensors on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, rows: Tensor) -> Tensor:
        """The images of some rows, uint8 [n, C, H, W] on their device."""
        return self.images.index_select(0, rows.to(self.device))


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """A labelled set of images that are decoded when they are asked for, by worker processes.

    Attributes:
        rows: The encoded images.
        labels: int64 [N] on the CPU, each in 0 … len(classes) − 1.
        classes: Names of the classes.
        shape: Channels, height and width of every image once it is decoded.
        channels: 1 or 3 as configured, None for what each image is.
        image_size: As configured; see `decode.to_pixels`.
        resize: Pixels of the shorter side before the centre is cropped; None is image_size.
        random_resized: Whether training takes a random-resized crop.
        on_bad_image: "stop" at an image that cannot be read, or "skip" it.
        workers: Processes that decode; 0 decodes in this one.
        device: Where batches go to.
    """

    rows: Rows
    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    channels: int | None = None
    image_size: int | None = None
    resize: int | None = None
    random_resized: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # Rows that a warning has named; shared by copies of the set.
    reported: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "StreamedSet":
        """The same set, whose batches go to a device."""
        return replace(self, device=torch.device(device))

    def take(self, rows: Tensor) -> Tensor:
        """Decodes the images of some rows, as for testing: uint8 [n, C, H, W] on their device.

        Raises:
            UserError: One cannot be read, or has another size. With on_bad_image "skip", those that
                cannot be read are left out, unless none can.
        """
        decoded = []
        for row in rows.tolist():
            try:
                decoded.append(self.decode(row))
            except UserError:
                raise
            except Exception as error:  # Pillow's plugins raise nearly every type on broken files
                if self.on_bad_image == "stop":
                    raise bad_image(self.rows.where(row), reason(error)) from error
        if not decoded:
            raise UserError(
                f"none of {len(rows)} images can be read; the first is "
                f"{self.rows.where(int(rows[0]))}"
            )
        return torch.from_numpy(np.stack(decoded)).to(self.device)

    def decode(self, row: int, seed: int | None = None) -> np.ndarray:
        """Decodes one image.

        Args:
            row: Which.
            seed: Of the random-resized crop; None crops as for testing.

        Returns:
            uint8 [C, H, W], as `shape` says.

        Raises:
            UserError: The image can be read, and has another size or more channels.
            Exception: Whatever Pillow raises on an image that cannot be read.
        """
        item: Encoded = self.rows.encoded[row]
        with pillow_warnings():
            pixels = decode(item, self.channels, self.image_size, self._crop(seed))
        if pixels.shape != self.shape:
            demand_shape(pixels, self.shape, self.rows.where(row))
            pixels = np.broadcast_to(pixels, self.shape)
        return pixels

    def _crop(self, seed: int | None) -> Crop | None:
        from skipnet.data.crops import centre_crop, random_resized_crop

        if seed is not None:
            assert self.image_size is not None
            return random_resized_crop(self.image_size, seed)
        if self.resize is not None:
            assert self.image_size is not None
            return centre_crop(self.resize, self.image_size)
        return None


Images = ImageSet | StreamedSet
"""Either kind of set."""
