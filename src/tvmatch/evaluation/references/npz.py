"""Reading untrusted .npz files: nothing in them is executed, and sizes are checked before memory is used."""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from tvmatch.data.npy import NpyHeader, read_header
from tvmatch.errors import InputError
from tvmatch.storage.files import expect_no_lfs_pointer


class NpzReader:
    """A context manager that reads arrays of an .npz file, or parts of them, unlike `numpy.load`.

    Args:
        path: the file.
        subject: the argument that named it, for messages.

    Raises:
        InputError: if the file is damaged or not an .npz file; also raised by every method.
    """

    def __init__(self, path: Path, subject: str) -> None:
        self._subject, self._path = subject, path
        expect_no_lfs_pointer(path)
        with self._readable():
            self._archive = zipfile.ZipFile(path)
        self._kinds: dict[str, NpyHeader] = {}
        with self._readable():
            for name in self._archive.namelist():
                if name.endswith(".npy"):
                    self._kinds[name.removesuffix(".npy")] = self._header(name)

    def __enter__(self) -> "NpzReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays in the order of the file."""
        return tuple(self._kinds)

    def kind(self, name: str) -> NpyHeader:
        """Shape and type of an array."""
        return self._kinds[name]

    def array(self, name: str) -> NDArray[np.generic]:
        """A whole array."""
        with self._readable(), self._archive.open(f"{name}.npy") as stream:
            array: NDArray[np.generic] = np.lib.format.read_array(stream, allow_pickle=False)
            return array

    @contextmanager
    def rows(self, name: str) -> Iterator[Callable[[range], NDArray[np.generic]]]:
        """Yield a function that reads consecutive rows of an array, in increasing order."""
        shape, dtype, by_columns = self._kinds[name]
        if by_columns:
            raise InputError(
                self._subject,
                f"{self._path}: {name} is stored in Fortran order, which cannot be read in parts",
            )
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        with self._archive.open(f"{name}.npy") as stream:
            read_header(stream)
            start = stream.tell()

            def read(numbers: range) -> NDArray[np.generic]:
                with self._readable():
                    stream.seek(start + numbers.start * row_bytes)
                    content = stream.read(len(numbers) * row_bytes)
                    return np.frombuffer(content, dtype).reshape(len(numbers), *shape[1:])

            yield read

    def _header(self, member: str) -> NpyHeader:
        """Shape and type of an array, checked against its size in the file."""
        with self._archive.open(member) as stream:
            kind = read_header(stream)
            stored = self._archive.getinfo(member).file_size - stream.tell()
        if kind.dtype.hasobject:
            raise InputError(
                self._subject, f"{self._path}: {member} contains Python objects, which are not read"
            )
        claimed = math.prod(kind.shape) * kind.dtype.itemsize
        if claimed != stored:
            raise ValueError(f"{member} has {stored} bytes, its shape {kind.shape} needs {claimed}")
        return kind

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # from zipfile, zlib, struct, tokenize or NumPy
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(self._subject, f"{self._path}: not a readable .npz file ({reason})") from error
