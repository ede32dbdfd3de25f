"""What the place of a file says of its class; decided on names alone.

- The class of an image is the first folder below the root or the split, however deep the image lies:
  cats/persian/0.png is of class cats, n01443537/images/0.JPEG of n01443537.
- An image above all folders has no class. If all are such, there are no classes.
- If some images have a class and others do not, if a class has no images, or if one folder is linked under
  two classes, there is no telling what the labels are; that is a `problem`.
- Folders 00000, 00001, … of img00000000.png, … are how a `dataset.json` numbers its files, and no classes.
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
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # of Unicode: control characters, halves of one, ends of lines


class FolderLabels(NamedTuple):
    """What `labels_by_folder` finds.

    Attributes:
        class_names: in alphabetical order, None if there are none.
        labels: the number of each image's class, None without classes.
        why_none: why there are no classes, "" if there are some.
        problem: what keeps the labels from being told, for those who want them; "" if nothing does.
    """

    class_names: tuple[str, ...] | None
    labels: list[int | None]
    why_none: str = ""
    problem: str = ""


def labels_by_folder(
    images: Sequence[str],
    others: Sequence[str],
    folders: Sequence[str],
    again: Mapping[str, str],
    where: str,
) -> FolderLabels:
    """The classes of images by their folders; see the module.

    Args:
        images: names of the images from the root or split on, with "/" between folders.
        others: names of files that are no images.
        folders: names of all folders.
        again: links to folders that are among `folders`, and to which.
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
    """Folders in a class, however deep, that are splits or look like some: "train and test of cats".

    "" if there are none. All images of a class are taken together, those of a test split too.
    """
    inside: dict[str, dict[str, None]] = {}  # the folders in each
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
