"""Arrays in NPY files of data sets: pixels, or mean and standard deviation of latents.

Shapes: `C` channels, `H`, `W` rows and columns of pixels, `h`, `w` of latents.
"""

import io
import math
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tvmatch.errors import InputError

NPY_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY"


def is_npy(content: bytes) -> bool:
    """Whether these bytes are the start of an NPY file."""
    return content.startswith(_MAGIC)


def latents_shape(content: bytes) -> tuple[int, ...] | None:
    """The shape of a floating-point array, which holds latents; None for anything else."""
    if not is_npy(content):
        return None
    try:
        shape, dtype, _ = read_header(io.BytesIO(content))
    except Exception:  # ValueError, or an error of Python's tokenizer for a damaged header
        return None
    return shape if dtype.kind == "f" else None


def pixels_of_npy(content: bytes) -> NDArray[np.uint8]:
    """The pixels in an NPY file of uint8 (C, H, W), (H, W, C) or (H, W), with C = 1 or 3.

    An ambiguous shape like (3, 8, 3) is read as (C, H, W).

    Returns:
        uint8 of shape (H, W, 3), or (H, W) for grey.

    Raises:
        InputError: the array is floating-point, so it holds latents.
        ValueError: another type or shape, or a damaged file.
    """
    pixels = _read(content)
    if pixels.dtype.kind == "f":
        raise InputError(
            f"holds latents ({pixels.dtype} {pixels.shape}) and no pixels; `tvmatch encode` takes them"
        )
    if pixels.dtype != np.uint8:
        raise ValueError(f"pixels in NPY must be uint8, not {pixels.dtype}")
    shape = pixels.shape
    if len(shape) == 3 and shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    elif len(shape) != 2 and not (len(shape) == 3 and shape[2] in (1, 3)):
        raise ValueError(f"pixels in NPY must have shape (C, H, W) or (H, W, C) with C = 1 or 3, not {shape}")
    if pixels.size == 0:
        raise ValueError(f"no pixels, the shape is {shape}")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return np.ascontiguousarray(pixels)


def moments_of_npy(content: bytes) -> NDArray[np.float32]:
    """Mean (first half of the channels) and standard deviation of a posterior, float32 (2C, h, w).

    Raises:
        ValueError: another type or shape, non-finite numbers, a negative deviation, or a damaged file.
    """
    array = _read(content)
    if array.dtype.kind != "f" or array.ndim != 3 or array.shape[0] % 2 or array.size == 0:
        raise ValueError(
            "latents must be floating-point (2C, h, w), mean and standard deviation, "
            f"not {array.dtype} {array.shape}"
        )
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        moments = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(moments).all():
        raise ValueError("latents that are not finite")
    if moments[len(moments) // 2 :].min() < 0:
        raise ValueError("negative standard deviations; a logarithm of variances must be converted first")
    return moments


class NpyHeader(NamedTuple):
    """Header of an NPY file; `by_columns` is NumPy's Fortran order."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    by_columns: bool = False


def read_header(file: IO[bytes]) -> NpyHeader:
    """Read the header of an NPY file; leaves `file` at the start of the data.

    Raises:
        ValueError: another version, or a negative length.
        Exception: of Python's tokenizer, for a damaged header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"NPY version {version[0]}.{version[1]} is not supported")
    if min(shape, default=0) < 0:
        raise ValueError(f"an array of {dtype} {shape} is impossible")
    return NpyHeader(shape, dtype, by_columns)


def _read(content: bytes) -> NDArray[Any]:
    """The array, after a check of the claimed size, which `numpy.load` would allocate."""
    file = io.BytesIO(content)
    shape, dtype, by_columns = read_header(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype} {shape} holds neither pixels nor latents")
    claimed, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if claimed != there:
        raise ValueError(f"an array of {dtype} {shape} takes {claimed} bytes, there are {there}")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
