"""Images as a data set: decoded, cropped and resized once, then read as bytes from a cache.

Shapes: `B` images of a batch, `C` channels, `H` rows, `W` columns.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tvmatch.data.base import Batch, StoredDataset
from tvmatch.data.images.listing import PLACE, cache_error
from tvmatch.data.images.pixels import Crop, check_crop
from tvmatch.data.images.reader import open_images
from tvmatch.data.images.rows import EncodedImage, EncodedImages, UnreadableImageError
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError

_LOGGER = logging.getLogger(__name__)

_BATCH_ROWS = 256  # images decoded and written together: 50 MB at 256×256 RGB
_PREPARED = datasets.Features({"pixels": datasets.Value("binary"), "problem": datasets.Value("string")})


class ImageDataset(StoredDataset):
    """Images kept as bytes in a memory-mapped Arrow file, with their classes if asked for.

    Made by `ImagesData(...).load()`. Can be pickled for data workers.

    Args:
        rows: column "pixels" with C · H · W bytes per row, in the order (C, H, W).
        spec: of the images.
        labels: int64 class numbers, shape (number of rows,), or None.
        usable: indices of the rows with an image, int64.
        horizontal_flip: mirror each training image with probability 1/2.
        crop: how the images were cropped.
        findings: lines about images, classes, and which files are left out and why.

    Attributes:
        spec: shape, class names and normalisation (mean and std 0.5).
        findings: as above.
        skipped: number of images that could not be read.
        crop: how the images were cropped.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        spec: DataSpec,
        labels: Tensor | None,
        usable: Tensor,
        *,
        horizontal_flip: bool,
        crop: Crop,
        findings: tuple[str, ...] = (),
    ) -> None:
        super().__init__(spec, horizontal_flip=horizontal_flip)
        self.crop = crop
        self.findings = findings
        self.skipped = len(rows) - len(usable)
        self._rows = rows
        self._labels = labels
        self._usable = usable

    @property
    def class_counts(self) -> list[int] | None:
        """Number of readable images of each class; None without labels."""
        if self._labels is None:
            return None
        return torch.bincount(self._labels[self._usable], minlength=self.spec.class_count).tolist()

    def __len__(self) -> int:
        """Number of readable images."""
        return len(self._usable)

    def _select(self, indices: Tensor) -> Batch:
        numbers = self._usable[indices]
        content = bytearray().join(
            self._rows[numbers.tolist()]["pixels"]
        )  # PyTorch warns of read-only memory
        values = torch.frombuffer(content, dtype=torch.uint8).view(-1, *self.spec.shape).float().div_(255)
        return Batch(values, None if self._labels is None else self._labels[numbers])


def load_images(
    path: str,
    *,
    split: str,
    resolution: int | tuple[int, int],
    crop: Crop,
    channels: int,
    image_column: str | None,
    label_column: str | None,
    horizontal_flip: bool,
    on_bad_image: str,
    workers: int,
) -> ImageDataset:
    """Open images; decode and resize them first if they are not in the cache.

    Arguments and errors are those of `ImagesData` and its `load`.
    """
    height, width = _checked_size(resolution, crop, channels, on_bad_image, workers)
    reader = open_images(path, split, label_column=label_column, image_column=image_column)
    shape = (channels, height, width)
    preparation = _Preparation(shape, crop, reader.image_column, reader.images, skip=on_bad_image == "skip")
    environment = os.environ
    try:
        rows = reader.rows.map(
            preparation,
            with_indices=True,
            batched=True,
            batch_size=_BATCH_ROWS,
            writer_batch_size=_BATCH_ROWS,
            remove_columns=reader.rows.column_names,
            features=_PREPARED,
            num_proc=None if workers == 1 else min(workers, len(reader)),
            desc="preparing images",
        )
    except OSError as error:  # a full disk, or no permission to write
        raise cache_error("the prepared images", error) from error
    finally:
        os.environ = environment  # noqa: B003  `datasets` replaces it by a copy, which rich does not see
    spec = DataSpec(
        kind="image",
        shape=shape,
        class_names=reader.class_names,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    usable = _usable_rows(rows, path)
    return ImageDataset(
        rows.select_columns("pixels"),
        spec,
        None if reader.labels is None else torch.from_numpy(reader.labels.astype(np.int64)),
        torch.from_numpy(usable),
        horizontal_flip=horizontal_flip,
        crop=crop,
        findings=reader.findings_of(usable),
    )


@dataclass(frozen=True)
class _Preparation:
    """The function that `datasets` maps over batches of rows; its fields are part of the cache key.

    With `skip`, a row that cannot be read gets no pixels and the reason in "problem".
    """

    shape: tuple[int, int, int]
    crop: Crop
    image_column: str
    images: EncodedImages
    skip: bool
    version: int = 3  # raise it when the pixels change, so that no older cache is read

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        places = batch.get(PLACE) or [None] * len(rows)
        prepared = map(self._prepared, batch[self.image_column], places, rows)
        pixels, problems = zip(*prepared, strict=True)
        return {"pixels": list(pixels), "problem": list(problems)}

    def _prepared(
        self, image: EncodedImage, place: Sequence[int] | None, row: int
    ) -> tuple[bytes | None, str | None]:
        """The bytes of one image, or None and the reason why it cannot be read."""
        try:
            return self.images.pixels(image, place, row, self.shape, self.crop).tobytes(), None
        except UnreadableImageError as error:
            if not self.skip:
                raise error.with_hint("data.on_bad_image=skip leaves such images out") from error
            return None, str(error)


def _checked_size(
    size: int | tuple[int, int], crop: Crop, channels: int, on_bad_image: str, workers: int
) -> tuple[int, int]:
    """Height and width, after a check of the options that do not depend on the data."""
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise InputError("data.resolution", f"must be one or two numbers of at least 1 pixel, got {size}")
    if channels not in (1, 3):
        raise InputError("data.channels", f"must be 1 (grey) or 3 (RGB), got {channels}")
    if on_bad_image not in ("error", "skip"):
        raise InputError("data.on_bad_image", f"must be error or skip, got {on_bad_image!r}")
    check_crop(crop, *sizes)
    if workers < 1:
        raise InputError("data.workers", f"must be at least 1, got {workers}")
    return sizes[0], sizes[1]


def _usable_rows(rows: datasets.Dataset, path: str) -> NDArray[np.int64]:
    """Numbers of the rows that hold an image; logs how many do not."""
    problems = rows.data.column("problem")
    usable = np.flatnonzero(problems.is_null().to_numpy())
    skipped = len(rows) - len(usable)
    if skipped:
        first = next(text for text in problems.to_pylist() if text is not None)
        if len(usable) == 0:
            raise InputError(
                "data.path", f"none of the {skipped} images of {path} can be read; the first: {first}"
            )
        _LOGGER.warning(
            "data.on_bad_image: skipped %d of %d images of %s; the first: %s", skipped, len(rows), path, first
        )
    return usable
