"""NumPy arrays and scalars of numbers in a pickle, whose shapes and types are checked against their bytes."""

import math
from typing import Any

import numpy as np

from tvmatch.errors import InputError
from tvmatch.safe_pickle.inert import Inert

_NUMBERS = {"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "c8", "c16"}


class DType(Inert):
    """A `numpy.dtype` as a pickle describes it."""

    def numpy(self) -> np.dtype[Any]:
        """The type; an `InputError` for objects, text, records and dates."""
        code = self.arguments[0] if self.arguments else None
        order = self.state[1] if type(self.state) is tuple and len(self.state) > 1 else "="
        if not (isinstance(code, str) and code in _NUMBERS and order in ("<", ">", "|", "=")):
            raise InputError("an array of something else than numbers")
        dtype: np.dtype[Any] = np.dtype(code).newbyteorder(order)  # type: ignore[arg-type]
        return dtype


class Array(np.ndarray[Any, Any]):
    """An array of a pickle, which checks the state that it is given."""

    def __setstate__(self, state: Any) -> None:
        """Take the (version, shape, dtype, column-major, bytes) that NumPy writes."""
        _, shape, dtype, column_major, data = state
        data, numpy_dtype = _content(data, dtype, shape)
        super().__setstate__((1, shape, numpy_dtype, bool(column_major), data))  # type: ignore[arg-type]


def new_array(*_: Any) -> Array:
    """An array whose shape and content come with its state."""
    return np.empty(0).view(Array)


def array_of_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """An array as protocol 5 writes it."""
    data, numpy_dtype = _content(data, dtype, shape)
    return np.frombuffer(data, numpy_dtype).reshape(shape, order=order).copy().view(Array)


def scalar(dtype: Any, data: Any) -> Any:
    """A NumPy scalar."""
    data, numpy_dtype = _content(data, dtype, ())
    return np.frombuffer(data, numpy_dtype)[0]


def _content(data: Any, dtype: Any, shape: Any) -> tuple[bytes, np.dtype[Any]]:
    """The bytes and type of an array, if the shape takes exactly so many bytes."""
    if isinstance(data, str):  # Python 2's bytes
        data = data.encode("latin1")
    if not (isinstance(data, bytes | bytearray) and isinstance(dtype, DType) and type(shape) is tuple):
        raise InputError("a damaged array")
    numpy_dtype = dtype.numpy()
    if not all(type(size) is int and size >= 0 for size in shape):
        raise InputError(f"an array of impossible shape {shape}")
    if math.prod(shape) * numpy_dtype.itemsize != len(data):
        raise InputError(f"an array of shape {shape} and type {numpy_dtype} in {len(data)} bytes")
    return bytes(data), numpy_dtype
