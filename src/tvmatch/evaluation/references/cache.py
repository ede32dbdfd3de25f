"""The cache of computed reference statistics: its folder, and fingerprints of images."""

import hashlib
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from tvmatch.errors import InputError
from tvmatch.storage.hub import dataset_commit


def default_cache() -> Path:
    """The default folder of computed reference statistics, in HF_HOME."""
    return Path(HF_HOME) / "tvmatch" / "references"


def source_fingerprint(path: str) -> str | None:
    """A hash of names, sizes and modification times of local files, or the commit of a data set on the Hub.

    None if the Hub does not answer, since the data set may have changed.
    """
    local = Path(path).expanduser()
    if not local.exists():
        try:
            return f"commit {dataset_commit(path)}"
        except InputError:  # no such data set, no network, or a server error
            return None
    digest = hashlib.sha256()
    for file in [local] if local.is_file() else _files(local):
        try:
            status = file.stat()
        except OSError:  # a broken link
            continue
        name = file.name if file == local else file.relative_to(local).as_posix()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return f"sizes and times {digest.hexdigest()}"


def _files(folder: Path) -> list[Path]:
    """All files below a folder except hidden ones, sorted."""
    from tvmatch.data.images.folders.walk import walk  # here, because it imports Pillow

    return [folder / name for name in walk(folder).files]
