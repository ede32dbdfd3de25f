"""Images of a data set decoded by processes of their own, in batches whose order is given."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tvmatch.data.images.pixels import Crop
from tvmatch.data.images.reader import ImageReader
from tvmatch.data.read_ahead import read_ahead
from tvmatch.errors import InputError


class ImageBatch(NamedTuple):
    """Those images of a batch that could be read.

    Attributes:
        numbers: which, n of them.
        values: uint8 pixels (n, channels, H, W), or, where the data set holds latents, float32 (n, 2C, h, w)
            as of `ImageReader.moments`; None if n = 0.
        problems: what is wrong with the others.
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
    """The images of these numbers, a batch for each of `batches`, while the context lasts.

    Args:
        source: where they are.
        batches: their numbers.
        resolution: to crop and resize them to, in pixels.
        crop: how.
        workers: processes; 0 reads in this one.
        channels: of pixels, 3 for RGB, 1 for grey.

    Raises:
        DataError: if a process ends, or reading fails in another way than by an image that cannot be read.
    """
    return read_ahead(_Reader(source, resolution, crop, channels), batches, workers)


class _Item(NamedTuple):
    number: int
    values: Tensor | None
    problem: InputError | None


@dataclass(frozen=True)
class _Reader:
    """Reads one batch."""

    source: ImageReader
    resolution: int | tuple[int, int]
    crop: Crop
    channels: int

    def __call__(self, numbers: Sequence[int]) -> ImageBatch:
        return _collate([self._item(number) for number in numbers])

    def _item(self, number: int) -> _Item:
        try:
            latents = self.source.moments(number)
            if latents is not None:
                return _Item(number, torch.from_numpy(latents), None)
            pixels = self.source.pixels(number, self.resolution, self.crop, self.channels)
            return _Item(number, torch.tensor(pixels, device="cpu"), None)
        except InputError as error:
            return _Item(number, None, error)


def _collate(items: list[_Item]) -> ImageBatch:
    read = [(item.number, item.values) for item in items if item.values is not None]
    return ImageBatch(
        tuple(number for number, _ in read),
        torch.stack([values for _, values in read]) if read else None,
        tuple(item.problem for item in items if item.problem is not None),
    )
