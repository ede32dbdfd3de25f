"""From an encoded image to bytes of the wanted size: decode, crop about the centre, resize."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def decode(source: bytes | str, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """One image as uint8 of shape (channels, height, width).

    The orientation that a camera recorded is applied; transparent pixels are laid on white; 16-bit grey
    becomes 8-bit; of an animation the first frame is used. The largest centred rectangle of the wanted
    proportions is kept and resized by a bicubic filter that widens when it shrinks (antialiasing).

    Args:
        source: the encoded bytes, or the path of a file.
        height: of the result, in pixels.
        width: likewise.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).

    Raises:
        Exception: of whatever kind Pillow raises for a file that it cannot read.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        file.load()
        image = _eight_bit(ImageOps.exif_transpose(file))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    # Cropped before it is resized: the filter would reach beyond a mere box given to `resize`.
    image = image.crop(centre_box(image.width, image.height, width, height))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def centre_box(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred rectangle with the proportions to_width : to_height.

    In whole pixels, so that an image which needs no resizing keeps its pixels exactly.
    """
    scale = min(width / to_width, height / to_height)
    inner_width, inner_height = max(round(scale * to_width), 1), max(round(scale * to_height), 1)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8-bit (Pillow would clip it); other modes as they are.

    Raises:
        ValueError: for pixels of floating point, or wider than 16 bits, whose white is not defined.
    """
    if image.mode == "F":
        raise ValueError("pixels in floating point are not supported")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels of more than 16 bits are not supported")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
