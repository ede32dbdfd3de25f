"""Conversion of images in [0, 1] to bytes."""

from typing import Literal

import torch
from torch import Tensor

from tvmatch.errors import InputError

Uint8 = Literal["round", "truncate"]
"""Round to the nearest byte, or down, which makes images half a level darker on average."""

ROUNDING: dict[Uint8, str] = {
    "round": "round(255 x) clipped to 0 … 255",
    "truncate": "floor(255 x) clipped to 0 … 255",
}
"""Descriptions for the provenance of metrics."""


def check_uint8(rule: str) -> None:
    """Raise InputError unless `rule` is one of `Uint8`."""
    if rule not in ROUNDING:
        raise InputError("uint8", f"must be {' or '.join(ROUNDING)}, got {rule!r}")


def as_uint8(images: Tensor, rule: Uint8 = "round") -> Tensor:
    """Convert images in [0, 1], (B, C, H, W), to uint8 of the same shape on the CPU.

    Rounding restores bytes that were divided by 255 exactly; truncating may give the byte below.

    Raises:
        InputError: for another shape, or a pixel that is not finite.
    """
    check_uint8(rule)
    if images.ndim != 4:
        raise InputError("images", f"must have shape (B, C, H, W), got {tuple(images.shape)}")
    broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if broken:
        raise InputError("images", f"{broken} of {len(images)} have a pixel that is not finite")
    levels = images.detach().cpu().mul(255)
    levels = levels.round_() if rule == "round" else levels.floor_()
    return levels.clamp_(0, 255).to(torch.uint8)


def to_bytes(images: Tensor, rule: Uint8 = "round") -> Tensor:
    """Convert images in [0, 1], (B, 1 or 3, H, W), to uint8 (B, 3, H, W); grey is repeated three times.

    Raises:
        InputError: for another number of channels, or a pixel that is not finite.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError("images", f"must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
    return as_uint8(images, rule).expand(-1, 3, -1, -1).contiguous()
