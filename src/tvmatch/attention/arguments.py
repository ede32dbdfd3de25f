"""Argument checks of `attention`, and the cast to the precision of autocast."""

import math
from typing import Any

import torch
from torch import Tensor

from tvmatch.dual import Dual

BACKENDS = ("auto", "reference", "triton")
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_duals(*tensors: Any) -> tuple[Dual, Dual, Dual]:
    """Convert q, k and v to Duals.

    Raises:
        TypeError: if one of them is neither a tensor nor a Dual of tensors.
    """
    q, k, v = (x if isinstance(x, Dual) else Dual(x) for x in tensors)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x.value)
        if x.tangent is not None:
            _check_tensor(f"{name}.tangent", x.tangent)
    return q, k, v


def check_arguments(
    q: Dual, k: Dual, v: Dual, scale: float | None, causal: bool, key_lengths: Tensor | None, backend: str
) -> None:
    """Check the arguments of `attention`.

    Reading the values of `key_lengths` synchronises with the GPU. Inside `torch.compile` that check is an
    assertion in the graph; if it fails on a GPU, the process cannot use CUDA any more.

    Raises:
        TypeError: for an unsupported dtype, dtypes that differ, key lengths that are not integers, a scale
            that is not a number, or a `causal` that is not a bool.
        ValueError: for shapes or devices that do not match, an empty dimension, a head width above 256, a
            scale that is not finite, key lengths outside 0 … M, or an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: one of {', '.join(BACKENDS)} is needed, got {backend!r}")
    if not (scale is None or isinstance(scale, float | int | torch.SymFloat)):
        raise TypeError(
            f"scale: a number is needed, got {type(scale).__name__}; multiply q by a tensor instead"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"causal: True or False is needed, got {causal!r}")
    if scale is not None and not abs(scale) < math.inf:  # the compiler cannot trace math.isfinite
        raise ValueError(f"scale: a finite number is needed, got {scale}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_one(name, x)
        if x.tangent is not None:
            _check_tangent(name, x.value, x.tangent)
    _check_together(q.value, k.value, v.value)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, q.value, k.value)


def _check_one(name: str, x: Dual) -> None:
    if x.value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: a floating-point dtype is needed, float16, bfloat16, float32 or float64, "
            f"got {x.value.dtype}"
        )
    if x.value.ndim != 4:
        raise ValueError(
            f"{name}: four dimensions (batch, heads, length, head width) are needed, "
            f"got shape {tuple(x.value.shape)}"
        )
    if x.value.shape[2] < 1:
        raise ValueError(f"{name}: at least 1 position is needed, got {x.value.shape[2]}")
    if not 1 <= x.value.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: a head width of 1 to {MAX_HEAD_DIM} is needed, got {x.value.shape[3]}")


def _check_tangent(name: str, value: Tensor, tangent: Tensor) -> None:
    _check_same(f"{name}.tangent", tangent, f"{name}.value", value)
    if tangent.shape != value.shape:
        raise ValueError(
            f"{name}.tangent: the shape of {name}.value, {tuple(value.shape)}, is needed, "
            f"got {tuple(tangent.shape)}"
        )


def _check_together(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_same("k", k, "q", q)
    _check_same("v", v, "q", q)
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: the batch, heads and head width of q, {tuple(q.shape)}, are needed, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: the shape of k, {tuple(k.shape)}, is needed, got {tuple(v.shape)}")


def _check_key_lengths(key_lengths: Any, q: Tensor, k: Tensor) -> None:
    _check_tensor("key_lengths", key_lengths)
    dtype = key_lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"key_lengths: an integer dtype is needed, got {dtype}")
    if key_lengths.shape != q.shape[:1]:
        raise ValueError(
            f"key_lengths: shape ({q.shape[0]},), the batch of q, is needed, got {tuple(key_lengths.shape)}"
        )
    if key_lengths.device != q.device:
        raise ValueError(f"key_lengths: the device of q, {q.device}, is needed, got {key_lengths.device}")
    lengths = key_lengths.to(torch.int64)
    keys = k.shape[2]
    within = ((lengths >= 0) & (lengths <= keys)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(within, f"key_lengths: 0 to {keys}, the number of keys, is needed")
    elif not within:
        raise ValueError(
            f"key_lengths: 0 to {keys}, the number of keys, is needed, "
            f"got {int(lengths.min())} to {int(lengths.max())}"
        )


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a tensor is needed, got {type(x).__name__}")


def _check_same(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Check that dtype and device are the same."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: the dtype of {other_name}, {other.dtype}, is needed, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: the device of {other_name}, {other.device}, is needed, got {x.device}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on x's device; None if autocast is off."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return None
    return torch.get_autocast_dtype(device_type)


def autocast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x in the dtype of autocast. None, or an x in float64, changes nothing."""
    return x.to(dtype) if dtype and x.is_floating_point() and x.dtype != torch.float64 else x
