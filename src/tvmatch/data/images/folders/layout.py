"""Classes of images by their folders, from names alone; docs/folders.md has the rules.

The class is the first folder below the root or the split. Ambiguous labels are reported as a `problem`, an
error only for users who want labels.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tvmatch.data.findings import printable
from tvmatch.data.images.folders.image_formats import formats_in_words
from tvmatch.data.images.folders.splits import SPLIT_OF, look_like_splits

FLAT = "its images lie in no subfolders"
_NUMBERED = re.compile(r"\d{5}/img\d{8}\.\w+")
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, line and paragraph separators


class FolderLabels(NamedTuple):
    """Result of `labels_by_folder`.

    Attributes:
        class_names: in alphabetical order, None without classes.
        labels: class number of each image, None without classes.
        why_none: why there are no classes, "" if there are classes.
        problem: why labels are ambiguous, "" if they are not.
    """

    class_names: tuple[str, ...] | None
    labels: list[int | None]
    why_none: str = ""
    problem: str = ""


def labels_by_folder(
    images: Sequence[str], others: Sequence[str], folders: Sequence[str], again: Mapping[str, str], where: str
) -> FolderLabels:
    """Find the classes of images by their folders.

    Args:
        images: names of the images relative to the root or split, with "/" between folders.
        others: names of the other files.
        folders: names of all folders.
        again: names of folders in `folders` that are links to other ones, with their targets.
        where: path of the root or split, for messages.
    """
    none: list[int | None] = [None] * len(images)
    classes = [class_of(image) for image in images]
    names = tuple(sorted(set(filter(None, classes))))
    if not names:
        return FolderLabels(None, none, FLAT)
    if all(map(_NUMBERED.fullmatch, images)):
        return FolderLabels(None, none, "its folders are only numbered")
    problem = (
        _image_without_class(images, where)
        or _folder_of_two_classes(again, where)
        or _class_without_images(names, others, folders, where)
        or _unprintable_class(names, where)
    )
    if problem:
        return FolderLabels(None, none, "", problem)
    numbers = {name: number for number, name in enumerate(names)}
    return FolderLabels(names, [numbers[name] for name in classes])


def class_of(name: str) -> str:
    """The first folder of a name, "" if there is none."""
    first, slash, _ = name.partition("/")
    return first if slash else ""


def splits_within_classes(images: Sequence[str]) -> str:
    """Folders within a class that are or resemble splits, as in "train and test of cats"; "" without any."""
    inside: dict[str, dict[str, None]] = {}  # subfolders of each folder
    for path in dict.fromkeys(image.rpartition("/")[0] for image in images):
        folders = path.split("/")
        for depth in range(1, len(folders)):
            inside.setdefault("/".join(folders[:depth]), {})[folders[depth]] = None
    for folder, names in inside.items():
        splits = {SPLIT_OF[name.lower()]: name for name in names if name.lower() in SPLIT_OF}
        both = list(splits.values()) if "train" in splits and len(splits) > 1 else []
        if alike := both or look_like_splits(names):
            return f"{' and '.join(map(printable, alike))} of {printable(folder)}"
    return ""


def _image_without_class(images: Sequence[str], where: str) -> str:
    stray = [image for image in images if "/" not in image]
    if not stray:
        return ""
    more = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
    return (
        f"{where}/{printable(stray[0])}{more} has no class, which is the first folder below "
        f"{where}, where other images lie; move it into one, move it away"
    )


def _folder_of_two_classes(again: Mapping[str, str], where: str) -> str:
    for link, first in again.items():
        if link.split("/")[0] != first.split("/")[0]:
            return (
                f"{where}/{printable(link)} and {where}/{printable(first)} are one folder, of "
                f"two classes; remove one of them"
            )
    return ""


def _class_without_images(
    names: Sequence[str], others: Sequence[str], folders: Sequence[str], where: str
) -> str:
    for folder in folders:
        if "/" in folder or folder in names:
            continue
        files = [name for name in others if class_of(name) == folder]
        holds = f"holds no images that can be read, but {formats_in_words(files)}" if files else "is empty"
        return f"{where}/{printable(folder)} {holds}: a class without images; fill it, remove it"
    return ""


def _unprintable_class(names: Sequence[str], where: str) -> str:
    for name in names:
        if any(unicodedata.category(character) in _CONTROL for character in name):
            return (
                f"{where}/{printable(name)} cannot name a class, it has control characters or is "
                f"not in UTF-8; rename it"
            )
    return ""
