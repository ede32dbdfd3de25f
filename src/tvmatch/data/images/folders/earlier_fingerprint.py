"""What identified a folder of images when `datasets` listed it: latents that were made then stay valid."""

from pathlib import Path

import datasets

from tvmatch.data.images.folders.described import data_files_of, described_images, is_description
from tvmatch.data.images.folders.layout import class_of
from tvmatch.data.images.folders.source import choose_split, parted
from tvmatch.data.images.folders.walk import walk


def earlier_fingerprint(path: str, split: str, label_column: str | None) -> str | None:
    """What identified a split of a folder then, if it had the same images and labels as now, else None.

    The label was the name of the innermost folder, and classes were those of all splits together.

    Args:
        path: as `ImagesData.path`.
        split: as `ImagesData.split`.
        label_column: column of the labels, None without labels.

    Raises:
        InputError: the folder cannot be read, or has no such split.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        return None
    tree, name = walk(root), split.partition("[")[0]
    folder = choose_split(root, tree, name)
    images, _ = parted(walk(root / folder).files)
    groups = described_images(root, tree.files, folder)
    if any(map(is_description, tree.files)) or groups.get(name) != [
        root / folder / image for image in images
    ]:
        return None
    if label_column is not None:
        below = {
            split: [
                file.relative_to(root if not folder else root / _top(root, file)).as_posix() for file in files
            ]
            for split, files in groups.items()
        }
        everywhere = [file for files in below.values() for file in files]
        classes = set(map(class_of, everywhere))
        same_depth = all(file.count("/") == 1 for file in everywhere)
        if not same_depth or len(classes) < 2 or classes != set(map(class_of, below[name])):
            return None
    builder = datasets.load_dataset_builder("imagefolder", data_files=data_files_of(groups))
    fingerprint: str = builder._get_dataset_fingerprint(split)
    return fingerprint


def _top(root: Path, file: Path) -> str:
    return file.relative_to(root).parts[0]
