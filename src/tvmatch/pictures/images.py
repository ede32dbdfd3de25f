"""Images side by side, and PNG files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.storage.files import replacing

_CELL = 56  # pixels: about the smallest cell in which a person reads a digit at ease


_GAP = 4


def image_grid(images: Tensor, columns: int, *, scale: int | None = None) -> Image.Image:
    """Images, (n, C, H, W) in [0, 1] or uint8, side by side in rows of `columns`; grey, or RGB where C = 3.

    Each pixel becomes a square of `scale` × `scale` equal pixels (nearest neighbour, so that a small
    image is shown as it is). Without `scale` the longer side of a cell is brought near 56 pixels, and
    images of that size or larger are left alone. Cells are 4 pixels apart; the last row may be short.
    With another number of channels than 1 or 3, a cell shows the channels side by side in grey.

    Raises:
        InputError: for no images, another shape, pixels outside [0, 1], `columns` or `scale` < 1.
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
    if scale is None:
        scale = max(1, round(_CELL / max(height, width)))
    elif scale < 1:
        raise InputError("scale", f"must be at least 1, got {scale}")
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
    """Write `image` as PNG, whole or not at all: a former file stays until the new one is complete.

    Raises:
        OSError: if the file cannot be written.
    """
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", optimize=True)
