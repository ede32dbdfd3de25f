"""Decode an image, crop it about its centre and resize it."""

import io
import warnings
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from tvmatch.data.npy import is_npy, pixels_of_npy
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import LFS_POINTER, is_lfs_pointer

Crop = Literal["centre", "dhariwal"]

_MOST_PIXELS = 2**27  # half a gigabyte in memory; about the limit of Pillow itself
# What undoes EXIF's orientations 2 … 8.
_FLIPS = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE)
_TURNS = (Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
_UPRIGHT: dict[object, Transpose] = dict(enumerate(_FLIPS + _TURNS, start=2))


def decode(
    source: bytes | str, height: int, width: int, channels: int, crop: Crop = "centre"
) -> NDArray[np.uint8]:
    """Decode an image to uint8 of shape (channels, height, width).

    Applies the orientation recorded by a camera, composes transparent pixels with white, scales 16-bit grey
    to 8 bits and uses the first frame of an animation. Suppresses Pillow's warnings, which concern no pixels.

    Args:
        source: the encoded bytes (of an image file, or NPY with uint8 pixels), or the path of a file.
        height: of the result, in pixels.
        width: of the result, in pixels.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
        crop: "centre" keeps the largest centred rectangle of these proportions and resizes it by a bicubic
            filter with antialiasing; "dhariwal" is `dhariwal_crop`.

    Raises:
        InputError: the crop is unknown or cannot give this shape, or the source holds latents.
        Exception: of any type that Pillow raises for a file that it cannot read.
    """
    check_crop(crop, height, width)
    with warnings.catch_warnings(action="ignore"):
        image = _open(source)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB" if channels == 3 else "L")
        if crop == "dhariwal":
            image = dhariwal_crop(image, height)
        else:
            # Not `resize(box=…)`, whose filter would reach beyond the box.
            image = image.crop(centre_box(image.width, image.height, width, height))
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def what_is_wrong(error: Exception) -> str:
    """Message for an error of `decode`, or of reading its source."""
    if isinstance(error, UnidentifiedImageError):  # its message is a memory address
        return "not an image, or its start is damaged"
    return f"not a readable image ({one_line(error)})"


def check_crop(crop: str, height: int, width: int) -> None:
    """Refuse an unknown crop, or one that cannot give images of height × width.

    Raises:
        InputError: names the value.
    """
    if crop not in get_args(Crop):
        raise InputError("data.crop", f"must be {' or '.join(get_args(Crop))}, got {crop!r}")
    if crop == "dhariwal" and height != width:
        raise InputError("data.crop", f"dhariwal makes squares only, got a resolution of {height}×{width}")


def dhariwal_crop(image: Image.Image, size: int) -> Image.Image:
    """The usual square crop of ImageNet for generative models (Dhariwal & Nichol, arXiv 2105.05233).

    Halves the image by averaging 2×2 pixels (including an odd last row or column) while the shorter side is
    at least twice `size`, resizes it by a bicubic filter to a shorter side of `size`, and keeps the centre.

    Raises:
        ValueError: the image is so oblong that intermediate results would take gigabytes.
    """
    oblong = max(image.size) / min(image.size)
    if oblong * size**2 > _MOST_PIXELS:
        raise ValueError(f"proportions of {oblong:.0f} to 1 are not supported")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def centre_box(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred rectangle with the proportions to_width : to_height.

    In whole pixels, so that an image that needs no resizing keeps its pixels exactly.
    """
    scale = min(width / to_width, height / to_height)
    inner_width, inner_height = max(round(scale * to_width), 1), max(round(scale * to_height), 1)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _open(source: bytes | str) -> Image.Image:
    """The decoded image, upright, with 8 bits per channel."""
    if isinstance(source, bytes) and is_npy(source):
        return Image.fromarray(pixels_of_npy(source))
    content = io.BytesIO(source) if isinstance(source, bytes) else source
    with _recognised(content) as file:
        if file.format == "EPS":  # a program, which Pillow would run with Ghostscript
            raise ValueError("PostScript is not supported")
        storage = _storage(file)
        file.load()
        image = _eight_bit(file, storage)
        try:  # not ImageOps.exif_transpose, which fails for damage in any other entry of the metadata
            turn = _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # SyntaxError, struct.error, …: the image as it is stored
            return image
        return image if turn is None else image.transpose(turn)


def _recognised(content: io.BytesIO | str) -> ImageFile:
    """The opened file, not decoded yet.

    Raises:
        ValueError: it is a Git LFS pointer.
        Exception: of any type that Pillow raises.
    """
    try:
        return Image.open(content)
    except UnidentifiedImageError:
        start = (
            content.getvalue()[:64] if isinstance(content, io.BytesIO) else Path(content).read_bytes()[:64]
        )
        if is_lfs_pointer(start):
            raise ValueError(LFS_POINTER) from None
        raise


def _storage(file: ImageFile) -> str:
    """Pillow's name for the stored pixel format ("L;4", "RGB;16B"); known only before the file is loaded."""
    arguments = file.tile[0][3] if file.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _eight_bit(image: ImageFile, storage: str) -> Image.Image:
    """Scale grey of more bits to 8 (Pillow would clip it), and apply the transparent colour of grey PNGs."""
    key = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I") or _has_sign(image):
        black, white = _black_and_white(image, storage)
        pixels = np.asarray(image).astype(np.int64)
        grey = Image.fromarray(np.rint((pixels - black) * (255 / (white - black))).astype(np.uint8))
        return grey if key is None else _with_alpha(grey, pixels != key)
    if key is not None and storage in ("L;2", "L;4"):  # the key is not scaled, the pixels are
        return _with_alpha(image, np.asarray(image) != key * {"L;2": 85, "L;4": 17}[storage])
    if key is not None and storage.startswith("RGB;16"):  # Pillow keeps only 8 bits to compare it with
        raise ValueError("a transparent colour of 16 bits a channel is not supported")
    return image


def _has_sign(image: ImageFile) -> bool:
    return isinstance(image, TiffImageFile) and 2 in image.tag_v2.get(SAMPLEFORMAT, ())


def _with_alpha(grey: Image.Image, opaque: NDArray[np.bool_]) -> Image.Image:
    return Image.merge("LA", [grey, Image.fromarray(opaque.astype(np.uint8) * 255)])


def _black_and_white(image: ImageFile, storage: str) -> tuple[int, int]:
    """The values of black and white.

    Raises:
        ValueError: they are undefined (floating-point, signed or 32-bit values).
    """
    if image.format in ("PNG", "PPM", "JPEG2000") and image.mode != "F":
        return 0, 65535  # Pillow scales the other depths of the latter two
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        most = 4095 if storage == "I;12" else 65535
        return (most, 0) if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0 else (0, most)
    kind = "in floating point" if image.mode == "F" else f"of mode {image.mode} in {image.format}"
    raise ValueError(f"pixels {kind} are not supported: the value of white is undefined")
