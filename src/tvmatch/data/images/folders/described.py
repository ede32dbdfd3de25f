"""Local files read by `datasets`: tables, and folders of images with a metadata.csv."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.data_files import DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from tvmatch.data.findings import printable
from tvmatch.data.images.folders.image_formats import suffix_of
from tvmatch.data.images.folders.layout import class_of
from tvmatch.data.images.folders.splits import SPLIT_OF, look_like_splits
from tvmatch.data.images.folders.walk import stamp
from tvmatch.errors import InputError


def is_description(name: str) -> bool:
    """Whether a file describes the images of a folder, in the layout of `datasets`."""
    return name.rpartition("/")[2] in ImageFolder.METADATA_FILENAMES


def described_images(root: Path, files: Sequence[str], folder: str) -> dict[str, list[Path]]:
    """The images of each split, followed by its descriptions.

    Args:
        root: folder of the data set.
        files: names of its files, sorted.
        folder: of the requested split; "" if the data set is one split.
    """

    def split_of(name: str) -> str | None:
        top = class_of(name)
        return "train" if not folder else SPLIT_OF.get(top.lower(), top if top == folder else None)

    groups: dict[str, list[Path]] = defaultdict(list)
    images = [name for name in files if suffix_of(name) in ImageFolder.EXTENSIONS]
    for name in [*images, *filter(is_description, files)]:
        split = split_of(name)
        if split is not None and (split in groups or not is_description(name)):
            groups[split].append(root / name)
    return dict(groups)


def tables_by_split(path: str, root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Group tables by split: all are "train" unless they or their top folders are named like splits.

    Raises:
        InputError: only some are named like splits, or the names resemble those of splits; reading all of
            them could train on test images.
    """
    split_of = {file: _split_of_table(root, file) for file in files}
    found = sorted(set(filter(None, split_of.values())))
    others = [file for file, split in split_of.items() if split is None]
    if found and others:
        raise InputError(
            "data.path",
            f"{path} holds splits ({', '.join(found)}) and also {printable(str(others[0]))}; move "
            "that away, or name one split's folder or file",
        )
    for names in ({file.stem for file in files}, {file.relative_to(root).parts[0] for file in files}):
        alike = look_like_splits(sorted(names)) if others else []
        if alike:
            raise InputError(
                "data.path",
                f"{path} holds {', '.join(map(printable, alike))}, which look like splits, but "
                "those are called train, validation or test; give one folder or file, or rename them",
            )
    groups: dict[str, list[Path]] = defaultdict(list)
    for file, split in split_of.items():
        groups[split or "train"].append(file)
    return dict(groups)


def data_files_of(files: Mapping[str, Sequence[Path]]) -> dict[str, DataFilesList]:
    """Files with their stamps, by which `datasets` detects changes. (Patterns would not follow links.)"""
    return {
        split: DataFilesList(
            [str(file.absolute()) for file in found], [(stamp(str(file)),) for file in found]
        )
        for split, found in files.items()
    }


def _split_of_table(root: Path, file: Path) -> str | None:
    """The split in a table's name (train-00000-of-00002.parquet) or top folder (train/0.parquet)."""
    word = re.match(r"[a-z]*", file.stem.lower())
    top = file.relative_to(root).parts[0].lower()
    return SPLIT_OF.get(word[0] if word else "") or SPLIT_OF.get(top)
