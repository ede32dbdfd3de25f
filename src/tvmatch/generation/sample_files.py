"""Files of samples, written batch by batch so that an interrupted command can be resumed.

Shapes: n samples, B of them in a batch; C channels, (H, W) pixels.
"""

import math
import os
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
"""One PNG of all samples; one PNG a sample; an .npz of float32; an .npz of uint8 as ADM reads it."""


class SampleFiles(ABC):
    """Writes samples of consecutive numbers to a file or folder.

    Args:
        place: path of the unfinished file or folder; its name is also the prefix of any other files.
        path: of the output.
        numbers: of the samples.
    """

    def __init__(self, place: Path, path: Path, numbers: range) -> None:
        self.place, self.path, self.numbers = place, path, numbers

    @abstractmethod
    def begin(self, batch_size: int) -> int:
        """Return how many samples of complete batches exist already, and remove any incomplete ones."""

    @abstractmethod
    def write(self, numbers: range, samples: Tensor) -> None:
        """Add samples in data units, (B, *shape), in the order of their numbers."""

    @abstractmethod
    def finish(self, labels: Sequence[int] | None) -> None:
        """Move the complete output to `path`."""

    def _whole_batches(self, samples: int, batch_size: int) -> int:
        """Round a number of samples down to complete batches; the last batch may be smaller."""
        return samples if samples >= len(self.numbers) else samples // batch_size * batch_size


class Grid(SampleFiles):
    """A nearly square PNG of all samples, which are kept in memory as bytes until it is complete."""

    def __init__(self, place: Path, path: Path, numbers: range, uint8: Uint8) -> None:
        super().__init__(place, path, numbers)
        self._uint8, self._images = uint8, list[Tensor]()

    def begin(self, batch_size: int) -> int:
        return 0

    def write(self, numbers: range, samples: Tensor) -> None:
        self._images.append(as_uint8(samples, self._uint8))

    def finish(self, labels: Sequence[int] | None) -> None:
        columns = math.ceil(math.sqrt(len(self.numbers)))
        pictures.save_png(pictures.image_grid(torch.cat(self._images), columns), self.path)


class Folder(SampleFiles):
    """One PNG for each sample, at its own size, named by its number."""

    def __init__(self, place: Path, path: Path, numbers: range, uint8: Uint8) -> None:
        super().__init__(place, path, numbers)
        self._uint8 = uint8

    def begin(self, batch_size: int) -> int:
        self.place.mkdir(exist_ok=True)
        for unfinished in self.place.glob(".*"):
            unfinished.unlink()
        existing = 0
        while existing < len(self.numbers) and self._file(self.numbers[existing]).exists():
            existing += 1
        return self._whole_batches(existing, batch_size)

    def write(self, numbers: range, samples: Tensor) -> None:
        for number, pixels in zip(numbers, as_uint8(samples, self._uint8), strict=True):
            pictures.save_png(_picture(pixels), self._file(number))

    def finish(self, labels: Sequence[int] | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.place.rename(self.path)

    def _file(self, number: int) -> Path:
        return self.place / f"{number:06d}.png"


class Arrays(SampleFiles):
    """An .npz file with the samples and, for a model with classes, their labels.

    Until it is complete, the samples are stored one after another in a file without a header.
    """

    def __init__(
        self, place: Path, path: Path, numbers: range, shape: tuple[int, ...], uint8: Uint8 | None
    ) -> None:
        super().__init__(place, path, numbers)
        self._uint8 = uint8
        self._shape = shape if uint8 is None else (*shape[1:], 3)  # ADM's images are (H, W, 3)
        self._dtype = np.dtype(np.float32 if uint8 is None else np.uint8)
        self._raw = place.with_name(f"{place.name}.raw")

    def begin(self, batch_size: int) -> int:
        row = math.prod(self._shape) * self._dtype.itemsize
        size = self._raw.stat().st_size if self._raw.exists() else 0
        existing = self._whole_batches(min(size // row, len(self.numbers)), batch_size)
        with self._raw.open("ab") as file:
            file.truncate(existing * row)
        return existing

    def write(self, numbers: range, samples: Tensor) -> None:
        if self._uint8 is not None:
            samples = to_bytes(samples, self._uint8).permute(0, 2, 3, 1)
        with self._raw.open("ab") as file:
            file.write(np.ascontiguousarray(samples.numpy(), self._dtype).data)

    def finish(self, labels: Sequence[int] | None) -> None:
        shape = (len(self.numbers), *self._shape)
        names = ("samples", "labels") if self._uint8 is None else ("arr_0", "arr_1")
        arrays: dict[str, Any] = {names[0]: np.memmap(self._raw, self._dtype, "r", shape=shape)}
        if labels is not None:
            arrays[names[1]] = np.array(labels, np.int64)
        whole = self.place.with_name(f"{self.place.name}.npz")
        # Bytes of photographs hardly compress, and are read much faster uncompressed.
        (np.savez_compressed if self._uint8 is None else np.savez)(whole, **arrays)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole, self.path)
        self._raw.unlink()


def sample_files(
    layout: Layout, place: Path, path: Path, numbers: range, shape: tuple[int, ...], uint8: Uint8
) -> SampleFiles:
    """The writer of a layout for samples of `shape`; `uint8` has no effect on "npz"."""
    if layout == "grid":
        return Grid(place, path, numbers, uint8)
    if layout == "folder":
        return Folder(place, path, numbers, uint8)
    return Arrays(place, path, numbers, shape, uint8 if layout == "adm" else None)


def _picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) as a grey or RGB image; other numbers of channels side by side, as in a grid."""
    if pixels.shape[0] not in (1, 3):
        pixels = pixels.permute(1, 0, 2).flatten(1)[None]
    array: NDArray[Any] = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
