"""Grids of images, and PNG files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.storage.files import replacing

_CELL = 56  # pixels; about the smallest size at which a digit is easy to read
_GAP = 4


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Arrange images in rows of `columns`, 4 pixels apart.

    Images smaller than 56 pixels are enlarged by the whole factor that brings their longer side closest to
    56 pixels (nearest neighbour).

    Args:
        images: (n, C, H, W), in [0, 1] or uint8; RGB for C = 3, grey for C = 1. For any other C, the channels
            are shown side by side in grey.
        columns: at least 1.

    Raises:
        InputError: for no images, another shape, pixels outside [0, 1] or `columns` < 1.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise InputError("images", f"must have shape (n ≥ 1, C, H, W), got {tuple(images.shape)}")
    if columns < 1:
        raise InputError("columns", f"must be at least 1, got {columns}")
    is_bytes = images.dtype == torch.uint8
    if not is_bytes and not (images.isfinite().all() and images.min() >= 0 and images.max() <= 1):
        raise InputError(
            "images", f"must lie in [0, 1], got {float(images.min()):.4g} … {float(images.max()):.4g}"
        )
    if images.shape[1] not in (1, 3):
        images = images.permute(0, 2, 1, 3).flatten(2)[:, None]
    count, channels, height, width = images.shape
    scale = max(1, round(_CELL / max(height, width)))
    images = images.detach().cpu()
    rounded = images if is_bytes else (images.float() * 255).round().byte()
    pixels = rounded.permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale

    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 255, np.uint8)
    for index, cell in enumerate(pixels):
        top = _GAP + index // columns * (height + _GAP)
        left = _GAP + index % columns * (width + _GAP)
        grid[top : top + height, left : left + width] = cell
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write `image` as PNG. An existing file is replaced only once the new one is complete.

    Raises:
        OSError: if the file cannot be written.
    """
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", optimize=True)
