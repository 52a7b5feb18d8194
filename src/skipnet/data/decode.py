"""Encoded images (JPEG, PNG …) to uint8 pixels, and what happens to those that cannot be read."""

import io
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from skipnet.errors import UserError

Encoded = bytes | Path | np.ndarray | None
"""An encoded image, the file that holds it, uint8 pixels [C, H, W] that need no decoding, or None
where the data set has nothing."""

Crop = Callable[[Image.Image], Image.Image]
"""What gives an image, grey or RGB, the size it is wanted in; see `skipnet.data.crops`."""

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PROGRESS_AFTER_SECONDS = 2.0
SHOWN_BAD_IMAGES = 5


def image_files(folder: Path) -> list[Path]:
    """Image files anywhere below a folder, by their suffix, in order; hidden ones are left out."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def to_pixels(
    image: Image.Image, channels: int | None, image_size: int | None, crop: Crop | None = None
) -> np.ndarray:
    """Converts an opened image of any mode to 8-bit grey or RGB.

    16-bit grey is scaled to 8 bits (not clipped), transparency is laid over white, and an
    orientation stored in the file is applied.

    Args:
        image: The opened image.
        channels: 1 for grey, 3 for RGB, None for what the image itself is.
        image_size: Resize the shorter side to this many pixels and crop the centre; None keeps the
            size.
        crop: Does it in another way, if given.

    Returns:
        uint8 [C, H, W] with C 1 or 3.

    Raises:
        ValueError: The pixels are floats or beyond 16 bits: their range is unknown.
    """
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"pixels beyond 16 bits (mode {image.mode})")
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    if channels is None:
        channels = 1 if image.mode in ("1", "L") else 3
    wanted = "L" if channels == 1 else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    if crop is not None:
        image = crop(image)
    elif image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def decode_images(
    encoded: Iterable[Encoded],
    num_images: int,
    *,
    channels: int | None,
    image_size: int | None,
    crop: Crop | None = None,
    on_bad_image: Literal["stop", "skip"],
    where: Callable[[int], str],
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole split into one array.

    One thread: on 32×32 JPEGs a pool is slower, as most of the time is spent under the GIL.

    Args:
        encoded: The images in order; read once.
        num_images: How many there are.
        channels: 1, 3, or None for what the first image has.
        image_size: See `to_pixels`; None demands that all have the size of the first.
        crop: See `to_pixels`.
        on_bad_image: "stop" raises at the first image that cannot be read, "skip" leaves such
            images out with one warning.
        where: Names the place of a row for messages ("row 17 of train.parquet").

    Returns:
        uint8 [M, C, H, W] of the images that could be read, and their rows, int64 [M].

    Raises:
        UserError: An image cannot be read (with "stop"), none can, or sizes or channels differ.
    """
    pixels: np.ndarray | None = None
    kept = np.ones(num_images, dtype=bool)
    with pillow_warnings(), _progress(num_images) as advance:
        for row, item in enumerate(encoded):
            advance()
            try:
                decoded = decode(item, channels, image_size, crop)
            except Exception as error:  # Pillow's plugins raise nearly every type on broken files
                if on_bad_image == "stop":
                    raise bad_image(where(row), reason(error)) from error
                kept[row] = False
                continue
            if pixels is None:
                pixels = np.empty((num_images, *decoded.shape), dtype=np.uint8)
            if decoded.shape != pixels.shape[1:]:
                demand_shape(decoded, pixels.shape[1:], where(row))
            pixels[row] = decoded  # a grey image among RGB ones spreads over the three channels
    if pixels is None:
        raise UserError(f"none of the {num_images} images can be read; the first is {where(0)}")
    rows = np.flatnonzero(kept)
    if len(rows) < num_images:
        bad = np.flatnonzero(~kept)
        names = "; ".join(where(int(row)) for row in bad[:SHOWN_BAD_IMAGES])
        more = "; …" if len(bad) > SHOWN_BAD_IMAGES else ""
        warnings.warn(
            f"left out {len(bad)} of {num_images} images that cannot be read: {names}{more}",
            stacklevel=2,
        )
        pixels = pixels[rows]
    return pixels, rows


def decode(
    item: Encoded, channels: int | None, image_size: int | None, crop: Crop | None
) -> np.ndarray:
    """Opens and converts one image, see `to_pixels`; raises whatever Pillow does."""
    if item is None:
        raise ValueError("the row holds no image")
    if isinstance(item, np.ndarray):
        fits = image_size is None or item.shape[1:] == (image_size, image_size)
        if crop is None and fits and channels in (None, len(item)):
            return item
        pixels = item[0] if len(item) == 1 else item.transpose(1, 2, 0)
        return to_pixels(Image.fromarray(pixels), channels, image_size, crop)
    with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
        return to_pixels(image, channels, image_size, crop)


def demand_shape(decoded: np.ndarray, shape: tuple[int, ...], place: str) -> None:
    """Checks that a decoded image, [C, H, W], goes with those before it; grey goes with RGB.

    Raises:
        UserError: It has another size, or is in colour where they are grey.
    """
    if decoded.shape[1:] != shape[1:]:
        (height, width), (old_height, old_width) = decoded.shape[1:], shape[1:]
        raise UserError(
            f"{place}: the image is {height}×{width}, those before it are "
            f"{old_height}×{old_width} pixels; set image_size to resize all to one size"
        )
    if len(decoded) > shape[0]:
        raise UserError(
            f"{place}: the image is in colour, the first one is grey; set channels to 1 or 3"
        )


def bad_image(place: str, why: str) -> UserError:
    """The error for an image that cannot be read."""
    return UserError(
        f"{place}: the image cannot be read ({why}); mend or remove it, or set on_bad_image to "
        '"skip"'
    )


def reason(error: Exception) -> str:
    """An error of Pillow's in one line, without the memory address it puts into it."""
    if isinstance(error, UnidentifiedImageError):
        return "not in an image format that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def pillow_warnings() -> Iterator[None]:
    """Makes a suspected decompression bomb a bad image, and Pillow's remarks on metadata silent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr once the work has taken a while, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("decoding images", total=total)
    shown_from = time.monotonic() + PROGRESS_AFTER_SECONDS

    def advance() -> None:
        bar.advance(task)
        if not bar.live.is_started and time.monotonic() > shown_from:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
