"""Images of a data set decoded by processes of their own, in batches whose order is given."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tvmatch.data.image_reader import ImageSource
from tvmatch.data.listing import one_line
from tvmatch.data.pixels import Crop
from tvmatch.errors import InputError


class ImageBatch(NamedTuple):
    """Those images of a batch that could be read.

    Attributes:
        numbers: which, n of them.
        values: uint8 pixels (n, 3, H, W), or, where the data set holds latents, float32 (n, 2C, h, w) as of
            `ImageSource.moments`; None if n = 0.
        problems: what is wrong with the others.
    """

    numbers: tuple[int, ...]
    values: Tensor | None
    problems: tuple[str, ...]


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_batches(
    source: ImageSource,
    batches: Sequence[Sequence[int]],
    resolution: int | tuple[int, int],
    crop: Crop,
    workers: int,
) -> Iterator[ImageBatch]:
    """The images of these numbers, a batch for each of `batches`.

    Args:
        source: where they are.
        batches: their numbers.
        resolution: to crop and resize them to, in pixels.
        crop: how.
        workers: processes; 0 reads in this one.
    """
    yield from DataLoader(
        _Items(source, resolution, crop),  # made into batches by _collate
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=min(workers, len(batches)),
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # nothing is drawn, but a seed for the processes, else from the caller's
    )


@contextmanager
def dead_workers_told() -> Iterator[None]:
    """An `InputError` where PyTorch finds a process of `read_batches` dead, which can be at any moment."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"workers: a process that reads images has ended, perhaps for want of memory ({one_line(error)})"
        ) from error


class _Item(NamedTuple):
    number: int
    values: Tensor | None
    problem: str | None


class _Items(Dataset[_Item]):
    def __init__(self, source: ImageSource, resolution: int | tuple[int, int], crop: Crop) -> None:
        self._source = source
        self._resolution = resolution
        self._crop = crop

    def __getitem__(self, number: int) -> _Item:
        try:
            latents = self._source.moments(number)
            if latents is not None:
                return _Item(number, torch.from_numpy(latents), None)
            pixels = self._source.pixels(number, self._resolution, self._crop)
            return _Item(number, torch.tensor(pixels), None)
        except InputError as error:
            return _Item(number, None, str(error))


def _collate(items: list[_Item]) -> ImageBatch:
    read = [(item.number, item.values) for item in items if item.values is not None]
    return ImageBatch(
        tuple(number for number, _ in read),
        torch.stack([values for _, values in read]) if read else None,
        tuple(item.problem for item in items if item.problem is not None),
    )


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; one line about it is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
