"""Image files of a folder or a ZIP as rows of a memory-mapped table: names and labels, no pixels."""

import errno
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from tvmatch.errors import InputError
from tvmatch.files import replacing

PLACE = "place"  # the column that says where in a ZIP an image is
_VERSION = "1"  # change it when the rows change, so that no older list is read
_ROWS_A_CHUNK = 10_000


@dataclass(frozen=True)
class Listing:
    """What a data set of files consists of.

    Attributes:
        names: of the files, relative to the root.
        labels: a class number each, None for a file without one.
        class_names: in the order of the numbers; None calls the classes by their numbers.
        places: where each file is in the ZIP, see `image_zip.Place`; None in a folder.
    """

    names: Sequence[str]
    labels: Sequence[int | None]
    class_names: tuple[str, ...] | None = None
    places: Sequence[Sequence[int]] | None = None


def one_line(error: BaseException) -> str:
    """An exception's message, or its kind if it has none, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


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


def raise_it(error: OSError) -> None:
    """For `os.walk`, which would leave out folders that it cannot read without a word."""
    raise error


def printable(name: str) -> str:
    """A file's name for messages, which are one line."""
    return name if name.isprintable() else ascii(name)[1:-1]


def digest(*parts: str | bytes) -> str:
    """SHA-256 of texts and bytes, each set off from the next."""
    whole = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def as_rows(stamp: str, listing: Callable[[], Listing]) -> datasets.Dataset:
    """The rows of a listing, memory-mapped from the cache: columns "image", "label" and, of a ZIP, "place".

    Args:
        stamp: what the listing depends on; one that was seen before is not made again.
        listing: makes it.

    Raises:
        InputError: from `listing`, or if the cache cannot be written.
    """
    key = digest(_VERSION, stamp)
    path = Path(datasets.config.HF_DATASETS_CACHE, "tvmatch", key[:32], "files.arrow")
    if not path.exists():
        _write(path, listing())
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    return datasets.Dataset(table, fingerprint=key[:32])


def _write(path: Path, listing: Listing) -> None:
    label = datasets.Value("int64")
    if listing.class_names is not None:
        label = datasets.ClassLabel(names=list(listing.class_names))
    columns = {"image": datasets.Image(), "label": label}
    try:
        names = pa.array(listing.names, pa.string())
    except UnicodeEncodeError as error:
        raise InputError(f"data.path: the file name {printable(error.object)} is not in UTF-8") from error
    images = pa.StructArray.from_arrays([pa.nulls(len(names), pa.binary()), names], ["bytes", "path"])
    values = [images, pa.array(listing.labels, pa.int64())]
    if listing.places is not None:
        columns[PLACE] = datasets.List(datasets.Value("int64"))
        values.append(pa.array(listing.places, pa.list_(pa.int64())))
    table = pa.table(values, schema=datasets.Features(columns).arrow_schema)
    try:
        with replacing(path) as unfinished, pa.ipc.new_stream(str(unfinished), table.schema) as stream:
            stream.write_table(table, max_chunksize=_ROWS_A_CHUNK)
    except OSError as error:  # a full disk, or no permission to write
        raise cache_error("the list of images", error) from error
