"""Listings of the image files of a folder or ZIP, cached as memory-mapped tables of names and labels."""

import errno
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from tvmatch.data.findings import LeftOut, Notes, printable
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import replacing

PLACE = "place"  # the column with the location of an image in a ZIP
_VERSION = "1"  # change it with the content of the rows, so that no older listing is read
_ROWS_PER_CHUNK = 10_000
_NOTES = b"tvmatch"  # key of the notes in the metadata of the table


@dataclass(frozen=True)
class Listing:
    """The files of a data set.

    Attributes:
        names: of the files, relative to the root.
        labels: class number of each file, None for a file without a label.
        class_names: in the order of the class numbers; None names the classes by their numbers.
        places: location of each file in the ZIP, see `zip_archive.Place`; None for a folder.
        notes: on the files.
    """

    names: Sequence[str]
    labels: Sequence[int | None]
    class_names: tuple[str, ...] | None = None
    places: Sequence[Sequence[int]] | None = None
    notes: Notes = field(default_factory=Notes)


def cache_failure(error: BaseException | None) -> OSError | None:
    """The error of writing to the cache of `datasets` (full disk, no permission) that caused an exception."""
    while error is not None:
        if isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
            or str(error.filename).startswith(str(datasets.config.HF_DATASETS_CACHE))
            or str(error).startswith("Not enough disk space")  # checked by `datasets` in advance
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def cache_error(what: str, error: BaseException) -> InputError:
    """The error that something cannot be written to the cache, with the option to move the cache."""
    return InputError(
        f"{what} cannot be written to {datasets.config.HF_DATASETS_CACHE} ({one_line(error)}); the "
        "environment variable HF_HOME names another folder"
    )


def digest(*parts: str | bytes) -> str:
    """SHA-256 of a sequence of texts and bytes, with their lengths."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def as_rows(stamp: str, listing: Callable[[], Listing]) -> tuple[datasets.Dataset, Notes]:
    """The rows of a listing, memory-mapped from the cache, and its notes.

    Args:
        stamp: key of the listing in the cache.
        listing: called to create the listing if the cache lacks it.

    Returns:
        Columns "image", "label" and, for a ZIP, "place"; and the notes, which may be those of another listing
        with the same rows.

    Raises:
        InputError: raised by `listing`, or the cache cannot be written.
    """
    key = digest(_VERSION, stamp)
    path = Path(datasets.config.HF_DATASETS_CACHE, "tvmatch", key[:32], "listing.arrow")
    if not path.exists():
        _write(path, listing())
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    notes = json.loads((table.schema.metadata or {}).get(_NOTES, b"{}"))
    left_out = LeftOut({reason: tuple(counted) for reason, counted in notes.pop("left_out", {}).items()})
    return datasets.Dataset(table, fingerprint=key[:32]), Notes(left_out=left_out, **notes)


def _write(path: Path, listing: Listing) -> None:
    label = datasets.Value("int64")
    if listing.class_names is not None:
        label = datasets.ClassLabel(names=list(listing.class_names))
    columns = {"image": datasets.Image(), "label": label}
    try:
        names = pa.array(listing.names, pa.string())
    except UnicodeEncodeError as error:
        raise InputError("data.path", f"the file name {printable(error.object)} is not in UTF-8") from error
    images = pa.StructArray.from_arrays([pa.nulls(len(names), pa.binary()), names], ["bytes", "path"])
    values = [images, pa.array(listing.labels, pa.int64())]
    if listing.places is not None:
        columns[PLACE] = datasets.List(datasets.Value("int64"))
        values.append(pa.array(listing.places, pa.list_(pa.int64())))
    schema = datasets.Features(columns).arrow_schema
    notes = json.dumps(asdict(listing.notes)).encode()
    table = pa.table(values, schema=schema.with_metadata({**schema.metadata, _NOTES: notes}))
    try:
        with replacing(path) as unfinished, pa.ipc.new_stream(str(unfinished), table.schema) as stream:
            stream.write_table(table, max_chunksize=_ROWS_PER_CHUNK)
    except OSError as error:  # a full disk, or no permission to write
        raise cache_error("the list of images", error) from error
