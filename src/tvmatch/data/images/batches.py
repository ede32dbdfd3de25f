"""Images of a data set in batches of given indices, decoded by worker processes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from tvmatch.data.images.pixels import Crop
from tvmatch.data.images.reader import ImageReader
from tvmatch.data.read_ahead import read_ahead
from tvmatch.errors import InputError


class ImageBatch(NamedTuple):
    """The images of a batch that could be read.

    Attributes:
        numbers: their n indices.
        values: uint8 pixels (n, channels, H, W), or for a data set of latents float32 (n, 2C, h, w), see
            `ImageReader.moments`; None if n = 0.
        problems: the errors of the other images.
    """

    numbers: tuple[int, ...]
    values: Tensor | None
    problems: tuple[InputError, ...]


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_batches(
    source: ImageReader,
    batches: Sequence[Sequence[int]],
    resolution: int | tuple[int, int],
    crop: Crop,
    workers: int,
    channels: int = 3,
) -> AbstractContextManager[Iterator[ImageBatch]]:
    """Iterate over batches of images, as a context manager that ends the processes.

    Args:
        source: the images.
        batches: indices of the images of each batch.
        resolution: of the cropped and resized images, in pixels.
        crop: how to crop.
        workers: number of processes; 0 reads in this process.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: a process ends, or reading fails otherwise than by an unreadable image.
    """
    return read_ahead(_Reader(source, resolution, crop, channels), batches, workers)


@dataclass(frozen=True)
class _Reader:
    """Reads one batch."""

    source: ImageReader
    resolution: int | tuple[int, int]
    crop: Crop
    channels: int

    def __call__(self, numbers: Sequence[int]) -> ImageBatch:
        read: dict[int, Tensor] = {}
        problems = []
        for number in numbers:
            try:
                values: NDArray[Any] | None = self.source.moments(number)
                if values is None:
                    values = self.source.pixels(number, self.resolution, self.crop, self.channels)
                read[number] = torch.tensor(values, device="cpu")
            except InputError as error:
                problems.append(error)
        return ImageBatch(tuple(read), torch.stack([*read.values()]) if read else None, tuple(problems))
