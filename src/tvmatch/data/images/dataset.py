"""Photographs and other images as a data set: decoded, cropped and resized once, then read as bytes.

Shapes: `B` images of a batch, `C` channels, `H` rows, `W` columns.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from tvmatch.data.base import Batch, StoredDataset
from tvmatch.data.facts import count_classes
from tvmatch.data.findings import lines_of_findings
from tvmatch.data.images.columns import AUTO, choose_label_column, find_classes, find_image_column
from tvmatch.data.images.listing import PLACE, cache_error
from tvmatch.data.images.pixels import Crop, check_crop, decode, what_is_wrong
from tvmatch.data.images.rows import EncodedImages
from tvmatch.data.images.source import open_source
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError

_LOGGER = logging.getLogger(__name__)

_BATCH_ROWS = 256  # images decoded and written together: 50 MB at 256×256 RGB
_PREPARED = datasets.Features(
    {
        "pixels": datasets.Value("binary"),
        "label": datasets.Value("int64"),
        "problem": datasets.Value("string"),
    }
)


class ImageDataset(StoredDataset):
    """Images kept as bytes in a memory-mapped Arrow file, with their classes if asked for.

    Made by `ImagesData(...).load()`. Can be pickled, for data workers that are not forked.

    Args:
        rows: column "pixels" with C · H · W bytes a row, in the order (C, H, W).
        spec: of the images.
        labels: int64 class numbers, shape (number of rows,), or None.
        usable: the numbers of the rows to use, int64; the other rows hold no image.
        horizontal_flip: mirror each training image with probability 1/2.
        crop: how the images were cropped.
        findings: what was found, for people: lines on images, classes, and what was left out and why.

    Attributes:
        spec: shape, class names and normalisation (mean and std 0.5).
        findings: as above.
        skipped: how many images could not be read and were left out.
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
        """Images of each class, those left out not counted; None without labels."""
        if self._labels is None:
            return None
        return count_classes(self._labels[self._usable], self.spec.class_count)

    def __len__(self) -> int:
        """Number of images, those left out not counted."""
        return len(self._usable)

    def _select(self, indices: Tensor) -> Batch:
        numbers = self._usable[indices]
        # A bytearray, because PyTorch warns of memory that it may not write to.
        content = bytearray().join(self._rows[numbers.tolist()]["pixels"])
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
    """Open images, decoded and resized first if the cache lacks them.

    Arguments and errors are those of `ImagesData` and its `load`.
    """
    height, width = _checked_size(resolution, crop, channels, on_bad_image, workers)
    source = open_source(path, split)
    if len(source.rows) == 0:
        raise InputError("data.split", f"{split!r} of {path} holds no rows")
    image_column = find_image_column(source.rows, image_column, path)
    kept = source.columns_of_images(image_column)
    class_names, class_numbers = None, None
    labels_wanted = label_column == AUTO
    label_column = choose_label_column(source, label_column, path)
    if label_column is not None:
        kept.append(label_column)
        class_names, class_numbers = find_classes(source, label_column, path)
    preparation = _Preparation(
        height=height,
        width=width,
        channels=channels,
        crop=crop,
        image_column=image_column,
        label_column=label_column,
        class_numbers=class_numbers,
        images=source.images,
        skip=on_bad_image == "skip",
    )
    encoded = source.rows.select_columns(kept).cast_column(image_column, datasets.Image(decode=False))
    try:
        with _environment_kept():
            rows = encoded.map(
                preparation,
                with_indices=True,
                batched=True,
                batch_size=_BATCH_ROWS,
                writer_batch_size=_BATCH_ROWS,
                remove_columns=kept,
                features=_PREPARED,
                num_proc=None if workers == 1 else min(workers, len(source.rows)),
                desc="preparing images",
            )
    except OSError as error:  # a full disk, or no permission to write
        raise cache_error("the prepared images", error) from error
    spec = DataSpec(
        kind="image",
        shape=(channels, height, width),
        class_names=class_names,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )
    labels = None if class_names is None else torch.tensor(rows.data.column("label").to_numpy(), device="cpu")
    usable = _usable_rows(rows, path)
    findings = lines_of_findings(
        f"{path}, split {split}",
        len(usable),
        class_names,
        None if labels is None else labels[usable].numpy(),
        source.notes,
        why_none=source.why_none if labels_wanted else "",
    )
    return ImageDataset(
        rows.select_columns("pixels"),
        spec,
        labels,
        usable,
        horizontal_flip=horizontal_flip,
        crop=crop,
        findings=findings,
    )


@contextmanager
def _environment_kept() -> Iterator[None]:
    """`datasets` sets a variable for its processes, and then puts a copy in the place of `os.environ`.

    Those who hold the first one, as rich does, would not see what is set afterwards.
    """
    environment, name = os.environ, "TOKENIZERS_PARALLELISM"
    before = environment.get(name)
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003  (the very same object again)
        if before is None:
            environment.pop(name, None)
        else:
            environment[name] = before


@dataclass(frozen=True)
class _Preparation:
    """The function that `datasets` maps over batches of rows; its fields are part of the cache's key.

    A row that cannot be read gets no pixels and says why in "problem", if `skip` is set.
    """

    height: int
    width: int
    channels: int
    crop: Crop
    image_column: str
    label_column: str | None
    class_numbers: dict[str, int] | None  # of names, where the column holds names
    images: EncodedImages
    skip: bool
    version: int = 2  # raise it when the pixels change, so that no older cache is read

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        pixels, problems = [], []
        places = batch.get(PLACE) or [None] * len(rows)
        for row, image, place in zip(rows, batch[self.image_column], places, strict=True):
            content, problem = self._pixels(image, place, row)
            if problem is not None and not self.skip:
                raise problem.with_hint("data.on_bad_image=skip leaves such images out")
            pixels.append(content)
            problems.append(None if problem is None else str(problem))
        labels: list[Any] = batch[self.label_column] if self.label_column is not None else [0] * len(rows)
        if self.class_numbers is not None:
            labels = [self.class_numbers[label] for label in labels]
        return {"pixels": pixels, "label": labels, "problem": problems}

    def _pixels(
        self, image: Mapping[str, Any] | None, place: Sequence[int] | None, row: int
    ) -> tuple[bytes | None, InputError | None]:
        """The bytes of one image, or None and what is wrong with it."""
        name = self.images.name(image, row)
        try:
            encoded = self.images.content(image, place)
            if not encoded:
                return None, InputError(name, "there is no image")
            return decode(encoded, self.height, self.width, self.channels, self.crop).tobytes(), None
        except InputError as error:  # latents: no bad image, but another kind of data
            raise error.within(name) from error
        except Exception as error:  # Pillow's readers raise every kind for a broken file
            return None, InputError(name, what_is_wrong(error))


def _checked_size(
    size: int | tuple[int, int], crop: Crop, channels: int, on_bad_image: str, workers: int
) -> tuple[int, int]:
    """Height and width, after a check of the options that need no look at the data."""
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


def _usable_rows(rows: datasets.Dataset, path: str) -> Tensor:
    """Numbers of the rows that hold an image, after telling how many do not."""
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
    return torch.from_numpy(usable)
