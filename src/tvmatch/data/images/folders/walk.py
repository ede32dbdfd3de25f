"""Walk a folder of images: every file once, in the order of names, whatever links it contains.

Hidden and system files are left out and counted; docs/folders.md lists them.
"""

import heapq
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tvmatch.data.findings import LeftOut, printable
from tvmatch.data.images.folders.image_formats import image_suffixes, suffix_of
from tvmatch.errors import InputError

_SYSTEM = frozenset(
    {
        *("lost+found", "$recycle.bin", "system volume information", "#recycle", "#snapshot"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
HIDDEN = "hidden files and folders, or the system's"
IN_A_CIRCLE = "links to a folder above"
TWICE = "folders linked a second time"
SPECIAL = "neither file nor folder"
TO_NOTHING = "links to nothing"


class Tree(NamedTuple):
    """The content of a folder and its subfolders; names are relative to it, with "/" between folders.

    Attributes:
        files: all but hidden ones, sorted folder by folder.
        folders: all visited ones, sorted, without the root.
        again: links to folders visited elsewhere, with the name of the visit.
        left_out: everything else.
    """

    files: list[str]
    folders: list[str]
    again: dict[str, str]
    left_out: LeftOut


class Level(NamedTuple):
    """The direct content of a folder.

    Attributes:
        folders: names of its folders, sorted, without hidden ones.
        images: names of its images, sorted.
    """

    folders: list[str]
    images: list[str]


def is_hidden(name: str, *, folder: bool) -> bool:
    """Whether a name is that of a hidden or system file or folder."""
    return name.startswith((".", "@", "__") if folder else ".") or name.lower() in _SYSTEM


def walk(root: Path) -> Tree:
    """List a folder and its subfolders, following links to folders.

    No folder is visited twice, so cycles of links end and images count once. Folders are visited before links
    to them, so the result does not depend on the names of links.

    Raises:
        InputError: a folder cannot be read.
    """
    tree = Tree([], [], {}, LeftOut())
    top = os.fspath(root)
    seen = {_identity(top): ""}
    above = {_identity(os.fspath(folder)) for folder in Path(os.path.realpath(top)).parents}
    waiting, links = [""], list[tuple[list[str], str]]()
    while waiting or links:
        inner = waiting.pop() if waiting else heapq.heappop(links)[1]
        path = f"{top}/{inner}" if inner else top
        if inner:
            identity = _identity(path)
            first = seen.setdefault(identity, inner)
            if identity in above or first == "" or inner.startswith(f"{first}/"):
                tree.left_out.add(IN_A_CIRCLE, inner)
                continue
            if first != inner:
                tree.again[inner] = first
                tree.left_out.add(TWICE, inner)
                continue
            tree.folders.append(inner)
        for entry in _entries(path):
            name = f"{inner}/{entry.name}" if inner else entry.name
            folder = _is(entry, "folder")
            if is_hidden(entry.name, folder=folder):
                tree.left_out.add(HIDDEN, name)
            elif folder and entry.is_symlink():
                heapq.heappush(links, (name.split("/"), name))
            elif folder:
                waiting.append(name)
            elif _is(entry, "file"):
                tree.files.append(name)
            elif not os.path.exists(entry.path):
                if suffix_of(name):  # kept: reading the file will report it
                    tree.files.append(name)
                else:  # perhaps to a folder
                    tree.left_out.add(TO_NOTHING, name)
            else:
                tree.left_out.add(SPECIAL, name)
    tree.files.sort(key=_parts)
    tree.folders.sort(key=_parts)
    return tree


def level(folder: Path) -> Level:
    """List the direct content of a folder.

    Raises:
        InputError: the folder cannot be read.
    """
    folders, images = [], []
    for entry in _entries(os.fspath(folder)):
        is_folder = _is(entry, "folder")
        if is_hidden(entry.name, folder=is_folder):
            continue
        if is_folder:
            folders.append(entry.name)
        elif suffix_of(entry.name) in image_suffixes():
            images.append(entry.name)
    return Level(sorted(folders), sorted(images))


def stamp(path: str) -> str:
    """Modification time and size of a file, to detect changes.

    Raises:
        InputError: the file cannot be read, for example a broken link.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{status.st_mtime_ns} {status.st_size}"


def _parts(name: str) -> list[str]:
    return name.split("/")


def _entries(folder: str) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            yield from list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is(entry: "os.DirEntry[str]", kind: str) -> bool:
    """Whether an entry is a folder or a file, also through a link; accesses the disk for links only."""
    try:
        return entry.is_dir() if kind == "folder" else entry.is_file()
    except OSError:  # a cycle of links
        return False


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError("data.path", f"{printable(path)}: {error.strerror or error}")
