"""Decoding: image modes, sizes, and images that cannot be read."""

import io
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from skipnet.data import decode
from skipnet.data.decode import Encoded, decode_images, to_pixels
from skipnet.errors import UserError

RAMP = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(
    *items: Encoded,
    channels: int | None = None,
    image_size: int | None = None,
    on_bad_image: Literal["stop", "skip"] = "stop",
) -> np.ndarray:
    return decode_images(
        items,
        len(items),
        channels=channels,
        image_size=image_size,
        on_bad_image=on_bad_image,
        where=lambda row: f"row {row}",
    )[0]


def test_grey_and_colour() -> None:
    grey, colour = encoded(Image.fromarray(RAMP)), encoded(Image.fromarray(COLOUR))
    np.testing.assert_array_equal(decoded(grey), RAMP[None, None])
    np.testing.assert_array_equal(decoded(grey, channels=3), np.stack([RAMP] * 3)[None])
    np.testing.assert_array_equal(decoded(colour), COLOUR.transpose(2, 0, 1)[None])
    luma = COLOUR @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decoded(colour, channels=1)[0, 0], luma, atol=1)


def test_palette() -> None:
    palette = Image.fromarray(RAMP // 64)
    palette = palette.convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], dtype=np.uint8)
    for kind in ("PNG", "GIF"):
        wanted = colours[RAMP // 64].transpose(2, 0, 1)
        np.testing.assert_array_equal(decoded(encoded(palette, kind))[0], wanted)
    transparent = encoded(palette, transparency=0)
    colours[0] = 255
    wanted = colours[RAMP // 64].transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded(transparent)[0], wanted)


def test_transparency_is_laid_over_white() -> None:
    alpha = np.where(RAMP < 128, 0, 255).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([COLOUR, alpha]))
    wanted = np.where(alpha[..., None] == 0, 255, COLOUR)
    np.testing.assert_array_equal(decoded(encoded(rgba))[0], wanted.transpose(2, 0, 1))
    grey_alpha = rgba.convert("LA")
    pixels = decoded(encoded(grey_alpha))
    assert pixels.shape == (1, 1, 8, 8) and (pixels[0, 0][alpha == 0] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(encoded(deep, kind)), RAMP[None, None])
    np.testing.assert_array_equal(decoded(encoded(deep, kind), channels=3)[0, 2], RAMP)


def test_black_and_white() -> None:
    bits = encoded(Image.fromarray(RAMP > 100))
    np.testing.assert_array_equal(decoded(bits)[0, 0], np.where(RAMP > 100, 255, 0))


def test_cmyk() -> None:
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = decoded(encoded(flat, "JPEG", quality=95))
    np.testing.assert_allclose(pixels[0, :, 4, 4], [255, 0, 0], atol=3)


def test_stored_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90° clockwise
    turned = encoded(Image.fromarray(RAMP), exif=exif)
    np.testing.assert_array_equal(decoded(turned)[0, 0], np.rot90(RAMP, -1))


def test_image_size_resizes_the_shorter_side_and_crops_the_centre() -> None:
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    pixels = decoded(encoded(Image.fromarray(wide)), image_size=8)
    np.testing.assert_array_equal(pixels, np.full((1, 1, 8, 8), 200))
    assert to_pixels(Image.fromarray(wide), 3, 4).shape == (3, 4, 4)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_bad(mode: str) -> None:
    image = Image.new(mode, (8, 8), 70_000)
    with pytest.raises(UserError, match=r"row 0: the image cannot be read .*pixels"):
        decoded(encoded(image, "TIFF"))


def test_decompression_bomb_is_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (encoded(Image.new("L", (size, size))) for size in (8, 12))
    for limit in (100, 50):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"row 1: the image cannot be read \(.*bomb"):
            decoded(encoded(Image.new("L", (6, 6))), large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match="left out 1 of 2 .*: row 1"):
        assert decoded(small, large, on_bad_image="skip").shape == (1, 1, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
def test_truncated_image_is_bad(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    with pytest.raises(UserError, match="row 0: the image cannot be read"):
        decoded(content[: len(content) // 2])


def test_missing_file_is_bad(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        decoded(tmp_path / "none.png")


def test_none_can_be_read() -> None:
    with pytest.raises(UserError, match="none of the 2 images can be read; the first is row 0"):
        decoded(b"", None, on_bad_image="skip")


def test_many_bad_images_make_one_short_warning() -> None:
    good = encoded(Image.fromarray(RAMP))
    with pytest.warns(UserWarning, match="row 5; …$") as caught:
        decoded(good, *[b""] * 20, on_bad_image="skip")
    assert len(caught) == 1


def test_progress_appears_only_on_a_terminal_and_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = encoded(Image.fromarray(RAMP))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    decoded(good, good)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(decode, "PROGRESS_AFTER_SECONDS", -1)
    monkeypatch.setenv("TERM", "xterm")
    decoded(good, good)
    out, err = capsys.readouterr()
    assert out == "" and "decoding images" in err
