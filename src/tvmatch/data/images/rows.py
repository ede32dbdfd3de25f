"""Rows of encoded images: how to decode the image of a row, and what to call it in a message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from tvmatch.data.findings import Notes, printable
from tvmatch.data.images.listing import PLACE
from tvmatch.data.images.pixels import Crop, decode, what_is_wrong
from tvmatch.data.images.zip_archive import read_member
from tvmatch.data.npy import NPY_SUFFIX
from tvmatch.errors import InputError

EncodedImage = Mapping[str, Any] | None  # {"bytes", "path"}; None where a row has no image


class UnreadableImageError(InputError):
    """An image is missing, damaged or of an unsupported kind."""


@dataclass(frozen=True)
class EncodedImages:
    """Decodes and names the images of a data set's rows. Can be pickled.

    Attributes:
        table: names the rows of images without a file name in messages: "photos.parquet, split train".
        root: the folder or ZIP to which paths are relative; None if they are not relative.
        stamp: of a ZIP, see `zip_archive.read_member`.
    """

    table: str
    root: Path | None = None
    stamp: str = ""

    def name(self, image: EncodedImage, row: int) -> str:
        """The name of an image in messages: its file if it has one, else its row in the table."""
        path = (image or {}).get("path")
        if self.root is not None and path:
            return printable(str(self.root / path))
        return (
            printable(str(path)) if path and not (image or {}).get("bytes") else f"row {row} of {self.table}"
        )

    def content(self, image: EncodedImage, place: Sequence[int] | None = None) -> bytes | str | None:
        """The encoded bytes, or the path of a file that holds them; None if there is no image.

        Args:
            image: of the row.
            place: location in the ZIP, from the column `PLACE`.

        Raises:
            OSError, ValueError, zlib.error: a file in a ZIP is damaged.
        """
        content: bytes | None = (image or {}).get("bytes")
        path: str | None = (image or {}).get("path")
        if content or not path:
            return content or None
        if self.root is None:
            return path
        if place is not None:
            return read_member(self.root, self.stamp, place)
        file = self.root / path
        return file.read_bytes() if file.suffix.lower() == NPY_SUFFIX else str(file)

    def pixels(
        self,
        image: EncodedImage,
        place: Sequence[int] | None,
        row: int,
        shape: tuple[int, int, int],
        crop: Crop,
    ) -> NDArray[np.uint8]:
        """Decode an image, crop and resize it: uint8 of shape (C, H, W); see `pixels.decode`.

        Args:
            image: of the row.
            place: location in the ZIP, from the column `PLACE`; None elsewhere.
            row: number of the row, for messages.
            shape: (C, H, W) of the result.
            crop: how to crop.

        Raises:
            UnreadableImageError: the image is missing or cannot be decoded.
            InputError: the row holds latents instead, or the crop cannot give this shape.
        """
        try:
            content = self.content(image, place)
            if not content:
                raise UnreadableImageError("there is no image")
            channels, height, width = shape
            return decode(content, height, width, channels, crop)
        except InputError as error:
            raise error.within(self.name(image, row)) from error
        except Exception as error:  # Pillow's readers raise many types for a damaged file
            raise UnreadableImageError(self.name(image, row), what_is_wrong(error)) from error


@dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
        rows: encoded images and further columns, memory-mapped.
        images: decodes the images of the rows.
        fingerprint: changes with the files or the split; depends on names, sizes and modification times.
        notes: on the files.
    """

    rows: datasets.Dataset
    images: EncodedImages
    fingerprint: str
    notes: Notes = field(default_factory=Notes)

    @property
    def why_none(self) -> str:
        """Why there are no labels."""
        return self.notes.why_none or f"its columns are {', '.join(self.rows.column_names)}"

    def name(self, row: int) -> str:
        """The name of a row in messages."""
        if self.images.root is None:
            return self.images.name(None, row)
        image = self.rows.select_columns("image").cast_column("image", datasets.Image(decode=False))[row]
        return self.images.name(image["image"], row)

    def encoded(self, image_column: str) -> datasets.Dataset:
        """The rows with nothing but the columns needed to decode `image_column`."""
        in_zip = self.images.root is not None and PLACE in self.rows.column_names
        rows = self.rows.select_columns([image_column, PLACE] if in_zip else [image_column])
        return rows.cast_column(image_column, datasets.Image(decode=False))
