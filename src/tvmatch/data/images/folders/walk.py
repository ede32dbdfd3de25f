"""Walks a folder of images: every file once, in the order of the names, whatever links lie in it.

What operating systems and their programs leave behind is left out and counted: hidden files and folders
(.DS_Store, .thumbnails), folders named @… (@eaDir) and __… (__MACOSX), and the names of `_SYSTEM`.
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
    """What lies below a folder; all names are relative to it, with "/" between folders.

    Attributes:
        files: all but hidden ones, sorted folder by folder.
        folders: all that were walked through, sorted likewise; without the root.
        again: links to folders that were walked through elsewhere, and under which name.
        left_out: what is in none of these.
    """

    files: list[str]
    folders: list[str]
    again: dict[str, str]
    left_out: LeftOut


class Level(NamedTuple):
    """What lies directly in a folder.

    Attributes:
        folders: names of its folders, sorted, hidden ones left out.
        images: names of its files that are images.
    """

    folders: list[str]
    images: list[str]


def is_hidden(name: str, *, folder: bool) -> bool:
    """Whether a file or folder is none of the user's data by its name."""
    return name.startswith((".", "@", "__") if folder else ".") or name.lower() in _SYSTEM


def walk(root: Path) -> Tree:
    """Everything below a folder, through links to folders too.

    No folder is walked through twice, so that links in a circle end and images count once. Folders come
    before links to them, so that what is called a second time does not depend on the names of links.

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
                if suffix_of(name):  # kept: whoever reads the file tells of it
                    tree.files.append(name)
                else:  # perhaps to a folder
                    tree.left_out.add(TO_NOTHING, name)
            else:
                tree.left_out.add(SPECIAL, name)
    tree.files.sort(key=_parts)
    tree.folders.sort(key=_parts)
    return tree


def level(folder: Path) -> Level:
    """What lies directly in a folder.

    Raises:
        InputError: it cannot be read.
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
    """Time of change and size of a file, which tell one state of it from another.

    Raises:
        InputError: it cannot be read, such as a link to nothing.
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
    """Whether an entry is a folder or a file, perhaps through a link; asks the disk for links alone."""
    try:
        return entry.is_dir() if kind == "folder" else entry.is_file()
    except OSError:  # links that lead to each other
        return False


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError("data.path", f"{printable(path)}: {error.strerror or error}")
