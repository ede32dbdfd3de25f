"""ZIPs of images with a `dataset.json`, as used by EDM (arXiv 2206.00364), and the same files unpacked.

They hold image files or NPY arrays, `00000/img00000000.png` and so on; `dataset.json` has their classes:
{"labels": [["00000/img00000000.png", 3], …]} or {"labels": null}. ZIPs are read without unpacking.
"""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]

from tvmatch.data.findings import LeftOut, Notes, printable
from tvmatch.data.images.folders.image_formats import files_like, image_suffixes, suffix_of
from tvmatch.data.images.folders.layout import class_of, labels_by_folder
from tvmatch.data.images.folders.source import check_classes_hold_no_splits
from tvmatch.data.images.folders.splits import ONE_SPLIT, SPLIT_OF, find_splits
from tvmatch.data.images.folders.walk import HIDDEN, Level, is_hidden, stamp, walk
from tvmatch.data.images.listing import Listing, digest
from tvmatch.data.npy import NPY_SUFFIX
from tvmatch.data.spec import MOST_CLASSES
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import LFS_POINTER, is_lfs_pointer

DESCRIPTION = "dataset.json"
NO_LABELS = f"{DESCRIPTION} is missing, or has none"
Place = tuple[int, int, int, int, int]  # offset of the header, bytes packed and unpacked, CRC-32, method

_MOST_BYTES = 2**28  # of one image or array
_MOST_JSON_BYTES = 2**30
_TAIL = 2**16  # bytes at the end of a ZIP that are hashed: part of its directory, with check sums of files
_HEADER = struct.Struct("<4s22xHH")  # of a file: signature, lengths of its name and extra field


def stamp_of_zip(archive: Path) -> str:
    """Hash of the modification time, the size and the end of a ZIP, to detect changes.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with archive.open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(status.st_size - _TAIL, 0))
            return digest(f"zip {status.st_mtime_ns} {status.st_size}", file.read())
    except OSError as error:
        raise InputError("data.path", f"{archive} cannot be read: {error.strerror or error}") from error


def list_zip(archive: Path, split: str) -> Listing:
    """The images of a split in a ZIP, in the order of their names.

    With a `dataset.json`, all images are one split and have its labels. Without it, folders are read as
    outside a ZIP (`folders.splits`, `folders.layout`), from the innermost folder that holds all images.

    Raises:
        InputError: the file is not a ZIP, is damaged, has a wrong `dataset.json`, or has no such split.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            # Of two members with the same name, the last one counts, as usual for ZIPs.
            members = {member.filename: member for member in opened.infolist()}
    except Exception as error:  # of several types for damaged directories
        raise InputError("data.path", f"{archive} is not a readable ZIP file: {one_line(error)}") from error
    files = {name: member for name, member in members.items() if not member.is_dir()}
    if DESCRIPTION not in files:
        return _by_folder(archive, files, sorted(set(members) - set(files)), split)
    ONE_SPLIT.choose(split, str(archive))
    images, left_out = _images(files)
    try:
        content = read_member(archive, stamp_of_zip(archive), _place(files[DESCRIPTION]), _MOST_JSON_BYTES)
    except Exception as error:
        raise InputError(
            "data.path", f"{DESCRIPTION} in {archive} cannot be read: {one_line(error)}"
        ) from error
    places = [_place(files[name]) for name in images]
    notes = Notes(left_out, NO_LABELS)
    return Listing(images, labels_of(content, images, archive), places=places, notes=notes)


def _by_folder(
    archive: Path, files: Mapping[str, zipfile.ZipInfo], empty: Sequence[str], split: str
) -> Listing:
    images, left_out = _images(files)
    suffixes = _suffixes()
    others = [name for name in files if suffix_of(name) not in suffixes and not _is_hidden(name)]
    whole = _Names(images, others, [name for name in empty if not _is_hidden(name)])
    top = whole.inside(_wrapper(whole.images))
    splits = find_splits(top.level(""), top.level, str(archive))
    inner = top.root + (f"{folder}/" if (folder := splits.choose(split, str(archive))) else "")
    chosen = whole.inside(inner)
    where = f"{archive}/{inner}".rstrip("/")
    check_classes_hold_no_splits(chosen.images, where)
    found = labels_by_folder(chosen.images, chosen.others, chosen.folders(), {}, where)
    names = [inner + image for image in chosen.images]
    why = f"{NO_LABELS}, and {found.why_none}" if found.why_none else ""
    return Listing(
        names,
        found.labels,
        found.class_names,
        places=[_place(files[name]) for name in names],
        notes=Notes(left_out, why, found.problem),
    )


class _Names(NamedTuple):
    """Names of images, other files and empty folders, relative to `root`."""

    images: list[str]
    others: list[str]
    empty: list[str]
    root: str = ""

    def inside(self, folder: str) -> "_Names":
        """The names in a folder, "" or with "/" at the end."""
        images, others, empty = (
            [name[len(folder) :] for name in names if name.startswith(folder) and name != folder]
            for names in (self.images, self.others, self.empty)
        )
        return _Names(images, others, empty, self.root + folder)

    def folders(self) -> list[str]:
        """Names of the folders directly in the root."""
        return sorted(set(map(class_of, [*self.images, *self.others, *self.empty])) - {""})

    def level(self, folder: str) -> Level:
        """The content of a folder of the root; of its folders, those with images or with a split's name."""
        here = self.inside(f"{folder}/" if folder else "")
        holding = set(map(class_of, here.images)) - {""}
        folders = [name for name in here.folders() if name in holding or name.lower() in SPLIT_OF]
        return Level(folders, [image for image in here.images if "/" not in image])


def _wrapper(images: Sequence[str]) -> str:
    """The innermost folder of all images that holds folders and is not a split, "" if there is none."""
    root = ""
    while True:
        tops = {class_of(image[len(root) :]) for image in images}
        top = min(tops, default="")
        inner = f"{root}{top}/"
        if len(tops) != 1 or not top or top.lower() in SPLIT_OF:
            return root
        if not any("/" in image[len(inner) :] for image in images):
            return root
        root = inner


def list_folder(folder: Path) -> tuple[Listing, str]:
    """The images of an unpacked ZIP, in the order of their names, and a stamp that changes with the files.

    Raises:
        InputError: a file cannot be read, or `dataset.json` is wrong.
    """
    tree = walk(folder)
    images, left_out = _images(tree.files)
    try:
        content = (folder / DESCRIPTION).read_bytes()
    except OSError as error:
        raise InputError(
            "data.path", f"{printable(str(error.filename))}: {error.strerror or error}"
        ) from error
    stamps = digest("folder", content, *(f"{name} {stamp(f'{folder}/{name}')}" for name in images))
    notes = Notes(LeftOut(tree.left_out | left_out), NO_LABELS)
    return Listing(images, labels_of(content, images, folder), notes=notes), stamps


def labels_of(description: bytes, names: Sequence[str], root: Path) -> list[int | None]:
    """The class number of each file, None for a file without a label.

    Args:
        description: content of `dataset.json`.
        names: of the files.
        root: folder or ZIP, for messages.

    Raises:
        InputError: it is not JSON of this form, or names a missing file or a class outside 0 … 99,999.
    """
    where = f"{DESCRIPTION} of {root}"
    if is_lfs_pointer(description):
        raise InputError("data.path", f"{where} is {LFS_POINTER}")
    try:
        given = json.loads(description)["labels"]
    except (ValueError, RecursionError) as error:
        raise InputError("data.path", f"{where} is not readable JSON: {one_line(error)}") from error
    except (KeyError, TypeError):
        given = False
    if given is None:
        return [None] * len(names)
    expected = f'{where} must be {{"labels": [[file, class], …]}} or {{"labels": null}}'
    if not isinstance(given, list):
        raise InputError("data.path", expected)
    found: dict[str, int] = {}
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise InputError("data.path", f"{expected}, got {pair!r:.60}")
        name, label = pair
        if type(label) is not int or not 0 <= label < MOST_CLASSES:  # a bool is an int, but no class
            raise InputError(
                "data.path",
                f"{where}: the class of {name!r} must be a number 0 … {MOST_CLASSES - 1}, got {label!r:.60}",
            )
        found[name] = label
    missing = found.keys() - set(names)
    if missing:
        raise InputError("data.path", f"{where} names {min(missing)!r}, which is missing or no image")
    return [found.get(name) for name in names]


def read_member(archive: Path, stamp: str, place: Sequence[int], most: int = _MOST_BYTES) -> bytes:
    """Read a file in a ZIP and verify its size and check sum.

    `zipfile` would keep the whole directory in the memory of each process, half a gigabyte for ImageNet.

    Args:
        archive: the ZIP.
        stamp: its `stamp_of_zip`.
        place: location of the file, see `Place`.
        most: maximum size in bytes.

    Raises:
        OSError, ValueError, zlib.error: the file cannot be read, or does not fit the directory.
    """
    offset, packed, size, check_sum, method = place
    if max(packed, size) > most:
        raise ValueError(f"it claims {max(packed, size)} bytes, at most {most} are supported")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("its compression is not supported; store or deflate it, without encryption")
    file = _opened(str(archive), stamp)
    header = file.read_at(_HEADER.size, offset)
    if len(header) < _HEADER.size or not header.startswith(b"PK\3\4"):
        raise ValueError("it is missing where the directory of the ZIP says; the ZIP is damaged")
    _, name_length, extra_length = _HEADER.unpack(header)
    content: bytes = file.read_at(packed, offset + _HEADER.size + name_length + extra_length)
    if method == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(size, 1))
    if len(content) != size or zlib.crc32(content) != check_sum:
        raise ValueError("its length or check sum is wrong; the ZIP is damaged")
    return content


@lru_cache(maxsize=4)
def _opened(archive: str, stamp: str) -> pa.OSFile:
    """The ZIP, opened once per process. Reads have explicit offsets, so forks and threads can share it."""
    return pa.OSFile(archive)


def _place(member: zipfile.ZipInfo) -> Place:
    encrypted = member.flag_bits & 1
    method = -1 if encrypted else member.compress_type
    return member.header_offset, member.compress_size, member.file_size, member.CRC, method


def _images(names: Iterable[str]) -> tuple[list[str], LeftOut]:
    """Names of images, sorted, and the other files."""
    suffixes, images, left_out = _suffixes(), [], LeftOut()
    for name in sorted(names):
        if _is_hidden(name):
            left_out.add(HIDDEN, name)
        elif suffix_of(name) in suffixes:
            images.append(name)
        elif name != DESCRIPTION:
            left_out.add(files_like(name), name)
    return images, left_out


def _suffixes() -> frozenset[str]:
    return image_suffixes() | {NPY_SUFFIX}


def _is_hidden(name: str) -> bool:
    *folders, file = name.split("/")
    return any(is_hidden(folder, folder=True) for folder in folders) or is_hidden(file, folder=False)
