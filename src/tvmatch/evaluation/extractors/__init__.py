"""Feature extractors: InceptionV3 for FID, DINOv2 for FD-DINOv2, and custom networks."""

from pathlib import Path

import torch

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors.base import Extractor, Features

__all__ = ["Extractor", "Features", "load_extractor"]


def load_extractor(name: str, device: torch.device, weights: Path | None = None) -> Extractor:
    """Load an extractor.

    Args:
        name: "inception" (FID, sFID, Inception Score, precision and recall), "dinov2" (FD-DINOv2), or
            "package.module:attribute" for a custom extractor (see `load_custom`).
        device: of its network. Features are returned on the CPU.
        weights: see `load_inception` and `load_dinov2`. By default the weights are downloaded.

    Raises:
        InputError: if there is no such extractor, a package that it needs is missing, or its weights are
            missing or invalid.
    """
    if name == "inception":
        from tvmatch.evaluation.extractors.inception import load_inception

        return load_inception(device, weights)
    if name == "dinov2":
        from tvmatch.evaluation.extractors.dinov2 import load_dinov2

        return load_dinov2(device, weights)
    if ":" not in name:
        raise InputError("extractor", f"must be inception, dinov2 or package.module:attribute, got {name!r}")
    if weights is not None:
        raise InputError("extractor weights", f"cannot be set for a custom extractor, got {weights}")
    from tvmatch.evaluation.extractors.custom import load_custom

    return load_custom(name, device)
