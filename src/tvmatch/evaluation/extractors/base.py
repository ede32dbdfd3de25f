"""The interface of feature extractors.

Shapes: B images of 3 channels, H × W pixels; d features, s spatial features, K classes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tvmatch.errors import InputError


class Features(NamedTuple):
    """Features of a batch of images, float32 on the CPU.

    Attributes:
        pooled: (B, d), for the Fréchet distance, precision and recall.
        spatial: (B, s), for sFID; None if the extractor has none.
        logits: (B, K), for the Inception Score; None if the extractor is not a classifier.
    """

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class Extractor(Protocol):
    """Images uint8 (B, 3, H, W) → `Features`.

    Attributes:
        name: the argument of `load_extractor`.
        fingerprint: hexadecimal SHA-256 of everything that determines the features. Features are comparable
            only if names and fingerprints of the extractors are equal.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, images: Tensor) -> Features: ...


def check_images(images: Tensor) -> None:
    """Raise InputError unless `images` are uint8 of shape (B ≥ 1, 3, H ≥ 1, W ≥ 1)."""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise InputError("images", f"must be uint8 (B, 3, H, W), got {images.dtype} of shape {shape}")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable gradients, autocast, TensorFloat-32, cuDNN's benchmark and non-deterministic algorithms.

    Features then do not depend on the kind of GPU. PyTorch's default is TensorFloat-32 for convolutions.
    """
    backends: Any = torch.backends  # PyTorch's annotations lack these settings
    cudnn = backends.cudnn
    operations = (backends.cuda.matmul, cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    precisions = [operation.fp32_precision for operation in operations]
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    for operation in operations:
        operation.fp32_precision = "ieee"
    # CUDA kernels raise an error if this older setting disagrees with the ones above.
    older = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.deterministic, cudnn.benchmark = True, False
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark


def hash_files(files: list[Path]) -> str:
    """Hexadecimal SHA-256 of the concatenated contents of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def missing_packages(name: str, error: Exception) -> InputError:
    """The error for packages that are missing or cannot be imported."""
    return InputError(
        "extractor", f'{name} needs more packages, pip install "tvmatch[evaluation]" ({one_line(error)})'
    )


def one_line(error: Exception) -> str:
    """Type and message of an exception, on one line of at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:199] + "…"
