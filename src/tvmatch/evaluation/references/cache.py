"""Where computed reference statistics are kept, and by what they are found again."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.constants import HF_HOME

from tvmatch.errors import InputError
from tvmatch.storage.hub import dataset_commit

if TYPE_CHECKING:
    pass


def default_cache() -> Path:
    """Where computed reference statistics are kept: beside the data sets, as HF_HOME says."""
    return Path(HF_HOME) / "tvmatch" / "references"


def source_fingerprint(path: str) -> str | None:
    """What changes when images do: names, sizes and times of local files, the commit of a Hub data set.

    None if the Hub cannot be asked: then nobody knows whether an earlier download is still the same.
    """
    local = Path(path).expanduser()
    if not local.exists():
        try:
            return f"commit {dataset_commit(path)}"
        except InputError:  # no such data set (which reading it will tell), no network, a server's error
            return None
    digest = hashlib.sha256()
    for file in [local] if local.is_file() else _files(local):
        try:
            status = file.stat()
        except OSError:  # a link to nothing, which reading the images will tell
            continue
        name = file.name if file == local else file.relative_to(local).as_posix()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return f"sizes and times {digest.hexdigest()}"


def _files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, sorted."""
    from tvmatch.data.images.folders.walk import walk  # here, because it imports Pillow

    return [folder / name for name in walk(folder).files]
