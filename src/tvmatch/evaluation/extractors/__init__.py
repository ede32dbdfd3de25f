"""Extractors: InceptionV3 for FID, DINOv2 for FD-DINOv2, and any network of the user's own."""

from pathlib import Path

import torch

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors.base import Extractor, Features

__all__ = ["Extractor", "Features", "load_extractor"]


def load_extractor(name: str, device: torch.device, weights: Path | None = None) -> Extractor:
    """The extractor called `name`, its network on `device`.

    Args:
        name: "inception" (FID, sFID, Inception Score, precision and recall), "dinov2" (FD-DINOv2), or
            "package.module:attribute" for one of the user's own (`extractors.custom`).
        device: where its network works; features come back to the CPU.
        weights: for "inception" its weight file, otherwise the one in torch-fidelity's cache, downloaded if
            need be; for "dinov2" a folder with config.json and *.safetensors, otherwise facebook/dinov2-large
            from the Hugging Face Hub. An extractor of the user's own finds its weights itself.

    Raises:
        InputError: no such extractor, a package it needs is missing, or its weights are missing or bad.
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
        raise InputError("extractor weights", f"{name} finds its weights itself, got {weights}")
    from tvmatch.evaluation.extractors.custom import load_custom

    return load_custom(name, device)
