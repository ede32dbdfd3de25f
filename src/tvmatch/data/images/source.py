"""Open a folder, ImageNet, a ZIP, Parquet or Arrow files, or a data set on the Hub as rows of images."""

import re
from pathlib import Path

import datasets

from tvmatch.data.findings import Notes
from tvmatch.data.images.folders.described import (
    data_files_of,
    described_images,
    is_description,
    tables_by_split,
)
from tvmatch.data.images.folders.image_formats import suffix_of
from tvmatch.data.images.folders.source import choose_split, described, list_images, parted
from tvmatch.data.images.folders.splits import ONE_SPLIT, SPLIT_OF
from tvmatch.data.images.folders.walk import Tree, walk
from tvmatch.data.images.imagenet import ImageNet, find_imagenet, list_imagenet
from tvmatch.data.images.listing import Listing, as_rows, cache_error, cache_failure, digest
from tvmatch.data.images.rows import EncodedImages, Source
from tvmatch.data.images.zip_archive import DESCRIPTION, list_folder, list_zip, stamp_of_zip
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import expect_no_lfs_pointer
from tvmatch.storage.hub import dataset_commit

_TABLES = (".parquet", ".arrow")


def open_source(path: str, split: str) -> Source:
    """The rows of `split` of the data set at `path`.

    Raises:
        InputError: nothing is found, it cannot be read, or it has no such split.
    """
    local = Path(path).expanduser()
    if not path:
        raise InputError(
            "data.path", "give a folder, a .parquet, .arrow or .zip file, or the name of a Hub data set"
        )
    _check_split(split)
    if not local.exists():
        _check_hub(path)
        return _hashed(_load(path, split, path), path, split)
    if local.is_file():
        expect_no_lfs_pointer(local)
        if local.suffix.lower() == ".zip":
            return _open_zip(local, split)
        return _open_tables(path, split, {"train": [local]})
    if (local / DESCRIPTION).is_file():
        ONE_SPLIT.choose(split.partition("[")[0], path)
        listing, stamp = list_folder(local)
        return _open_listing(local, split, stamp, listing)
    imagenet = find_imagenet(local)
    if imagenet is not None:
        return _open_imagenet(path, imagenet, split)
    tree = walk(local)
    tables = [local / name for name in tree.files if _is_table(name)]
    if tables:
        for table in tables:
            expect_no_lfs_pointer(table)
        return _open_tables(path, split, tables_by_split(path, local, tables))
    images, others = parted(tree.files)
    if not images:
        raise InputError(
            "data.path", f"{path} holds no images and no .parquet or .arrow files{described(others)}"
        )
    return _open_folder(path, local, tree, split)


def _check_split(split: str) -> None:
    """Refuse a malformed name or slice."""
    match = re.fullmatch(r"[\w .-]+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not match:
        raise InputError("data.split", f"must be like train or train[:1000], got {split!r}")
    ends = [end for end in match.groups() if end is not None]
    if any(abs(int(end.rstrip("%"))) > 100 for end in ends if end.endswith("%")):
        raise InputError("data.split", f"percents must be within -100 and 100, got {split!r}")


def _open_folder(path: str, root: Path, tree: Tree, split: str) -> Source:
    name = split.partition("[")[0]
    folder = choose_split(root, tree, name)
    below = walk(root / folder) if folder else tree
    descriptions = [root / folder / name for name in below.files if is_description(name)]
    if descriptions:
        for description in descriptions:
            expect_no_lfs_pointer(description)
        splits = described_images(root, tree.files, folder)
        wanted = SPLIT_OF.get(name.lower(), name) + split[len(name) :]
        return _hashed(_load("imagefolder", wanted, path, data_files=data_files_of(splits)), path, split)
    listing, stamp = list_images(root, folder, below)
    return _open_listing(root, split, stamp, listing)


def _is_table(name: str) -> bool:
    return suffix_of(name) in _TABLES and not is_description(name)


def _hashed(rows: datasets.Dataset, path: str, split: str) -> Source:
    # `datasets` hashes names, times and sizes of files, or the revision on the Hub, and the split.
    return Source(rows, EncodedImages(f"{path}, split {split}"), fingerprint=rows._fingerprint)


def _open_zip(archive: Path, split: str) -> Source:
    name = split.partition("[")[0]
    stamp = stamp_of_zip(archive)
    whole, notes = as_rows(digest(stamp, "by folder", name), lambda: list_zip(archive, name))
    return _part(archive, split, stamp, whole, notes)


def _open_imagenet(path: str, imagenet: ImageNet, split: str) -> Source:
    name = split.partition("[")[0]
    base = SPLIT_OF.get(name, "")
    if base not in imagenet.splits:
        raise InputError("data.split", f"{split!r} of {path}: ImageNet has {', '.join(imagenet.splits)} here")
    listing, stamp = list_imagenet(imagenet, base)
    return _open_listing(imagenet.root, split, stamp, listing)


def _open_listing(root: Path, split: str, stamp: str, listing: Listing) -> Source:
    whole, _ = as_rows(stamp, lambda: listing)
    return _part(root, split, stamp, whole, listing.notes)


def _part(root: Path, split: str, stamp: str, whole: datasets.Dataset, notes: Notes) -> Source:
    """The rows of a slice like `train[:10]`, given those of the whole split."""
    if len(whole) == 0 and notes.left_out:
        raise InputError(
            "data.split", f"{split!r} of {root} holds no rows; left out: {notes.left_out.described()}"
        )
    rows = whole.select(_numbers(split, len(whole), str(root)))
    images = EncodedImages(str(root), root.absolute(), stamp)
    return Source(rows, images, digest(stamp, split), notes)


def _numbers(split: str, count: int, path: str) -> range:
    """Indices of the rows of a slice of a split with `count` rows.

    Raises:
        InputError: the slice is empty.
    """
    instruction = datasets.ReadInstruction.from_spec("train" + split[len(split.partition("[")[0]) :])
    (part,) = instruction.to_absolute({"train": count})
    numbers = range(part.from_ or 0, count if part.to is None else part.to)
    if not numbers:
        raise InputError("data.split", f"{split!r} of {path} holds no rows, of {count} in all")
    return numbers


def _open_tables(path: str, split: str, files: dict[str, list[Path]]) -> Source:
    suffixes = {file.suffix.lower() for found in files.values() for file in found}
    if suffixes not in ({".parquet"}, {".arrow"}):
        raise InputError(
            "data.path", f"{path} must be a folder, or .parquet, .arrow or .zip files, not {sorted(suffixes)}"
        )
    rows = _load(suffixes.pop()[1:], split, path, data_files=data_files_of(files))
    return _hashed(rows, path, split)


def _load(builder: str, split: str, path: str, **options: object) -> datasets.Dataset:
    """`datasets.load_dataset`, with failures as an `InputError` about the user's path or split."""
    name, bracket, _ = split.partition("[")
    if bracket:  # `datasets` returns rows for some empty slices
        _numbers(split, len(_load(builder, name, path, **options)), path)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also logs errors that it raises
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except Exception as error:  # of many types, of datasets, fsspec, pyarrow and pandas
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        full = cache_failure(error)
        if full is not None:
            raise cache_error("the data set", full) from error
        if "corresponds to no data" in str(error):  # an empty slice
            raise InputError("data.split", f"{split!r} of {path} holds no rows") from error
        if str(error).startswith("Unknown split"):
            raise InputError("data.split", f"{split!r} of {path}: {one_line(error)}") from error
        raise InputError("data.path", f"{path} could not be read: {one_line(root)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _check_hub(path: str) -> None:
    """Check that the Hub has a data set called `path`; `datasets` itself would retry for half a minute."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise InputError("data.path", f"{path} does not exist")
    if not datasets.config.HF_HUB_OFFLINE:  # offline, only earlier downloads are used
        dataset_commit(path, subject="data.path", endpoint=datasets.config.HF_ENDPOINT)
