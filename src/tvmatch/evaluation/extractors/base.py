"""What an extractor is: a network that turns images into the features that distances are measured on.

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
    """Features of a batch of images, all on the CPU in float32.

    Attributes:
        pooled: (B, d), for the Fréchet distance and for precision and recall.
        spatial: (B, s), for sFID; None if the extractor has none.
        logits: (B, K), whose softmax is the class probabilities of the Inception Score; None if the extractor
            is no classifier.
    """

    pooled: Tensor
    spatial: Tensor | None
    logits: Tensor | None


class Extractor(Protocol):
    """Images uint8 (B, 3, H, W) → `Features`.

    Attributes:
        name: as `load_extractor` takes it.
        fingerprint: SHA-256, in hexadecimal, of what determines the features. Features of two extractors
            are comparable only if both names and both fingerprints agree.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def __call__(self, images: Tensor) -> Features: ...


def check_images(images: Tensor) -> None:
    """Raises InputError unless `images` are uint8 of shape (B ≥ 1, 3, H ≥ 1, W ≥ 1)."""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise InputError(
            "images", f"must be uint8 of shape (B, 3, H, W), got {images.dtype} of shape {shape}"
        )


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 that is float32 on every device: no autocast, no TF32.

    TensorFloat-32, which PyTorch uses for convolutions on recent GPUs unless told otherwise, keeps 10 bits
    of mantissa: features would depend on the GPU they were computed on. Algorithms that are not
    deterministic, or chosen by timing them, are off for the same reason.
    """
    backends: Any = torch.backends  # PyTorch's annotations lack these settings
    cudnn = backends.cudnn
    operations = (backends.cuda.matmul, cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    precisions = [operation.fp32_precision for operation in operations]
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    for operation in operations:
        operation.fp32_precision = "ieee"
    # PyTorch has an older setting beside this one, and CUDA kernels refuse to work while the two disagree.
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
    """SHA-256 of the contents of files one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def missing_packages(name: str, error: Exception) -> InputError:
    """The error of an extractor whose packages are not there, or are there but cannot be imported."""
    return InputError(
        "extractor", f'{name} needs more packages, pip install "tvmatch[evaluation]" ({one_line(error)})'
    )


def one_line(error: Exception) -> str:
    """Kind and message of an exception, on one line of at most 200 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:199] + "…"
