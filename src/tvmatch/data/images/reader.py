"""Images of a data set, decoded one by one on request, as `tvmatch encode` reads them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tvmatch.data.findings import lines_of_findings
from tvmatch.data.images.columns import AUTO, choose_label_column, find_classes, find_image_column
from tvmatch.data.images.listing import PLACE
from tvmatch.data.images.pixels import Crop, check_crop
from tvmatch.data.images.rows import EncodedImage, Source
from tvmatch.data.images.source import open_source
from tvmatch.data.npy import is_npy, latents_shape, moments_of_npy
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import LFS_POINTER, is_lfs_pointer


class ImageReader:
    """The images of one split of a data set; made by `open_images`.

    The rows are memory-mapped, so the object is small. It can be pickled for other processes.

    Args:
        path: of the data set.
        split: of the data set.
        source: its rows.
        image_column: column of the images.
        label_column: column of the classes, None without classes.
        class_names: in the order of the class numbers, None without classes.
        labels: class number of each image, None without classes.
        why_none: why there are no classes, if the caller left the choice open.

    Attributes:
        rows: the encoded images, and in a ZIP their location.
        images: decodes them.
        image_column, label_column, class_names, labels: as above.
        fingerprint: see `Source`.
    """

    def __init__(
        self,
        path: str,
        split: str,
        source: Source,
        image_column: str,
        label_column: str | None,
        class_names: tuple[str, ...] | None,
        labels: NDArray[np.int32] | None,
        why_none: str,
    ) -> None:
        self.rows = source.encoded(image_column)
        self.images = source.images
        self.image_column = image_column
        self.label_column = label_column
        self.class_names = class_names
        self.labels = labels
        self.fingerprint = source.fingerprint
        self._where = f"{path}, split {split}"
        self._notes = source.notes
        self._why_none = why_none
        self._shape_of_moments = self._find_shape_of_moments()

    def __len__(self) -> int:
        """Number of images, including unreadable ones."""
        return len(self.rows)

    @property
    def findings(self) -> tuple[str, ...]:
        """Lines about images, classes, and which files are left out and why."""
        return self.findings_of(np.arange(len(self)))

    def findings_of(self, usable: NDArray[np.int64]) -> tuple[str, ...]:
        """`findings` if only the images of these numbers can be used."""
        labels = None if self.labels is None else self.labels[usable]
        return lines_of_findings(
            self._where, len(usable), self.class_names, labels, self._notes, why_none=self._why_none
        )

    def label(self, index: int) -> int | None:
        """The class number of an image, None without classes."""
        return None if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        """The name of an image in messages: its file, or its row in a table."""
        return self.images.name(self._row(index)[0], index)

    def pixels(
        self, index: int, resolution: int | tuple[int, int], crop: Crop = "centre", channels: int = 3
    ) -> NDArray[np.uint8]:
        """An image in RGB or grey, cropped and resized as `pixels.decode` does: uint8 (channels, H, W).

        Args:
            index: number of the image.
            resolution: in pixels, one number for squares or (height, width).
            crop: "centre" or "dhariwal".
            channels: 3 for RGB, 1 for grey.

        Raises:
            InputError: the image cannot be read, or the crop cannot give this shape.
        """
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        check_crop(crop, height, width)
        return self.images.pixels(*self._row(index), index, (channels, height, width), crop)

    def moments(self, index: int) -> NDArray[np.float32] | None:
        """Latents that the data set holds instead of images; None if it holds images.

        Returns:
            Mean (first half of the channels) and standard deviation of the autoencoder's posterior, unscaled:
            float32 of shape (2C, h, w), the same for all elements.

        Raises:
            InputError: the element cannot be read, or has another shape than the first.
        """
        if self._shape_of_moments is None:
            return None
        image, place = self._row(index)
        try:
            moments = moments_of_npy(_bytes(self.images.content(image, place)))
        except Exception as error:
            raise InputError(self.images.name(image, index), one_line(error)) from error
        if moments.shape != self._shape_of_moments:
            raise InputError(
                self.images.name(image, index),
                f"latents of shape {moments.shape}, the first have {self._shape_of_moments}",
            )
        return moments

    def _row(self, index: int) -> tuple[EncodedImage, Sequence[int] | None]:
        row = self.rows[index]
        return row[self.image_column], row.get(PLACE)

    def _find_shape_of_moments(self) -> tuple[int, ...] | None:
        """Shape of the first element if it holds latents."""
        try:
            content = self.images.content(*self._row(0))
        except Exception:  # an unreadable image, which `pixels` reports
            return None
        return latents_shape(content) if isinstance(content, bytes) else None


def open_images(
    path: str, split: str, *, label_column: str | None, image_column: str | None = None
) -> ImageReader:
    """Open the images of a data set, in the order of their files or rows.

    Args:
        path: as `ImagesData.path`: a folder, ImageNet, a ZIP, Parquet or Arrow files, a name on the Hub.
        split: as `ImagesData.split`.
        label_column: column of the classes; "label" for class folders, ImageNet and `dataset.json`; None
            for no classes; "auto" as in `choose_label_column`.
        image_column: column of the images; by default the only column with images.

    Raises:
        InputError: the data are missing, empty or unreadable, or lack a column or labels.
    """
    source = open_source(path, split)
    if len(source.rows) == 0:
        raise InputError("data.split", f"{split!r} of {path} holds no rows")
    image_column = find_image_column(source.rows, image_column, path)
    why_none = source.why_none if label_column == AUTO else ""
    label_column = choose_label_column(source, label_column, path)
    class_names, labels = None, None
    if label_column is not None:
        class_names, numbers = find_classes(source, label_column, path)
        values = source.rows.with_format("arrow")[label_column][:]  # copies no rows
        if numbers is not None:
            values = pa.compute.index_in(values, value_set=pa.array(class_names, values.type))
        labels = values.to_numpy().astype(np.int32)
    return ImageReader(path, split, source, image_column, label_column, class_names, labels, why_none)


def _bytes(content: bytes | str | None) -> bytes:
    if isinstance(content, bytes) and is_lfs_pointer(content):
        raise InputError(LFS_POINTER)
    if not isinstance(content, bytes) or not is_npy(content):
        raise InputError("holds no latents, although the first element does")
    return content
