"""List a folder of images: its splits, its classes, and the files that are left out."""

from collections.abc import Sequence
from pathlib import Path

from tvmatch.data.findings import LeftOut, Notes
from tvmatch.data.images.folders.image_formats import files_like, formats_in_words, image_suffixes, suffix_of
from tvmatch.data.images.folders.layout import class_of, labels_by_folder, splits_within_classes
from tvmatch.data.images.folders.splits import SPLIT_OF, find_splits
from tvmatch.data.images.folders.walk import Level, Tree, level, stamp
from tvmatch.data.images.listing import Listing, digest
from tvmatch.errors import InputError, name_of


def choose_split(root: Path, tree: Tree, split: str) -> str:
    """The folder of a split relative to the root of a data set, "" if the whole data set is that split.

    Args:
        root: folder of the data set.
        tree: its content.
        split: name of the split, or of a folder if names are ambiguous.

    Raises:
        InputError: there is no such split, or names are ambiguous.
    """
    top = level(root)
    images, _ = parted(tree.files)
    holding = {class_of(name) for name in [*images, *tree.again]} | set(tree.again)
    folders = [name for name in top.folders if name in holding or name.lower() in SPLIT_OF]
    found = find_splits(Level(folders, top.images), lambda name: level(root / name), str(root))
    return found.choose(split, str(root))


def list_images(root: Path, folder: str, tree: Tree) -> tuple[Listing, str]:
    """The images of a split, folder by folder, with their classes, and a stamp that changes with the files.

    Args:
        root: folder of the data set.
        folder: of the split, relative to the root; "" for the whole data set.
        tree: content of that folder.

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
    """Names of images, and of other files."""
    suffixes = image_suffixes()
    images = [name for name in files if suffix_of(name) in suffixes]
    return images, [name for name in files if suffix_of(name) not in suffixes]


def without(left_out: LeftOut, others: Sequence[str]) -> LeftOut:
    """`left_out` together with files that are not images."""
    together = LeftOut(left_out)
    for name in others:
        together.add(files_like(name), name)
    return together


def described(others: Sequence[str]) -> str:
    """The formats of other files, for a message about missing images."""
    return f", but {formats_in_words(others)}" if others else ""


def check_classes_hold_no_splits(images: Sequence[str], where: str) -> None:
    """Refuse splits within classes.

    Raises:
        InputError: names them.
    """
    within = splits_within_classes(images)
    if within:
        raise InputError(
            "data.path",
            f"{where} holds {within}: splits must be folders above the classes; move "
            f"them there, or give the folder that holds them as {name_of('data.path')}",
        )


def _all_folders(tree: Tree) -> list[str]:
    """All folders, including links to folders listed elsewhere, which may name a class."""
    return [*tree.folders, *tree.again]
