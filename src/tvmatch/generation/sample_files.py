"""Files of samples that are written batch by batch, and gone on with after an interruption.

Shapes: n samples, of them B a batch; C channels, (H, W) pixels.
"""

import math
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tvmatch import pictures
from tvmatch.generation.uint8 import Uint8, as_uint8, to_bytes

Layout = Literal["grid", "folder", "npz", "adm"]
"""One PNG of all samples; a PNG each; arrays of floating-point numbers, or of bytes as ADM reads them."""


class SampleFiles(ABC):
    """Samples of consecutive numbers on their way to a file or folder.

    Args:
        place: where unfinished files may lie; nothing else there begins with its name.
        path: of the output.
        numbers: of the samples.
    """

    def __init__(self, place: Path, path: Path, numbers: range) -> None:
        self.place, self.path, self.numbers = place, path, numbers

    @abstractmethod
    def begin(self, batch_size: int) -> int:
        """How many samples are there already, in whole batches; what is there besides is removed."""

    @abstractmethod
    def write(self, numbers: range, samples: Tensor) -> None:
        """Add samples in data units, (B, *shape), in the order of their numbers."""

    @abstractmethod
    def finish(self, labels: Sequence[int] | None) -> None:
        """Put the output in its place, all at once."""

    def _whole_batches(self, samples: int, batch_size: int) -> int:
        """As many of them as an uninterrupted run writes after one batch or another."""
        return samples if samples >= len(self.numbers) else samples // batch_size * batch_size


class Grid(SampleFiles):
    """A PNG of all samples side by side, kept as bytes until they are complete."""

    def __init__(self, place: Path, path: Path, numbers: range, uint8: Uint8) -> None:
        super().__init__(place, path, numbers)
        self._uint8, self._images = uint8, list[Tensor]()

    def begin(self, batch_size: int) -> int:
        """None are kept."""
        return 0

    def write(self, numbers: range, samples: Tensor) -> None:
        """Keep their bytes."""
        self._images.append(as_uint8(samples, self._uint8))

    def finish(self, labels: Sequence[int] | None) -> None:
        """Write the grid, nearly a square."""
        columns = math.ceil(math.sqrt(len(self.numbers)))
        pictures.save_png(pictures.image_grid(torch.cat(self._images), columns), self.path)


class Folder(SampleFiles):
    """A PNG for each sample, of its own size and named by its number."""

    def __init__(self, place: Path, path: Path, numbers: range, uint8: Uint8) -> None:
        super().__init__(place, path, numbers)
        self._uint8 = uint8

    def begin(self, batch_size: int) -> int:
        """Those whose files follow each other without a gap; files that were not finished are removed."""
        self.place.mkdir(exist_ok=True)
        for unfinished in self.place.glob(".*"):
            unfinished.unlink()
        there = 0
        while there < len(self.numbers) and self._file(self.numbers[there]).exists():
            there += 1
        return self._whole_batches(there, batch_size)

    def write(self, numbers: range, samples: Tensor) -> None:
        """One file after another, each whole or not at all."""
        for number, pixels in zip(numbers, as_uint8(samples, self._uint8), strict=True):
            pictures.save_png(_picture(pixels), self._file(number))

    def finish(self, labels: Sequence[int] | None) -> None:
        """Rename the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.place.rename(self.path)

    def _file(self, number: int) -> Path:
        return self.place / f"{number:06d}.png"


class Arrays(SampleFiles):
    """An .npz file: the samples, and their labels where there are classes.

    Until it is complete the samples lie in a file without header, one after another. The same samples always
    make the same file: the dates in it are the earliest that there are.
    """

    def __init__(
        self, place: Path, path: Path, numbers: range, shape: tuple[int, ...], uint8: Uint8 | None
    ) -> None:
        super().__init__(place, path, numbers)
        self._uint8 = uint8
        # ADM's batches are images with three channels last; samples are what they are.
        self._shape = shape if uint8 is None else (*shape[1:], 3)
        self._dtype = np.dtype(np.float32 if uint8 is None else np.uint8)
        self._names = ("samples", "labels") if uint8 is None else ("arr_0", "arr_1")
        self._raw = place.with_name(f"{place.name}.raw")

    def begin(self, batch_size: int) -> int:
        """Those of whole batches; the file is cut behind them."""
        row = math.prod(self._shape) * self._dtype.itemsize
        size = self._raw.stat().st_size if self._raw.exists() else 0
        there = self._whole_batches(min(size // row, len(self.numbers)), batch_size)
        with self._raw.open("ab") as file:
            file.truncate(there * row)
        return there

    def write(self, numbers: range, samples: Tensor) -> None:
        """Append them to the file."""
        if self._uint8 is not None:
            samples = to_bytes(samples, self._uint8).permute(0, 2, 3, 1)
        with self._raw.open("ab") as file:
            file.write(np.ascontiguousarray(samples.numpy(), self._dtype).data)

    def finish(self, labels: Sequence[int] | None) -> None:
        """Copy the samples behind a header into the .npz, a piece at a time."""
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (len(self.numbers), *self._shape),
        }
        # Photographs as bytes get hardly smaller, and stored they are read much faster.
        method = zipfile.ZIP_DEFLATED if self._uint8 is None else zipfile.ZIP_STORED
        whole = self.place.with_name(f"{self.place.name}.npz")
        with zipfile.ZipFile(whole, "w") as archive:
            with archive.open(_member(self._names[0], method), "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                with self._raw.open("rb") as raw:
                    shutil.copyfileobj(raw, stream)
            if labels is not None:
                with archive.open(_member(self._names[1], method), "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.array(labels, np.int64), version=(1, 0))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole, self.path)
        self._raw.unlink()


def sample_files(
    layout: Layout, place: Path, path: Path, numbers: range, shape: tuple[int, ...], uint8: Uint8
) -> SampleFiles:
    """Files of a layout for samples of `shape`; the bytes of all but "npz" are made as `uint8` says."""
    if layout == "grid":
        return Grid(place, path, numbers, uint8)
    if layout == "folder":
        return Folder(place, path, numbers, uint8)
    return Arrays(place, path, numbers, shape, uint8 if layout == "adm" else None)


def _member(name: str, method: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(f"{name}.npy")
    member.compress_type = method
    return member


def _picture(pixels: Tensor) -> Image.Image:
    """Bytes (C, H, W) as a grey or RGB image; other channels side by side, as in a grid."""
    if pixels.shape[0] not in (1, 3):
        pixels = pixels.permute(1, 0, 2).flatten(1)[None]
    array: NDArray[Any] = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
