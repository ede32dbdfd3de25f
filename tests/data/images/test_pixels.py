"""Every kind of pixel as 8 bits as a viewer shows it, or an error; what Pillow only warns of stays quiet."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from image_files import png, tiff
from PIL import Image, ImageOps

from tvmatch.data.images.pixels import decode, what_is_wrong

LEVELS = np.array([0, 1, 128, 255], np.uint8)
SIXTEEN = LEVELS.astype(np.uint16) * 257
COLOURS = np.array([[0, 0, 0], [1, 2, 3], [9, 9, 9], [255, 0, 128]], np.uint8)
RGBA = np.array([[0, 0, 0, 255], [10, 20, 30, 0], [64, 32, 0, 128], [255, 0, 128, 255]], np.uint8)


def big(array: Any) -> bytes:
    return np.asarray(array).astype(">u2").tobytes()


def on_white(rgba: np.ndarray[Any, Any], *, premultiplied: bool = False) -> np.ndarray[Any, Any]:
    colour, alpha = rgba[:, :3].astype(float), rgba[:, 3:] / 255
    return (colour if premultiplied else colour * alpha) + 255 * (1 - alpha)


def grey(*levels: int) -> np.ndarray[Any, Any]:
    return np.repeat(np.array(levels, float)[:, None], 3, 1)


# An encoded row of four pixels, and what is seen of it, (4, 3).
SEEN: dict[str, tuple[bytes, np.ndarray[Any, Any]]] = {
    "16-bit grey": (png(16, 0, 4, big(SIXTEEN)), grey(0, 1, 128, 255)),
    "16-bit grey with a transparent level": (
        png(16, 0, 4, big(SIXTEEN), key=big([128 * 257])),
        grey(0, 1, 255, 255),
    ),
    "black of 16 bits is transparent": (png(16, 0, 4, big(SIXTEEN), key=big([0])), grey(255, 1, 128, 255)),
    "all 16 bits are compared": (png(16, 0, 4, big(SIXTEEN), key=big([128 * 257 + 1])), grey(0, 1, 128, 255)),
    "8-bit grey with a transparent level": (
        png(8, 0, 4, LEVELS.tobytes(), key=big([1])),
        grey(0, 255, 128, 255),
    ),
    "4-bit grey with a transparent level": (png(4, 0, 4, b"\x01\x37", key=big([3])), grey(0, 17, 255, 119)),
    "2-bit grey with a transparent level": (png(2, 0, 4, b"\x1b", key=big([1])), grey(0, 255, 170, 255)),
    "1-bit grey with transparent black": (png(1, 0, 4, b"\xa0", key=big([0])), grey(255, 255, 255, 255)),
    "1-bit grey with transparent white": (png(1, 0, 4, b"\xa0", key=big([1])), grey(255, 0, 255, 0)),
    "a transparent colour": (
        png(8, 2, 4, COLOURS.tobytes(), key=big([1, 2, 3])),
        np.where(np.arange(4)[:, None] == 1, 255, COLOURS),
    ),
    "16-bit grey with alpha": (
        png(16, 4, 4, big([0, 65535, 257, 0, 32896, 32896, 65535, 65535])),
        grey(0, 255, 128 * 128 / 255 + 127, 255),
    ),
    "16-bit colour with alpha": (png(16, 6, 4, big(RGBA.astype(np.uint16) * 257)), on_white(RGBA)),
    "a palette whose colours are transparent by parts": (
        png(8, 3, 4, bytes(range(4)), key=bytes([255, 0, 128])),
        on_white(np.array([[10, 20, 30, 255], [0, 0, 0, 0], [70, 80, 90, 128], [255, 0, 0, 255]])),
    ),
    "a palette of 2 bits": (
        png(2, 3, 4, b"\x1b", key=bytes([0])),
        np.array([[255] * 3, [40, 50, 60], [70, 80, 90], [255, 0, 0]]),
    ),
    "16-bit TIFF": (tiff(4, SIXTEEN.astype("<u2").tobytes(), (16,)), grey(0, 1, 128, 255)),
    "16-bit TIFF with white at 0": (
        tiff(4, SIXTEEN.astype("<u2").tobytes(), (16,), photometric=0),
        grey(255, 254, 127, 0),
    ),
    "8-bit TIFF with white at 0": (tiff(4, LEVELS.tobytes(), (8,), photometric=0), grey(255, 254, 127, 0)),
    "12-bit TIFF": (tiff(4, bytes([0x00, 0x0F, 0xFF, 0x80, 0x80, 0x10]), (12,)), grey(0, 255, 128, 1)),
    "TIFF with alpha": (tiff(4, RGBA.tobytes(), (8,) * 4, photometric=2, extra=2), on_white(RGBA)),
    "TIFF with premultiplied alpha": (
        tiff(4, np.minimum(RGBA, RGBA[:, 3:]).tobytes(), (8,) * 4, photometric=2, extra=1),
        on_white(np.minimum(RGBA, RGBA[:, 3:]), premultiplied=True),
    ),
    "PGM of 16 bits": (b"P5 4 1 65535\n" + big(SIXTEEN), grey(0, 1, 128, 255)),
    "PGM of 10 bits": (b"P5 4 1 1023\n" + big([0, 4, 514, 1023]), grey(0, 1, 128, 255)),
}


@pytest.mark.parametrize("name", SEEN)
def test_pixels_are_those_that_a_viewer_shows(name: str) -> None:
    """To one level where alpha was multiplied and rounded, else exactly."""
    content, expected = SEEN[name]
    seen = decode(content, 1, 4, 3)[:, 0].T
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1 if "alpha" in name or "by parts" in name else 0)
    if (expected == expected[:, :1]).all():  # grey stays what it is
        np.testing.assert_array_equal(decode(content, 1, 4, 1)[0, 0], seen[:, 0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_modes_of_pillow_in_tiff(mode: str) -> None:
    """A grey of each mode comes back as that grey. JPEG inside TIFF for YCbCr, which rounds."""
    level = {"1": 255}.get(mode, 102)
    source = (
        Image.new("LAB", (16, 16), (120, 128, 128))
        if mode == "LAB"
        else Image.new("RGB", (16, 16), (level,) * 3)
    )
    file = io.BytesIO()
    options = {"compression": "jpeg", "quality": 100} if mode == "YCbCr" else {}
    (source if mode == "LAB" else source.convert(mode)).save(file, "TIFF", **options)
    seen = decode(file.getvalue(), 16, 16, 3).astype(int)
    expected = 113 if mode == "LAB" else level  # L* = 100 · 120/255 is this level of sRGB
    assert abs(seen - expected).max() <= (2 if mode in ("YCbCr", "LAB") else 0)


SIGNED = np.array([0, -5, 300, 32767], "<i2").tobytes()
REFUSED: dict[str, bytes] = {
    "32-bit TIFF in the range of 8 bits": tiff(4, LEVELS.astype("<u4").tobytes(), (32,)),
    "32-bit TIFF in the range of 16 bits": tiff(4, SIXTEEN.astype("<u4").tobytes(), (32,)),
    "signed 32-bit TIFF": tiff(4, LEVELS.astype("<i4").tobytes(), (32,), sample=2),
    "signed 16-bit TIFF": tiff(4, SIGNED, (16,), sample=2),
    "signed 8-bit TIFF": tiff(4, np.array([0, -5, 1, 127], "i1").tobytes(), (8,), sample=2),
    "floating-point TIFF": tiff(4, np.array([0, 0.5, 1, 255], "<f4").tobytes(), (32,), sample=3),
    "half-precision TIFF": tiff(4, np.array([0, 0.5, 1, 255], "<f2").tobytes(), (16,), sample=3),
    "PFM": b"Pf\n4 1\n-1.0\n" + np.array([0, 0.5, 1, 2], "<f4").tobytes(),
    "16-bit transparent colour": png(
        16, 2, 4, big(COLOURS.astype(np.uint16) * 257), key=big([257, 514, 771])
    ),
    "nothing": b"",
}


@pytest.mark.parametrize("name", REFUSED)
def test_pixels_without_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(Exception, match=r"not supported|cannot identify") as caught:
        decode(REFUSED[name], 1, 4, 3)
    assert "\n" not in what_is_wrong(caught.value)
    assert "0x" not in what_is_wrong(caught.value)  # no address in memory


def jpeg(exif: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(16 * 8 * 3, dtype=np.uint8).reshape(16, 8, 3)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A] = orientation, "a camera", 72.0
    return tags.tobytes()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_survives_damage_elsewhere_in_the_metadata(orientation: int) -> None:
    """As without damage; ImageOps.exif_transpose raises for this entry."""
    whole = exif(orientation)
    at = whole.index(struct.pack(">H", 0x010F)) + 2
    damaged = whole[:at] + struct.pack(">HL", 5, 1) + whole[at + 6 :]  # text that claims to be a fraction
    size = (8, 16) if orientation < 5 else (16, 8)
    expected = decode(jpeg(whole), size[1], size[0], 3)
    with pytest.raises(AttributeError), Image.open(io.BytesIO(jpeg(damaged))) as file:
        ImageOps.exif_transpose(file)
    np.testing.assert_array_equal(decode(jpeg(damaged), size[1], size[0], 3), expected)
    upright = decode(jpeg(b""), 16, 8, 3)
    turns = {3: upright[:, ::-1, ::-1], 6: np.rot90(upright, -1, (1, 2)), 8: np.rot90(upright, 1, (1, 2))}
    if orientation in turns:
        np.testing.assert_array_equal(expected, turns[orientation])


@pytest.mark.parametrize("length", [7, 10, 20, 30])
def test_metadata_that_cannot_be_read_change_no_pixel(length: int) -> None:
    np.testing.assert_array_equal(decode(jpeg(exif(1)[:length]), 16, 8, 3), decode(jpeg(b""), 16, 8, 3))


def test_many_pixels_are_no_reason_to_warn(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Up to Pillow's limit of twice what it warns of; beyond it the error says how many there are."""
    content = png(8, 0, 4, LEVELS.tobytes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with warnings.catch_warnings(action="error"):  # not even if the user has made warnings errors
        assert decode(content, 1, 4, 1).tolist() == [[[0, 1, 128, 255]]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(Image.DecompressionBombError) as caught:
        decode(content, 1, 4, 1)
    assert what_is_wrong(caught.value).startswith("not a readable image (Image size (4 pixels) exceeds limit")
    assert not recwarn.list
