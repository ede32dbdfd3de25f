"""The bytes of a file as those who read pickles and archives take them, without copies of long pieces."""

import mmap
from pathlib import Path
from typing import Any

from tvmatch.safe_pickle.inert import Refused
from tvmatch.storage.files import LFS_POINTER, is_lfs_pointer

LONG_READ = 1 << 20  # bytes
LONGEST_LINE = 1 << 26  # bytes, of text in pickles of protocol 0


def map_file(path: Path) -> memoryview:
    """A file's bytes, read-only, taken from the disk where they are looked at.

    Raises:
        Refused: if it cannot be read, is empty, or is a Git LFS pointer.
    """
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise Refused(error.strerror or str(error)) from None
    except ValueError:
        raise Refused("the file is empty") from None
    if is_lfs_pointer(data):
        raise Refused(LFS_POINTER)
    return data


class Stream:
    """Bytes as the file that `pickletools` reads. Long pieces are views: weights are not copied here."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def tell(self) -> int:
        """Bytes read so far."""
        return self.position

    def read(self, count: int) -> Any:
        """The next `count` bytes, or as many as there are."""
        piece = self.data[self.position : self.position + count]
        self.position += len(piece)
        return piece if len(piece) >= LONG_READ else bytes(piece)

    def readline(self) -> bytes:
        """The bytes up to and with the next line feed, or a longest line without one."""
        length = 256
        while True:
            line = bytes(self.data[self.position : self.position + length])
            end = line.find(b"\n") + 1
            if end or length >= LONGEST_LINE or len(line) < length:
                break
            length *= 4
        line = line[: end or len(line)]
        self.position += len(line)
        return line
