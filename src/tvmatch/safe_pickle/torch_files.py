"""Tensors of files that `torch.save` wrote, read without PyTorch's unpickler.

`torch.load(weights_only=True)` runs no foreign code, but believes sizes: an 800-byte file makes it allocate
gigabytes. Here a storage is as large as its bytes in the file, and every tensor must fit into its storage.
"""

import math
import os
import zipfile
from collections.abc import Callable
from functools import cached_property
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from tvmatch.safe_pickle.inert import CONTAINERS, Global, Inert, Refused, StandIns, shown
from tvmatch.safe_pickle.machine import load
from tvmatch.safe_pickle.streams import Stream

MAX_RANK = 16
ZIP_START = b"PK\x03\x04"
LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the pickle of PyTorch's magic number

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Storage:
    """Numbers of one type in a file.

    Args:
        dtype: their type.
        count: how many there are.
        read: gives their bytes, as many as that takes.
    """

    def __init__(self, dtype: torch.dtype, count: int, read: Callable[[], bytes | memoryview]) -> None:
        self.dtype, self.count, self.read = dtype, count, read

    @cached_property
    def values(self) -> Tensor:
        """The numbers, (count,), in memory of their own."""
        data = np.frombuffer(self.read(), np.uint8).copy()
        if len(data) != self.count * self.dtype.itemsize:
            raise Refused(f"{self.count} numbers of {self.dtype} in {len(data)} bytes")
        return torch.from_numpy(data).view(self.dtype)


class StoredTensor:
    """A tensor of a file: a view of its storage, checked, and read when it is asked for.

    Raises:
        Refused: if shape, strides and offset are not those of a tensor within the storage.
    """

    def __init__(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any = None,
        hooks: Any = None,
        metadata: Any = None,
        /,
    ) -> None:
        if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple:
            raise TypeError
        sizes = (offset, *shape, *strides)
        if not len(shape) == len(strides) <= MAX_RANK or not all(
            type(size) is int and 0 <= size < 1 << 48 for size in sizes
        ):
            raise Refused("a tensor of impossible shape")
        if math.prod(max(size, 1) for size in shape) >= 1 << 48:  # without numbers, if one size is 0
            raise Refused("a tensor of impossible shape")
        if metadata:
            raise Refused("a tensor that is marked as negated, conjugated or otherwise special")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # The second: a stride of 0 repeats numbers without end.
        if 0 not in shape and max(last + 1, math.prod(shape)) > storage.count:
            raise Refused(f"a tensor of shape {shape} in a storage of {storage.count} numbers")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def tensor(self) -> Tensor:
        """The tensor itself, in memory that it may share with others of the file."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype, device="cpu")
        return self.storage.values.as_strided(self.shape, self.strides, self.offset)


def is_torch_file(data: memoryview) -> bool:
    """Whether bytes begin as `torch.save` begins its files."""
    return data[: len(ZIP_START)] == ZIP_START or data[: len(LEGACY_START)] == LEGACY_START


def load_torch(data: memoryview, allowed: StandIns) -> Any:
    """The content of a file of `torch.save`, its tensors as `StoredTensor` and bare storages as `Storage`.

    Args:
        data: the whole file.
        allowed: what it may hold, such as `TENSORS`.

    Raises:
        Refused: for anything that is not allowed, a damaged file or a truncated one.
    """
    return (_load_zip if data[: len(ZIP_START)] == ZIP_START else _load_legacy)(data, allowed)


class _Archive(Stream):
    """Bytes as the file that `zipfile` reads, not copied as a whole."""

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position counted from the start, from here or from the end."""
        self.position = max(0, offset + {0: 0, 1: self.position, 2: len(self.data)}[whence])
        return self.position

    def read(self, count: int = -1) -> Any:
        """The next `count` bytes, or all that are left."""
        return super().read(count if count >= 0 else len(self.data))


def _load_zip(data: memoryview, allowed: StandIns) -> Any:
    """Records `NAME/data.pkl`, `NAME/byteorder`, and `NAME/data/KEY` for the storage called KEY."""
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], _Archive(data)))
        records = {record.filename: record for record in archive.infolist()}
    except _DAMAGED_ZIP as error:
        raise Refused(f"a damaged or truncated file of torch.save ({shown(error)})") from None
    # Compressed or overlapping records could unfold to more than the file.
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in records.values())
    if not stored or sum(record.file_size for record in records.values()) > len(data):
        raise Refused("a file of torch.save whose records are compressed or overlap")

    def read(name: str) -> bytes:
        try:
            return archive.read(records[name])
        except _DAMAGED_ZIP as error:
            raise Refused(f"a damaged file of torch.save ({shown(error)})") from None

    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("a ZIP archive that torch.save did not write")
    if f"{roots[0]}/byteorder" in records and read(f"{roots[0]}/byteorder") != b"little":
        raise Refused("tensors in big-endian order")

    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
        dtype, key, count = _storage_identity(identity)
        name = f"{roots[0]}/data/{key}"
        if name not in records or records[name].file_size != count * dtype.itemsize:
            raise Refused(f"a damaged file of torch.save: not {count} numbers of {dtype} in its storage")
        if storages.setdefault(key, Storage(dtype, count, lambda: read(name))).dtype != dtype:
            raise Refused("a storage of two types")
        return storages[key]

    return load(Stream(memoryview(read(f"{roots[0]}/data.pkl"))), allowed, persistent)


_DAMAGED_ZIP = (
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    RuntimeError,
    NotImplementedError,
    OSError,
    EOFError,
)


def _load_legacy(data: memoryview, allowed: StandIns) -> Any:
    """Pickles of a magic number, a version, the system, the content, its storages' keys; and the storages."""
    stream = Stream(data)
    _, _, system = (load(stream, {}) for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("tensors in big-endian order, or a damaged file of torch.save")
    storages: dict[str, Storage] = {}
    pieces: dict[str, memoryview] = {}

    def persistent(identity: Any) -> Storage:
        dtype, key, count = _storage_identity(identity)
        storage = Storage(dtype, count, lambda: pieces[key])
        if storages.setdefault(key, storage).dtype != dtype or storages[key].count != count:
            raise Refused("a storage of two types or sizes")
        return storages[key]

    content = load(stream, allowed, persistent)
    keys = load(stream, {})
    are_text = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not are_text or len(keys) != len(storages) or set(keys) != storages.keys():
        raise Refused("a damaged file of torch.save: its storages are not those that it uses")
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(stream.read(8), "little")
        size = count * storage.dtype.itemsize
        pieces[key] = data[stream.position : stream.position + size]
        if count != storage.count or len(pieces[key]) < size:
            raise Refused("a truncated or damaged file of torch.save: a storage is not whole")
        stream.position += size
    return content


def _storage_identity(identity: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, count) of ("storage", class, key, device, count[, None])."""
    if type(identity) is tuple and len(identity) in (5, 6):
        kind, storage_class, key, device, count, view = (*identity, None)[:6]
        are_text = all(isinstance(part, str) for part in (kind, key, device))
        if are_text and kind == "storage" and type(count) is int and count >= 0 and view is None:
            dtype = _DTYPES.get(storage_class.name) if isinstance(storage_class, Global) else None
            if dtype is not None and storage_class.module == "torch":
                return dtype, key, count
    raise Refused("a damaged file of torch.save, or one of tensors of an unusual kind")


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise TypeError
    return tensor


def _of_type(rebuild: Any, _type: Any, arguments: Any, _state: Any = None, /) -> StoredTensor:
    """A tensor of a subclass, or one that carries attributes: its numbers."""
    if not isinstance(rebuild, Global) or rebuild.stand_in not in (StoredTensor, _parameter):
        raise TypeError
    tensor: StoredTensor = rebuild.stand_in(*arguments)
    return tensor


def _storage_class(*_: Any) -> None:
    raise TypeError  # it stands in persistent ids, and is not called


def _nested_storage(data: Any, /) -> Storage:
    """The storage that `torch.save` wrote into bytes."""
    if not isinstance(data, bytes | memoryview):
        raise TypeError
    if not is_torch_file(memoryview(data)):
        raise Refused("bytes that are not a storage of torch.save")
    storage = load_torch(memoryview(data), _STORAGE_CLASSES)
    if not isinstance(storage, Storage):
        raise Refused(f"bytes that hold a {type(storage).__name__} and not a storage")
    return storage


def _size(sizes: Any, /) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple | list):
        raise TypeError
    return tuple(sizes)


_STORAGE_CLASSES: StandIns = {("torch", name): _storage_class for name in _DTYPES}
# Tensors, and what stands beside them in a state dict.
TENSORS: StandIns = {
    **CONTAINERS,
    **_STORAGE_CLASSES,
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Tensor"): Inert,
    ("torch.storage", "_load_from_bytes"): _nested_storage,
    ("torch", "Size"): _size,
    ("torch", "device"): Inert,
    **{("torch", str(dtype).removeprefix("torch.")): Inert for dtype in _DTYPES.values()},
}
