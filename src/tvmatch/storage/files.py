"""Atomic writes of files and folders, and JSON from untrusted sources."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvmatch.errors import InputError

LFS_POINTER = "a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned"
_LFS_VERSIONS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def is_lfs_pointer(start: bytes | memoryview) -> bool:
    """Whether the first bytes of a file are those of a Git LFS pointer."""
    return bytes(start[:64]).startswith(_LFS_VERSIONS)


def expect_no_lfs_pointer(path: str | Path) -> None:
    """Raise an InputError if a file is a Git LFS pointer. A file that cannot be read passes."""
    try:
        with Path(path).open("rb") as file:
            start = file.read(64)
    except OSError:
        return
    if is_lfs_pointer(start):
        raise InputError(path, LFS_POINTER)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and rename it to `path` when the context ends without an error.

    If writing fails (a full disk, an interruption), an earlier file at `path` stays unchanged. Missing parent
    folders are created.

    Raises:
        OSError: if the file cannot be written or renamed; its `filename` is `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(path)
    try:
        with _named(unfinished, path):
            yield unfinished
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` when the context ends without an error.

    Missing parent folders are created.

    Raises:
        OSError: if `path` exists, or the folder or its content cannot be written.
    """
    path = Path(path)
    unfinished = _unfinished(path)
    unfinished.mkdir(parents=True)
    try:
        with _named(unfinished, path):
            yield unfinished
            unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is not JSON, or nested deeper than Python's stack.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_file(path: Path) -> Any:
    """The value of a JSON file. Raises InputError if it is missing or unreadable."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "missing") from None
    except (OSError, ValueError) as error:
        raise InputError(path, f"not readable as JSON ({error})") from None


def _unfinished(path: Path) -> Path:
    # Processes on several machines may have the same process number.
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def _named(unfinished: Path, path: Path) -> Iterator[None]:
    """Errors of writing name the final file, not the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(unfinished)):
            error.filename, error.filename2 = str(path), None
        raise
