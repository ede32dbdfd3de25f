"""ImageNet in its standard layout, `ILSVRC/Data/CLS-LOC/{train,val,test}`.

`train` has one folder for each class, named by its WordNet id. `val` is flat, or has the same folders.
Beside the images, Kaggle's archive has `LOC_synset_mapping.txt` (names of the classes) and
`LOC_val_solution.csv` (labels of a flat `val`).
"""

import csv
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tvmatch.data.findings import Notes, printable
from tvmatch.data.images.folders.layout import class_of, labels_by_folder
from tvmatch.data.images.folders.source import parted, without
from tvmatch.data.images.folders.walk import level, stamp, walk
from tvmatch.data.images.listing import Listing, digest
from tvmatch.errors import InputError, one_line

_WORDNET_ID = re.compile(r"n\d{8}")
_SPLITS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
_LAYOUT = ("CLS-LOC", "Data", "ILSVRC")  # innermost first
_NAMES = "LOC_synset_mapping.txt"
_SOLUTION = "LOC_val_solution.csv"
_NO_ANSWERS = f"there are no class folders, and no {_SOLUTION} next to the images"


class ImageNet(NamedTuple):
    """Paths of the parts.

    Attributes:
        root: the folder of `train` and `val`.
        splits: folder of each existing split.
        beside: folders that may hold class names and labels, the nearest first.
    """

    root: Path
    splits: dict[str, Path]
    beside: tuple[Path, ...]

    def file(self, name: str) -> Path | None:
        """The first file of this name next to the images, None if there is none."""
        return next((folder / name for folder in self.beside if (folder / name).is_file()), None)


def find_imagenet(folder: Path) -> ImageNet | None:
    """Find ImageNet in or below `folder`; None if it holds something else."""
    for inner in ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        root = Path(os.path.abspath(folder), inner)
        splits = {
            split: root / name for split, names in _SPLITS.items() for name in names if (root / name).is_dir()
        }
        found = ImageNet(root, splits, tuple(_beside(root)))
        labelled = [splits[split] for split in ("train", "validation") if split in splits]
        classes = [name for split in labelled for name in _folders(split)]
        has_answers = "validation" in splits and found.file(_SOLUTION) is not None
        if all(map(_WORDNET_ID.fullmatch, classes)) and (classes or has_answers):
            return found
    return None


def list_imagenet(imagenet: ImageNet, split: str) -> tuple[Listing, str]:
    """The images of a split, with classes in the order of their WordNet ids, and a stamp of the files.

    Images of a flat `val` or `test` without a file of labels have no label.

    Raises:
        InputError: a file cannot be read or contradicts another.
    """
    folder = imagenet.splits[split]
    tree = walk(folder)
    images, others = parted(tree.files)
    images.sort()
    found = labels_by_folder(images, others, [*tree.folders, *tree.again], tree.again, str(folder))
    flat = not any("/" in image for image in images)
    answers = _answers(imagenet) if split == "validation" and flat else None
    ids = _class_ids(imagenet, answers)
    numbers = {wordnet_id: number for number, wordnet_id in enumerate(ids)}

    def label(image: str) -> int | None:
        if found.problem or (flat and answers is None):
            return None
        wordnet_id = class_of(image) or (answers or {}).get(image.split(".")[0], "")
        if wordnet_id not in numbers:
            which = (
                f"class {wordnet_id!r}, which is none of the {len(ids)}" if wordnet_id else "no known class"
            )
            raise InputError("data.path", f"{printable(str(folder / image))} is of {which}")
        return numbers[wordnet_id]

    labels = [label(image) for image in images]
    class_names = _class_names(ids, imagenet.file(_NAMES)) or None
    files = (f"{image} {stamp(f'{folder}/{image}')}" for image in images)
    stamps = digest(folder.name, repr(class_names), *files, repr(labels))
    notes = Notes(without(tree.left_out, others), _NO_ANSWERS, found.problem)
    return Listing([f"{folder.name}/{image}" for image in images], labels, class_names, notes=notes), stamps


def _beside(root: Path) -> list[Path]:
    """The folder of the splits and, as long as their names are those of ImageNet's layout, its parents."""
    folders = [root]
    for name in _LAYOUT:
        if folders[-1].name != name:
            break
        folders.append(folders[-1].parent)
    return folders


def _folders(folder: Path) -> list[str]:
    return level(folder).folders


def _class_ids(imagenet: ImageNet, answers: dict[str, str] | None) -> list[str]:
    """The WordNet ids of all classes, from the training images if there are any."""
    for split in ("train", "validation"):
        if split in imagenet.splits and (found := _folders(imagenet.splits[split])):
            return found
    names = imagenet.file(_NAMES)
    return sorted(_mapping(names)) if names is not None else sorted(set((answers or {}).values()))


def _class_names(ids: list[str], mapping: Path | None) -> tuple[str, ...]:
    """The first synonym of each class; all synonyms, or in addition the id, where that would be ambiguous.

    Without a mapping, the ids.
    """
    if mapping is None:
        return tuple(ids)
    words = _mapping(mapping)
    full = [words.get(wordnet_id, wordnet_id) for wordnet_id in ids]
    first = [text.split(",")[0] for text in full]
    once = Counter(first)
    names = [short if once[short] == 1 else text for short, text in zip(first, full, strict=True)]
    once = Counter(names)
    return tuple(
        name if once[name] == 1 else f"{name} ({wordnet_id})"
        for name, wordnet_id in zip(names, ids, strict=True)
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("data.path", f"{path} cannot be read: {one_line(error)}") from error


def _mapping(path: Path) -> dict[str, str]:
    """Synonyms by WordNet id, from lines "n01440764 tench, Tinca tinca"."""
    pairs = [line.strip().partition(" ") for line in _lines(path) if line.strip()]
    for wordnet_id, _, words in pairs:
        if not _WORDNET_ID.fullmatch(wordnet_id) or not words.strip():
            raise InputError(
                "data.path", f'{path} must have lines like "n01440764 tench", got {wordnet_id!r:.60}'
            )
    return {wordnet_id: words.strip() for wordnet_id, _, words in pairs}


def _answers(imagenet: ImageNet) -> dict[str, str] | None:
    """WordNet id of each validation image by its file name without the ending; None without a solution."""
    solution = imagenet.file(_SOLUTION)
    if solution is None:
        return None
    try:
        rows = list(csv.reader(_lines(solution)))
    except csv.Error as error:
        raise InputError("data.path", f"{solution} cannot be read: {error}") from error
    wrong = next((row for row in rows[1:] if len(row) != 2 or not _WORDNET_ID.match(row[1])), None)
    if wrong is not None or not rows or rows[0][:1] != ["ImageId"]:
        shown = ",".join(wrong if wrong is not None else rows[0] if rows else [])
        raise InputError(
            "data.path", f"{solution} must have lines like ImageId,n01751748 1 2 3 4, got {shown!r:.60}"
        )
    return {row[0]: row[1].split()[0] for row in rows[1:]}
