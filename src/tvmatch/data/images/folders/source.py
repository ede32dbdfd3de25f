"""A folder of images as a listing: its splits, its classes, and what is left out."""

from collections.abc import Sequence
from pathlib import Path

from tvmatch.data.findings import LeftOut, Notes
from tvmatch.data.images.folders.image_formats import (
    files_like,
    formats_in_words,
    image_suffixes,
    suffix_of,
)
from tvmatch.data.images.folders.layout import class_of, labels_by_folder, splits_within_classes
from tvmatch.data.images.folders.splits import SPLIT_OF, find_splits
from tvmatch.data.images.folders.walk import Level, Tree, level, stamp
from tvmatch.data.images.listing import Listing, digest
from tvmatch.errors import InputError, name_of


def choose_split(root: Path, tree: Tree, split: str) -> str:
    """The folder of a split below the root of a data set, "" if the whole is that split.

    Args:
        root: the data set's folder.
        tree: what lies in it.
        split: the name of a split or, where names are unclear, of a folder.

    Raises:
        InputError: there is no such split, or it cannot be told from other folders.
    """
    top = level(root)
    images, _ = parted(tree.files)
    holding = {class_of(name) for name in [*images, *tree.again]} | set(tree.again)
    folders = [name for name in top.folders if name in holding or name.lower() in SPLIT_OF]
    found = find_splits(Level(folders, top.images), lambda name: level(root / name), str(root))
    return found.choose(split, str(root))


def list_images(root: Path, folder: str, tree: Tree) -> tuple[Listing, str]:
    """The images of a split, folder by folder, with their classes, and a stamp of their files.

    Args:
        root: the data set's folder.
        folder: that of the split in it, "" if it is the whole.
        tree: what lies in that.

    Raises:
        InputError: a file cannot be read, there are no images, or a class holds splits.
    """
    where = root / folder
    images, others = parted(tree.files)
    if not images:
        raise InputError("data.path", f"{where} holds no images{described(others)}")
    check_classes_hold_no_splits(images, str(where))
    found = labels_by_folder(images, others, _all_folders(tree), tree.again, str(where))
    stamps = [stamp(f"{where}/{image}") for image in images]
    inner = f"{folder}/" if folder else ""
    notes = Notes(without(tree.left_out, others), found.why_none, found.problem)
    listing = Listing([inner + image for image in images], found.labels, found.class_names, notes=notes)
    files = (f"{name} {changed}" for name, changed in zip(listing.names, stamps, strict=True))
    return listing, digest("images", folder, repr(found.class_names), *files, repr(found.labels))


def parted(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files that are images by their names, and the others."""
    suffixes = image_suffixes()
    images = [name for name in files if suffix_of(name) in suffixes]
    return images, [name for name in files if suffix_of(name) not in suffixes]


def without(left_out: LeftOut, others: Sequence[str]) -> LeftOut:
    """What is left out, and files that are no images by their names."""
    together = LeftOut(left_out)
    for name in others:
        together.add(files_like(name), name)
    return together


def described(others: Sequence[str]) -> str:
    """What there is in place of images, for a message."""
    return f", but {formats_in_words(others)}" if others else ""


def check_classes_hold_no_splits(images: Sequence[str], where: str) -> None:
    """Refuse splits below classes.

    Raises:
        InputError: naming them.
    """
    within = splits_within_classes(images)
    if within:
        raise InputError(
            "data.path",
            f"{where} holds {within}: splits are folders of the data set, above its classes; move "
            f"them there, or give the folder that holds them as {name_of('data.path')}",
        )


def _all_folders(tree: Tree) -> list[str]:
    """With links that are not walked through a second time, which may name a class."""
    return [*tree.folders, *tree.again]
