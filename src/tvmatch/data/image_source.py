"""Finding images: a folder, ImageNet, a ZIP, Parquet or Arrow files, or a data set on the Hub."""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet  # type: ignore[import-untyped]
from datasets.data_files import DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from tvmatch.data.image_rows import EncodedImages, RowNames, Source
from tvmatch.data.image_zip import DESCRIPTION, list_folder, list_zip, stamp_of_zip
from tvmatch.data.imagenet import NO_ANSWERS, ImageNet, find_imagenet, list_imagenet
from tvmatch.data.listing import Listing, as_rows, cache_error, cache_failure, digest, one_line
from tvmatch.errors import InputError

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names}

_NO_LABELS = f"{DESCRIPTION} is missing, or has none"
_HUB_TIMEOUT = 10.0  # seconds for the first answer; `datasets` itself would try for half a minute


def open_source(path: str, split: str) -> Source:
    """The rows of `split` of the data set at `path`.

    Raises:
        InputError: nothing is there, it cannot be read, or it has no such split.
    """
    local = Path(path).expanduser()
    if not path:
        raise InputError(
            "data.path: give a folder, a .parquet, .arrow or .zip file, or the name of a Hub data set"
        )
    if not re.fullmatch(r"\w+(\[(-?\d+%?)?:(-?\d+%?)?\])?", split):
        raise InputError(f"data.split: must be a name like train or a slice like train[:1000], got {split!r}")
    whole = EncodedImages(RowNames((f"{path}, split {split}",)))
    if not local.exists():
        _check_hub(path)
        return _hashed(_load(path, split, path), whole)
    if local.is_file():
        if local.suffix.lower() == ".zip":
            return _open_zip(local, split)
        return _open_tables(path, split, {"train": [local]})
    if (local / DESCRIPTION).is_file():
        listing, stamp = list_folder(local)
        return _open_listing(local, split, stamp, lambda: listing, _NO_LABELS)
    try:
        imagenet = find_imagenet(local)
    except OSError as error:  # no permission
        raise InputError(f"data.path: {one_line(error)}") from error
    if imagenet is not None:
        return _open_imagenet(path, imagenet, split)
    files = _scan(local)
    if files.tables:
        splits = _by_split(path, {file: _table_split(local, file) for file in files.tables})
        return _open_tables(path, split, splits)
    if not files.images:
        raise InputError(f"data.path: {path} holds no images and no .parquet or .arrow files")
    splits = _image_splits(path, local, files)
    return _hashed(_load("imagefolder", split, path, data_files=_data_files(splits)), whole)


def _hashed(rows: datasets.Dataset, images: EncodedImages) -> Source:
    # `datasets` hashes names, times and sizes of files, or the revision on the Hub, and the split.
    return Source(rows, images, fingerprint=rows._fingerprint)


def _open_zip(archive: Path, split: str) -> Source:
    stamp = stamp_of_zip(archive)
    return _open_listing(archive, split, stamp, lambda: list_zip(archive), _NO_LABELS)


def _open_imagenet(path: str, imagenet: ImageNet, split: str) -> Source:
    base = _SPLIT_OF.get(split.partition("[")[0], "")
    if base not in imagenet.splits:
        raise InputError(f"data.split: {split!r} of {path}: ImageNet has {', '.join(imagenet.splits)} here")
    listing, stamp = list_imagenet(imagenet, base)
    return _open_listing(imagenet.root, split, stamp, lambda: listing, NO_ANSWERS, split.partition("[")[0])


def _open_listing(
    root: Path,
    split: str,
    stamp: str,
    listing: Callable[[], Listing],
    without_labels: str,
    name: str = "train",
) -> Source:
    """A part of the listed files, which are the split `name` as a whole."""
    whole = as_rows(stamp, listing)
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
    except ValueError as error:  # an unknown split, or percents that are none
        raise InputError(f"data.split: {split!r} of {root}: {one_line(error)}") from error
    rows = whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))
    images = EncodedImages(RowNames((str(root),)), root.absolute(), stamp)
    return Source(rows, images, digest(stamp, split), without_labels)


def _open_tables(path: str, split: str, files: dict[str, list[Path]]) -> Source:
    suffixes = {file.suffix.lower() for found in files.values() for file in found}
    if suffixes not in ({".parquet"}, {".arrow"}):
        raise InputError(
            f"data.path: {path} must be a folder, or .parquet, .arrow or .zip files, not {sorted(suffixes)}"
        )
    chosen = files.get(split, [])
    if chosen and suffixes == {".parquet"}:
        names = RowNames(tuple(map(str, chosen)), tuple(accumulate(map(_parquet_rows, chosen))))
    else:  # a slice of a split, or Arrow files, which do not say how many rows they have
        names = RowNames((str(chosen[0]) if len(chosen) == 1 else f"{path}, split {split}",))
    rows = _load(suffixes.pop()[1:], split, path, data_files=_data_files(files))
    return _hashed(rows, EncodedImages(names))


def _data_files(files: dict[str, list[Path]]) -> dict[str, DataFilesList]:
    """Files with what tells `datasets` that one has changed.

    Given as patterns instead, `datasets` would look for them once more, without following links to folders.
    """
    return {
        split: DataFilesList([str(file.absolute()) for file in found], [_stamp(file) for file in found])
        for split, found in files.items()
    }


def _stamp(file: Path) -> tuple[str]:
    try:
        status = file.stat()
    except OSError as error:  # a link to nothing, for example
        raise InputError(f"data.path: {one_line(error)}") from error
    return (f"{status.st_mtime_ns} {status.st_size}",)


def _parquet_rows(file: Path) -> int:
    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"data.path: {file} is not a readable Parquet file: {one_line(error)}") from error


def _load(builder: str, split: str, path: str, **options: object) -> datasets.Dataset:
    """`datasets.load_dataset`, with every failure as one line about the user's path and split."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
    try:
        return datasets.load_dataset(builder, split=split, **options)
    except Exception as error:  # a dozen kinds, of datasets, fsspec, pyarrow and pandas
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        full = cache_failure(error)
        if full is not None:
            raise cache_error("the data set", full) from error
        if "corresponds to no data" in str(error):  # an empty slice
            raise InputError(f"data.split: {split!r} of {path} holds no rows") from error
        if str(error).startswith("Unknown split"):
            raise InputError(f"data.split: {split!r} of {path}: {one_line(error)}") from error
        raise InputError(f"data.path: {path} could not be read: {one_line(root)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _check_hub(path: str) -> None:
    """Ask the Hub once, quickly, whether it has a data set called `path`."""
    neither = f"data.path: {path!r} is neither a local path nor a data set on the Hugging Face Hub"
    # An absolute path, or a name with more than one slash, cannot be a data set of the Hub.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise InputError(f"data.path: {path} does not exist")
    if datasets.config.HF_HUB_OFFLINE:
        return  # the user said so: only what was downloaded before is looked at
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(path, timeout=_HUB_TIMEOUT)
    except GatedRepoError as error:
        raise InputError(
            f"data.path: {path} on the Hugging Face Hub needs you to log in and be granted access"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(neither) from error
    except Exception as error:  # no network, no name server, a proxy's answer, a server's error
        raise InputError(
            f"{neither} that can be reached ({one_line(error)}); HF_HUB_OFFLINE=1 uses an earlier download"
        ) from error


class _Files(NamedTuple):
    tables: list[Path]  # .parquet and .arrow
    images: list[Path]
    descriptions: list[Path]  # labels and more for a folder of images, in the layout of `datasets`


def _scan(root: Path) -> _Files:
    """The files that matter under a folder, sorted; hidden files and folders are left out."""
    files = _Files([], [], [])
    for parent, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if name in ImageFolder.METADATA_FILENAMES:
                files.descriptions.append(Path(parent, name))
            elif suffix in (".parquet", ".arrow"):
                files.tables.append(Path(parent, name))
            elif suffix in ImageFolder.EXTENSIONS:
                files.images.append(Path(parent, name))
    return _Files(*map(sorted, files))


def _table_split(folder: Path, file: Path) -> str | None:
    """The split that a table's name (train-00000-of-00002.parquet) or top folder (train/0.parquet) tells."""
    word = re.match(r"[a-z]*", file.stem.lower())
    top = file.relative_to(folder).parts[0].lower()
    return _SPLIT_OF.get(word[0] if word else "") or _SPLIT_OF.get(top)


def _image_splits(path: str, root: Path, files: _Files) -> dict[str, list[Path]]:
    """Files of each split: those in top folders named like splits, else all as "train"."""

    def top_split(file: Path) -> str | None:
        parts = file.relative_to(root).parts
        return _SPLIT_OF.get(parts[0].lower()) if len(parts) > 1 else None

    split_of = {image: top_split(image) for image in files.images}
    splits = _by_split(path, split_of)
    for file in files.descriptions:
        split = "train" if None in split_of.values() else top_split(file)
        if split in splits:
            splits[split].append(file)
    return splits


def _by_split(path: str, split_of: dict[Path, str | None]) -> dict[str, list[Path]]:
    """Group paths by split: all "train" unless their names are those of splits.

    Raises:
        InputError: some are named as the training split and others as further splits, but not all: taken
            as a whole, test images would be trained on.
    """
    found = set(split_of.values())
    if None in found and "train" in found and len(found) > 2:
        other = next(name for name, split in split_of.items() if split is None)
        raise InputError(
            f"data.path: {path} holds splits ({', '.join(sorted(filter(None, found)))}) and also {other}; "
            "move that away, or name one split's folder"
        )
    groups: dict[str, list[Path]] = defaultdict(list)
    for name, split in split_of.items():
        groups[split if split and None not in found else "train"].append(name)
    return dict(groups)
