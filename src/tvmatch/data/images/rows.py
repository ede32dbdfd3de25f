"""What finding images gives: rows with encoded images, and how to read and to name one."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from tvmatch.data.findings import Notes, printable
from tvmatch.data.images.listing import PLACE
from tvmatch.data.images.zip_archive import read_member
from tvmatch.data.npy import NPY_SUFFIX


@dataclass(frozen=True)
class RowNames:
    """What to call row number n of a data set in a message: "row 3 of b.parquet".

    Attributes:
        sources: file names (or one description of the whole), in the order of their rows.
        ends: for each source the number of rows up to its end; empty if only the whole is known.
    """

    sources: tuple[str, ...]
    ends: tuple[int, ...] = ()

    def __call__(self, row: int) -> str:
        """The name of row `row`, counted from 0 in its source."""
        place = bisect.bisect_right(self.ends, row) if self.ends else 0
        first = self.ends[place - 1] if place else 0
        return f"row {row - first} of {self.sources[place]}"


@dataclass(frozen=True)
class EncodedImages:
    """How to get from a row of a data set to the encoded bytes of its image. Can be pickled.

    Attributes:
        row_names: for messages about images without a name of their own.
        root: the folder or ZIP that paths are relative to; None where they are not.
        stamp: of a ZIP, see `image_zip.read_member`.
    """

    row_names: RowNames
    root: Path | None = None
    stamp: str = ""

    def name(self, image: Mapping[str, Any] | None, row: int) -> str:
        """What to call an image in a message.

        Args:
            image: {"bytes", "path"}, or None where a row has no image.
            row: its number.
        """
        path = (image or {}).get("path")
        if self.root is not None and path:
            return printable(str(self.root / path))
        return printable(str(path)) if path and not (image or {}).get("bytes") else self.row_names(row)

    def content(
        self, image: Mapping[str, Any] | None, place: Sequence[int] | None = None
    ) -> bytes | str | None:
        """The encoded bytes, or the path of a file that holds them; None if there is no image.

        Args:
            image: {"bytes", "path"}, or None.
            place: where it is in the ZIP, of the column `PLACE`.

        Raises:
            OSError, ValueError, zlib.error: for a file in a ZIP that is damaged.
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


@dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
        rows: not decoded, memory-mapped.
        images: how to read a row's image.
        fingerprint: another one if the files are others. Depends on names, sizes and times of change.
        notes: what there is to say about its files.
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
        """What to call a row in a message."""
        if self.images.root is None:
            return self.images.row_names(row)
        image = self.rows.select_columns("image").cast_column("image", datasets.Image(decode=False))[row]
        return self.images.name(image["image"], row)

    def columns_of_images(self, image_column: str) -> list[str]:
        """The columns that it takes to read the images of `image_column`."""
        in_zip = self.images.root is not None and PLACE in self.rows.column_names
        return [image_column, PLACE] if in_zip else [image_column]
