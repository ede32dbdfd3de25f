"""Image files of a folder or a ZIP as rows of a memory-mapped table: names and labels, no pixels."""

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

PLACE = "place"  # the column that says where in a ZIP an image is
_VERSION = "1"  # change it when the rows change, so that no older list is read
_ROWS_A_CHUNK = 10_000
_NOTES = b"tvmatch"  # the key of the notes in the table's metadata


@dataclass(frozen=True)
class Listing:
    """What a data set of files consists of.

    Attributes:
        names: of the files, relative to the root.
        labels: a class number each, None for a file without one.
        class_names: in the order of the numbers; None calls the classes by their numbers.
        places: where each file is in the ZIP, see `image_zip.Place`; None in a folder.
        notes: what there is to say about it.
    """

    names: Sequence[str]
    labels: Sequence[int | None]
    class_names: tuple[str, ...] | None = None
    places: Sequence[Sequence[int]] | None = None
    notes: Notes = field(default_factory=Notes)


def cache_failure(error: BaseException | None) -> OSError | None:
    """What the cache of `datasets` has to do with an exception: a full disk, or no permission to write."""
    while error is not None:
        if isinstance(error, OSError) and (
            error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
            or str(error.filename).startswith(str(datasets.config.HF_DATASETS_CACHE))
            or str(error).startswith("Not enough disk space")  # which `datasets` looks at beforehand
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def cache_error(what: str, error: BaseException) -> InputError:
    """That something cannot be written to the cache, and where else it could be."""
    return InputError(
        f"{what} cannot be written to {datasets.config.HF_DATASETS_CACHE} ({one_line(error)}); the "
        "environment variable HF_HOME names another folder"
    )


def digest(*parts: str | bytes) -> str:
    """SHA-256 of texts and bytes, each set off from the next."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def as_rows(stamp: str, listing: Callable[[], Listing]) -> tuple[datasets.Dataset, Notes]:
    """The rows of a listing, memory-mapped from the cache, and its notes.

    Args:
        stamp: what the listing depends on; one that was seen before is not made again.
        listing: makes it.

    Returns:
        columns "image", "label" and, of a ZIP, "place"; and the notes, which may be those of another listing
        with the same rows.

    Raises:
        InputError: from `listing`, or if the cache cannot be written.
    """
    key = digest(_VERSION, stamp)
    # "files.arrow" had other notes beside the same rows: what was prepared from those rows stays valid.
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
            stream.write_table(table, max_chunksize=_ROWS_A_CHUNK)
    except OSError as error:  # a full disk, or no permission to write
        raise cache_error("the list of images", error) from error
