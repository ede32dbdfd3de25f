"""`restricted_load`: the content of a pickle or of a `torch.save` file, in both of PyTorch's formats."""

import copyreg
import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tvmatch.errors import InputError, one_line
from tvmatch.safe_pickle import arrays
from tvmatch.safe_pickle.inert import Dict, Function, Inert, inert_class, shown
from tvmatch.safe_pickle.tensors import Storage, StoredTensor
from tvmatch.storage.files import LFS_POINTER, is_lfs_pointer

ZIP_START = b"PK\x03\x04"
LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the pickle of PyTorch's magic number


def restricted_load(path: Path) -> Any:
    """The content of a pickle or of a file that `torch.save` wrote.

    Plain data come as they are, subclasses of dict as `Dict`, arrays of numbers as NumPy arrays, tensors as
    `StoredTensor`, and all other objects as `Inert`. Tensors of PyTorch's ZIP format are read from the disk
    when they are used.

    Raises:
        InputError: if the file cannot be read, is damaged or truncated, is neither a pickle nor a file of
            `torch.save`, or is a TorchScript archive.
    """
    copyreg.clear_extension_cache()  # its objects would bypass find_class
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            if not start:
                raise InputError("the file is empty")
            if is_lfs_pointer(start):
                raise InputError(LFS_POINTER)
            if start.startswith(ZIP_START):
                return _load_zip(path)
            if start.startswith(LEGACY_START):
                return _load_torch(io.BytesIO(file.read()))
            return _Unpickler(file, encoding="latin1").load()
    except InputError as error:
        raise error.within(path) from None
    except OSError as error:
        raise InputError(path, error.strerror or one_line(error)) from None
    except Exception as error:  # damaged files raise errors of many types, MemoryError among them
        reason = shown(one_line(error))
        raise InputError(path, f"damaged, truncated, or not a pickle ({reason})") from None
    finally:
        copyreg.clear_extension_cache()


class _Unpickler(pickle._Unpickler):
    """Imports nothing. Its results are plain data, objects of `inert`, `arrays` and `tensors`.

    It extends Python's implementation, since C's allocates up to 64 GB for one changed byte: the memo, of the
    size of its largest index.
    """

    def find_class(self, module: str, name: str) -> Any:
        return STAND_INS.get((module, name)) or inert_class(name)


def _read_storage(
    read: Callable[[Any], Any], keys: set[str], record_sizes: Mapping[str, int] | None, identity: Any
) -> Any:
    """The storage of ("storage", type, key, device, count[, None]), the class of ("module", class, …).

    `read` is PyTorch's function; for a class it would look at source code.
    """
    if identity[0] == "module":
        return identity[1]
    kind, storage_type, key, device, count, view = (*identity, None, None)[:6]
    dtype: Any = getattr(storage_type, "dtype", None)
    are_text = all(isinstance(part, str) for part in (kind, key, device))
    if not are_text or kind != "storage" or type(count) is not int or count < 0 or view is not None:
        raise InputError("a damaged file of torch.save, or one of a very old version")
    if not isinstance(dtype, torch.dtype) or str(dtype).startswith("torch.q"):  # quantised
        raise InputError("tensors of an unusual kind")
    if record_sizes is not None and record_sizes.get(key) != count * dtype.itemsize:
        raise InputError(f"a damaged file of torch.save: not {count} numbers of {dtype} in a storage")
    keys.add(key)
    return Storage(read(identity))


def _load_torch(file: Path | io.BytesIO, record_sizes: Mapping[str, int] | None = None) -> Any:
    """The content of a file of `torch.save`; with the sizes of its records for the ZIP format.

    The older format must be given as bytes: from a path, torch.load would also try that of tar files.
    """
    keys: set[str] = set()
    parts: list[Any] = []  # of the older format: a number, a version, the system, the storages' keys

    class Unpickler(_Unpickler):
        def load(self) -> Any:
            read = getattr(self, "persistent_load", None)  # set by torch.load
            if read is not None:
                checked = partial(_read_storage, read, keys, record_sizes)
                self.persistent_load = checked  # type: ignore[method-assign]
            return super().load()

    def load(stream: Any, **options: Any) -> Any:
        parts.append(Unpickler(stream, **options).load())
        return parts[-1]

    module = SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)
    with warnings.catch_warnings():
        # torch.load warns before it passes TorchScript to torch.jit.load, which does not use our module.
        warnings.filterwarnings("error", message=".*TorchScript")
        mmap = record_sizes is not None
        content = torch.load(file, "cpu", pickle_module=module, weights_only=False, mmap=mmap)
    # PyTorch leaves a storage without a key uninitialised.
    if record_sizes is None and not (isinstance(parts[-1], list) and sorted(parts[-1]) == sorted(keys)):
        raise InputError("damaged: the file does not hold exactly the storages that it uses")
    return content


def _load_zip(path: Path) -> Any:
    """Records `NAME/data.pkl`, and `NAME/data/KEY` for the storage called KEY."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise InputError("a TorchScript archive; the file of a state dict is needed")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise InputError("compressed, which torch.save does not do")
    return _load_torch(path, {record.filename.partition("/data/")[2]: record.file_size for record in records})


def _nested_storage(data: Any) -> Storage:
    """The storage that `torch.save` wrote into bytes, in a pickle of a tensor."""
    if not (isinstance(data, bytes) and data.startswith(LEGACY_START)):
        raise InputError("damaged: bytes that are not a storage of torch.save")
    storage = _load_torch(io.BytesIO(data))
    if not isinstance(storage, Storage):
        raise InputError("damaged: bytes that hold something else than a storage")
    return storage


def _tensor_of_type(rebuild: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    """A tensor of a subclass, or with attributes: the tensor alone. Only our functions can be called."""
    return rebuild(*arguments)


def _persistent_object(description: Any) -> Inert:
    """What `torch_utils.persistence` would make by executing source code: class name and state alone."""
    made = inert_class(description["class_name"])()
    made.state = description.get("state")
    return made


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    """Bytes as older protocols write them: text in Latin-1."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise InputError("damaged: bytes in another form than Latin-1")
    return text.encode("latin1")


_BUILTINS = ("builtins", "__builtin__")
_CORES = ("numpy.core", "numpy._core")
# What the names in a file stand for; all others are inert classes.
STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Dict,
    ("dnnlib.util", "EasyDict"): Dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function(_persistent_object),
    ("_codecs", "encode"): Function(_bytes),
    **{(module, "bytes"): Function(_bytes) for module in _BUILTINS},
    **{(module, "set"): Function(set) for module in _BUILTINS},
    **{(module, "frozenset"): Function(frozenset) for module in _BUILTINS},
    **{(module, "getattr"): Function(lambda _, name: inert_class(name)) for module in _BUILTINS},
    ("numpy", "dtype"): arrays.DType,
    **{(f"{core}.multiarray", "_reconstruct"): Function(arrays.new_array) for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): Function(arrays.scalar) for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): Function(arrays.array_of_bytes) for core in _CORES},
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_parameter"): Function(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(lambda tensor, *_: tensor),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_tensor_of_type),
    ("torch.storage", "_load_from_bytes"): Function(_nested_storage),
}
