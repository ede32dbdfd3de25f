"""What a pickle is made of when nothing of it is run, and what stands in for containers and arrays."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

StandIns = Mapping[tuple[str, str], Callable[..., Any]]


class Refused(ValueError):  # noqa: N818, told in another's words
    """Why a file is not read; whoever knows its name makes an `InputError` of it."""


@dataclass(frozen=True, eq=False)
class Global:
    """A class or function that a pickle names, and what stands in for it. It is never imported."""

    module: str
    name: str
    stand_in: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """An object of a pickle: what it was made from and the state it was given. Nothing acts on either.

    Attributes:
        arguments: of the call that made it.
        state: what its `__setstate__` would have been given, or its former `__dict__`.
        entries: its items, if it was a kind of dict.
        elements: its elements, if it was a kind of list or set.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.arguments: tuple[Any, ...] = (*arguments, *keywords.values())
        self.state: Any = None
        self.entries: dict[Any, Any] = {}
        self.elements: list[Any] = []


class InertObject(Inert):
    """An object of a class, or a function's result, of which no more than the name is known.

    What a pickle takes out of another object, as `getattr(outer, "inner")`, is one too: it can be
    called like a `Global`, and makes another of its kind.
    """

    def __init__(self, class_name: str, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.class_name = class_name

    def __str__(self) -> str:
        return self.class_name

    def called(self, *arguments: Any, **keywords: Any) -> "InertObject":
        """What stands in for its result, were it called."""
        named = self.class_name == "getattr" and self.arguments and isinstance(self.arguments[-1], str)
        return InertObject(self.arguments[-1] if named else self.class_name, *arguments, **keywords)


def shown(text: object) -> str:
    """Words from a file as part of a message: short, printable, one line."""
    try:
        words = str(text)
    except (ValueError, RecursionError):  # an integer of thousands of digits, something nested deeply
        words = f"something of type {type(text).__name__}"
    words = words if len(words) <= 80 else words[:79] + "…"
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def key(value: Any) -> Any:
    """A dict's key or a set's element; `Refused` for one whose hash takes long, or is also that of others."""
    parts = value if type(value) is tuple else (value,)
    simple = str | bytes | int | float | None | Inert | Global
    long = any(isinstance(part, int) and abs(part) >= sys.hash_info.modulus for part in parts)
    if long or not all(isinstance(part, simple) for part in parts):
        raise Refused(f"a pickle with an unusual key of type {type(value).__name__}")
    return value


def _dict(pairs: Any = (), /) -> dict[Any, Any]:
    if not isinstance(pairs, list | tuple):
        raise TypeError
    return {key(name): value for name, value in pairs}


def _set(elements: Any = (), /) -> set[Any]:
    if not isinstance(elements, list | tuple):
        raise TypeError
    return set(map(key, elements))


def _bytes(text: Any = "", encoding: Any = "latin1", /) -> bytes:
    """Bytes as older protocols write them: text in Latin-1."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError
    return text.encode("latin1")


class _DType(Inert):
    """A NumPy type of numbers: its code, and the byte order that its state tells."""

    def numpy(self) -> np.dtype[Any]:
        """The type, or `Refused` for objects, text, records and dates."""
        code = self.arguments[0] if self.arguments else None
        order = self.state[1] if type(self.state) is tuple and len(self.state) > 1 else "="
        if not (isinstance(code, str) and code in _NUMBERS and isinstance(order, str) and order in "<>|="):
            raise Refused("an array of something else than numbers")
        dtype: np.dtype[Any] = np.dtype(code).newbyteorder(order or "=")  # type: ignore[arg-type]
        return dtype


_NUMBERS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"}


def _content(data: Any, dtype: Any, shape: Any) -> tuple[bytes, np.dtype[Any]]:
    """The bytes and type of an array, if the shape takes exactly so many bytes."""
    if isinstance(data, str):  # Python 2's bytes
        data = data.encode("latin1")
    if not (isinstance(data, bytes | bytearray | memoryview) and isinstance(dtype, _DType)):
        raise TypeError
    if type(shape) is not tuple or len(shape) > 32:
        raise TypeError
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise Refused("an array of impossible shape")
    numpy_dtype = dtype.numpy()
    if math.prod(shape) * numpy_dtype.itemsize != len(data):
        raise Refused(f"an array of shape {shape} and type {numpy_dtype} in {len(data)} bytes")
    return bytes(data), numpy_dtype


def _new_array(*_: Any) -> np.ndarray[Any, Any]:
    return np.empty(0)  # shape and content come with its state


def fill_array(array: np.ndarray[Any, Any], state: Any) -> None:
    """Give an array the (version, shape, dtype, column-major, bytes) that NumPy writes.

    Raises:
        Refused: if they do not fit each other, or are not numbers.
        TypeError: if they are something else.
    """
    _, shape, dtype, column_major, data = state
    data, numpy_dtype = _content(data, dtype, shape)
    array.__setstate__((1, shape, numpy_dtype, bool(column_major), data))  # type: ignore[arg-type]


def _array_of(data: Any, dtype: Any, shape: Any, order: Any, /) -> np.ndarray[Any, Any]:
    """As protocol 5 writes arrays."""
    if order not in ("C", "F"):
        raise TypeError
    data, numpy_dtype = _content(data, dtype, shape)
    return np.frombuffer(data, numpy_dtype).reshape(shape, order=order).copy()


def _scalar(dtype: Any, data: Any, /) -> Any:
    data, numpy_dtype = _content(data, dtype, ())
    return np.frombuffer(data, numpy_dtype)[0]


_BUILTINS = ("builtins", "__builtin__")
_CORES = ("numpy.core", "numpy._core")

# Plain dicts, sets and bytes under the names they have in pickles.
CONTAINERS: StandIns = {
    ("collections", "OrderedDict"): _dict,
    ("dnnlib.util", "EasyDict"): _dict,
    ("_codecs", "encode"): _bytes,
    **{(module, "bytes"): _bytes for module in _BUILTINS},
    **{(module, name): _set for module in _BUILTINS for name in ("set", "frozenset")},
}
# NumPy's arrays and scalars of numbers, as old and new versions write them; they come as NumPy's own.
NUMPY_ARRAYS: StandIns = {
    ("numpy", "ndarray"): Inert,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _bytes,
    **{(f"{core}.multiarray", "_reconstruct"): _new_array for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _array_of for core in _CORES},
}
