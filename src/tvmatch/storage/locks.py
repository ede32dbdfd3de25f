"""Locks on folders, which are released when their process ends, in whatever way.

A lock is the operating system's (`flock`) on a hidden file in the folder. Unlike a POSIX record lock it is
not lost when this process opens and closes the file elsewhere. Forked processes close their copy at once.
"""

import errno
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tvmatch.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_PAUSE = 0.02  # seconds between two tries
_MOST_MISSED = 50

_descriptors: set[int] = set()


def _forget_in_child() -> None:
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def is_lock(name: str) -> bool:
    """Whether a file of this name is a lock, which does not count as content of its folder."""
    return name.startswith(".") and name.endswith(LOCK_NAME)


class FolderLock:
    """The right to write to a folder, from construction until `release` or the end of the process.

    Args:
        folder: created if it is missing, and removed at the end if it is still empty.
        name: of the lock file, for several locks in one folder.
        shared: several processes may hold it at once if all of them ask for a shared lock.
        wait: wait for other holders instead of raising an error.
        doing: what the holder does, for the message that another process gets.

    Attributes:
        folder: the folder.
        problem: why the folder is not locked, on a file system without locks; else None.

    Raises:
        InputError: if another process holds the lock, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str = LOCK_NAME,
        *,
        shared: bool = False,
        wait: bool = False,
        doing: str = "writes to it",
    ) -> None:
        self.folder = Path(folder)
        self.problem: str | None = None
        made = _missing(self.folder)
        path = self.folder / name
        try:
            descriptor = self._open(path, shared, wait, doing)
        except OSError as error:
            _remove_empty(made)
            raise InputError(self.folder, f"cannot be written ({error.strerror or error})") from error
        self._finish = weakref.finalize(self, _release, descriptor, path, made, os.getpid())

    def _open(self, path: Path, shared: bool, wait: bool, doing: str) -> int:
        """The descriptor of the lock's file, which is locked and still in its place."""
        missed = 0
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # one who released it removed the folder at this moment
                missed += 1
                if missed == _MOST_MISSED:
                    raise
                time.sleep(_PAUSE)
                continue
            _descriptors.add(descriptor)
            taken = False
            try:
                taken = self._lock(descriptor, shared)
                if taken and _is_at(descriptor, path):
                    with suppress(OSError):  # a full disk
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
                if not taken and not wait:
                    holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
                    raise InputError("out", f"{self.folder} is in use: {holder} {doing}")
            except BaseException:
                _close(descriptor)
                raise
            _close(descriptor)
            if not taken:
                time.sleep(_PAUSE)

    def _lock(self, descriptor: int, shared: bool) -> bool:
        if fcntl is None:
            self.problem = "this system has no locks"
            return True
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _WITHOUT_LOCKS:
                raise
            self.problem = f"this file system has no locks ({error.strerror})"
        return True

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        self._finish()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _release(descriptor: int, path: Path, made: list[Path], process: int) -> None:
    if os.getpid() != process:  # a forked copy, whose descriptor is closed
        return
    with suppress(OSError):
        # Of a shared lock the last holder alone may remove the file: others would lock a new one.
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            path.unlink()
        _remove_empty(made)
    _close(descriptor)


def _close(descriptor: int) -> None:
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one of that name, and not one that its last holder has removed."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _missing(folder: Path) -> list[Path]:
    """The folders that have to be made, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
