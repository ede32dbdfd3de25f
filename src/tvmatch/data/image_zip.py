"""The ZIP with a `dataset.json` that codes of the EDM family (arXiv 2206.00364) use, and the same unpacked.

Inside are image files or NPY arrays, `00000/img00000000.png` and so on, and in `dataset.json` the classes:
{"labels": [["00000/img00000000.png", 3], …]} or {"labels": null}. Nothing is ever unpacked to the disk.
"""

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from tvmatch.data.listing import Listing, digest, one_line, printable, raise_it
from tvmatch.data.npy import NPY_SUFFIX
from tvmatch.errors import InputError

DESCRIPTION = "dataset.json"
Place = tuple[int, int, int, int, int]  # offset of the header, bytes packed and unpacked, CRC-32, method

_MOST_BYTES = 2**28  # of one image or array: larger claims are no pictures
_MOST_JSON_BYTES = 2**30
_MOST_CLASSES = 100_000
_TAIL = 2**16  # the end of a ZIP: its directory's last pages, with check sums of the last files
_HEADER = struct.Struct("<4s22xHH")  # of a file in a ZIP: signature, lengths of its name and extra field


def stamp_of_zip(archive: Path) -> str:
    """Tells one state of the file from another without reading all of it: time, size, and its end.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with archive.open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(status.st_size - _TAIL, 0))
            return digest(f"zip {status.st_mtime_ns} {status.st_size}", file.read())
    except OSError as error:
        raise InputError(f"data.path: {archive} cannot be read: {error.strerror or error}") from error


def list_zip(archive: Path) -> Listing:
    """The images of a ZIP, in the order of their names.

    Raises:
        InputError: it is no ZIP or a damaged one, or its description is wrong.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            # Of a name that is there twice, the last counts, as for everyone who reads ZIPs.
            members = {member.filename: member for member in opened.infolist() if not member.is_dir()}
    except Exception as error:  # the standard library raises half a dozen kinds for damaged directories
        raise InputError(f"data.path: {archive} is not a readable ZIP file: {one_line(error)}") from error
    names = _image_names(members)
    places = [_place(members[name]) for name in names]
    content = None
    if DESCRIPTION in members:
        try:
            content = read_member(
                archive, stamp_of_zip(archive), _place(members[DESCRIPTION]), _MOST_JSON_BYTES
            )
        except Exception as error:
            raise InputError(
                f"data.path: {DESCRIPTION} in {archive} cannot be read: {one_line(error)}"
            ) from error
    return Listing(names, labels_of(content, names, archive), places=places)


def list_folder(folder: Path) -> tuple[Listing, str]:
    """The images of an unpacked ZIP, in the order of their names, and a stamp of their files.

    Raises:
        InputError: a file cannot be read, or the description is wrong.
    """
    files: dict[str, str] = {}
    try:
        for parent, folders, names in os.walk(folder, onerror=raise_it, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith((".", "__"))]
            for name in names:
                path = Path(parent, name)
                if not name.startswith("."):
                    status = path.stat()
                    files[path.relative_to(folder).as_posix()] = f"{status.st_mtime_ns} {status.st_size}"
        content = (folder / DESCRIPTION).read_bytes()
    except OSError as error:
        raise InputError(f"data.path: {printable(str(error.filename))}: {error.strerror or error}") from error
    images = _image_names(files)
    stamp = digest("folder", content, *(f"{name} {files[name]}" for name in images))
    return Listing(images, labels_of(content, images, folder)), stamp


def labels_of(description: bytes | None, names: Sequence[str], root: Path) -> list[int | None]:
    """The class number of each file, None without one.

    Args:
        description: the content of `dataset.json`, or None if there is none.
        names: of the files.
        root: where they are, for messages.

    Raises:
        InputError: it is not JSON of the right form, names a file that is not there, or a class that is
            not a number 0 … 99,999.
    """
    if description is None:
        return [None] * len(names)
    where = f"data.path: {DESCRIPTION} of {root}"
    try:
        content = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not readable JSON: {one_line(error)}") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise InputError(f'{where} must be {{"labels": [[file, class], …]}} or {{"labels": null}}')
    given = content["labels"]
    if given is None:
        return [None] * len(names)
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list):
        raise InputError(f"{where}: labels must be a list of [file, class], got {given!r:.60}")
    found: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InputError(f"{where}: labels must be a list of [file, class], got {pair!r:.60}")
        name, label = pair
        if type(label) is not int or not 0 <= label < _MOST_CLASSES:  # a bool is an int, but no class
            raise InputError(
                f"{where}: the class of {name!r} must be a number 0 … {_MOST_CLASSES - 1}, got {label!r:.60}"
            )
        found[name] = label
    missing = found.keys() - set(names)
    if missing:
        raise InputError(f"{where} names {min(missing)!r}, which is not there")
    return [found.get(name) for name in names]


def read_member(archive: Path, stamp: str, place: Sequence[int], most: int = _MOST_BYTES) -> bytes:
    """The bytes of one file in a ZIP, checked.

    `zipfile` would keep the whole directory in memory in each process, half a gigabyte for ImageNet.

    Args:
        archive: the ZIP.
        stamp: its `stamp_of_zip`.
        place: see `Place`.
        most: more bytes than this are refused.

    Raises:
        OSError, ValueError, zlib.error: it cannot be read, or is not what the directory says.
    """
    offset, packed, size, check_sum, method = place
    if max(packed, size) > most:
        raise ValueError(f"it claims {max(packed, size)} bytes, {most} are the most")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("packed in a way that is not supported; store or deflate it, without encryption")
    file = _opened(str(archive), stamp)
    header = file.read_at(_HEADER.size, offset)
    if len(header) < _HEADER.size or not header.startswith(b"PK\3\4"):
        raise ValueError("it is not where the directory of the ZIP says; the file is damaged")
    _, name_length, extra_length = _HEADER.unpack(header)
    content: bytes = file.read_at(packed, offset + _HEADER.size + name_length + extra_length)
    if method == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(size, 1))
    if len(content) != size or zlib.crc32(content) != check_sum:
        raise ValueError("its length or check sum is wrong; the file is damaged")
    return content


@lru_cache(maxsize=4)
def _opened(archive: str, stamp: str) -> pa.OSFile:
    """The file, opened once a process. Reads name their offset, so forks and threads may share it."""
    return pa.OSFile(archive)


def _place(member: zipfile.ZipInfo) -> Place:
    encrypted = member.flag_bits & 1
    method = -1 if encrypted else member.compress_type
    return member.header_offset, member.compress_size, member.file_size, member.CRC, method


def _image_names(names: Mapping[str, object]) -> list[str]:
    """Files that should be images by their names; hidden ones are left out."""
    suffixes = {NPY_SUFFIX, *ImageFolder.EXTENSIONS}
    return sorted(
        name
        for name in names
        if os.path.splitext(name)[1].lower() in suffixes and not re.search(r"(^|/)(\.|__)", name)
    )
