"""Images of a data set one by one, decoded when they are asked for: what encoding reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tvmatch.data.findings import lines_of_findings
from tvmatch.data.images.columns import AUTO, choose_label_column, find_classes, find_image_column
from tvmatch.data.images.listing import PLACE
from tvmatch.data.images.pixels import Crop, check_crop, decode, what_is_wrong
from tvmatch.data.images.rows import Source
from tvmatch.data.images.source import open_source
from tvmatch.data.npy import is_npy, latents_shape, moments_of_npy
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import LFS_POINTER, is_lfs_pointer


class ImageSource:
    """The images of one split of a data set; made by `open_images`.

    The rows are memory-mapped, so that it is small, and it can be pickled for other processes.

    Args:
        source: the data set.
        image_column: the column that holds its images.
        label_column: the column that holds their classes, or None without classes.
        class_names: in the order of the class numbers, or None without classes.
        labels: the class number of each image, or None without classes.
        findings: what was found, for people: lines on images, classes, and what was left out and why.

    Attributes:
        findings: as above.
        label_column: as above.
        class_names: as above.
        fingerprint: another one if the files or the split are others; of files it depends on names, sizes and
            times of change.
    """

    def __init__(
        self,
        source: Source,
        image_column: str,
        label_column: str | None,
        class_names: tuple[str, ...] | None,
        labels: NDArray[np.int32] | None,
        findings: tuple[str, ...] = (),
    ) -> None:
        self.findings = findings
        self.label_column = label_column
        self.class_names = class_names
        self.fingerprint = source.fingerprint
        self._labels = labels
        self._images = source.images
        self._image_column = image_column
        rows = source.rows.select_columns(source.columns_of_images(image_column))
        self._rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self._shape_of_moments = self._find_shape_of_moments()

    def __len__(self) -> int:
        """Number of images, unreadable ones among them."""
        return len(self._rows)

    def label(self, index: int) -> int | None:
        """The class number of an image, None without classes."""
        return None if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        """What to call an image in a message: its file, or its row in a table."""
        return self._images.name(self._row(index)[0], index)

    def pixels(
        self, index: int, resolution: int | tuple[int, int], crop: Crop = "centre", channels: int = 3
    ) -> NDArray[np.uint8]:
        """An image in RGB or grey, cropped and resized as `pixels.decode` does: uint8 (channels, H, W).

        Args:
            index: its number.
            resolution: in pixels, one number for squares or (height, width).
            crop: "centre" or "dhariwal".
            channels: 3 for RGB, 1 for grey.

        Raises:
            InputError: it cannot be read, or the crop cannot give this shape.
        """
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        check_crop(crop, height, width)
        image, place = self._row(index)
        try:
            content = self._images.content(image, place)
            if not content:
                raise InputError("there is no image")
            return decode(content, height, width, channels, crop)
        except InputError as error:
            raise error.within(self._images.name(image, index)) from error
        except Exception as error:  # Pillow's readers raise every kind for a broken file
            raise InputError(self._images.name(image, index), what_is_wrong(error)) from error

    def moments(self, index: int) -> NDArray[np.float32] | None:
        """Latents that the data set holds in place of images, None if it holds images.

        Returns:
            the posterior's mean and, in the second half of the channels, its standard deviation, raw:
            float32 (2C, h, w), of the same shape for all.

        Raises:
            InputError: it cannot be read, or is not like the first one.
        """
        if self._shape_of_moments is None:
            return None
        image, place = self._row(index)
        try:
            moments = moments_of_npy(_bytes(self._images.content(image, place)))
        except Exception as error:
            raise InputError(self._images.name(image, index), one_line(error)) from error
        if moments.shape != self._shape_of_moments:
            raise InputError(
                self._images.name(image, index),
                f"latents of shape {moments.shape}, the first have {self._shape_of_moments}",
            )
        return moments

    def _row(self, index: int) -> tuple[Mapping[str, Any] | None, Sequence[int] | None]:
        row = self._rows[index]
        return row[self._image_column], row.get(PLACE)

    def _find_shape_of_moments(self) -> tuple[int, ...] | None:
        """Shape of the first element if that is latents."""
        try:
            content = self._images.content(*self._row(0))
        except Exception:  # a bad image, which `pixels` tells of
            return None
        return latents_shape(content) if isinstance(content, bytes) else None


def open_images(
    path: str, split: str, *, label_column: str | None, image_column: str | None = None
) -> ImageSource:
    """The images of a data set, in the order of their files or rows.

    Args:
        path: as `ImagesData.path`: a folder, ImageNet, a ZIP, Parquet or Arrow files, a name on the Hub.
        split: as `ImagesData.split`.
        label_column: column of the classes, "label" for class folders, ImageNet and `dataset.json`; None
            for no classes; "auto" as `choose_label_column` says.
        image_column: column of the images; by default the only one that holds some.

    Raises:
        InputError: the data are missing, empty or unreadable, or lack a column or labels.
    """
    source = open_source(path, split)
    if len(source.rows) == 0:
        raise InputError("data.split", f"{split!r} of {path} holds no rows")
    column = find_image_column(source.rows, image_column, path)
    why_none = source.why_none if label_column == AUTO else ""
    label_column = choose_label_column(source, label_column, path)
    class_names, labels = None, None
    if label_column is not None:
        class_names, numbers = find_classes(source, label_column, path)
        # Without copies of the rows: the column as it lies in the file.
        values = source.rows.with_format("arrow")[label_column][:]
        if numbers is not None:
            values = pa.compute.index_in(values, value_set=pa.array(class_names, values.type))
        labels = values.to_numpy().astype(np.int32)
    findings = lines_of_findings(
        f"{path}, split {split}", len(source.rows), class_names, labels, source.notes, why_none=why_none
    )
    return ImageSource(source, column, label_column, class_names, labels, findings)


def _bytes(content: bytes | str | None) -> bytes:
    if isinstance(content, bytes) and is_lfs_pointer(content):
        raise InputError(LFS_POINTER)
    if not isinstance(content, bytes) or not is_npy(content):
        raise InputError("holds no latents, as the first does")
    return content
