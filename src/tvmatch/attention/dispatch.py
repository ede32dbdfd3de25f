"""`attention`: checks, autocast, forward mode, and the choice of a backend."""

import math
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tvmatch.attention.arguments import as_duals, check_arguments
from tvmatch.attention.native import pytorch_attention
from tvmatch.attention.reference import attention_reference
from tvmatch.dual import Dual, linear_map

Backend = Literal["auto", "reference", "triton"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Dual,
    k: Tensor | Dual,
    v: Tensor | Dual,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> Dual: ...


@overload
def attention(
    q: Tensor | Dual,
    k: Dual,
    v: Tensor | Dual,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> Dual: ...


@overload
def attention(
    q: Tensor | Dual,
    k: Tensor | Dual,
    v: Dual,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> Dual: ...


def attention(
    q: Tensor | Dual,
    k: Tensor | Dual,
    v: Tensor | Dual,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | Dual:
    """softmax(α Q Kᵀ) V and, of Duals, its tangent; see `attention_reference` for the equations.

    Work for a tangent that is None is skipped. Plain tensors inside `torch.func.jvp` or
    `torch.autograd.forward_ad` give the right tangent and the right gradients through it; see
    `attention.forward_mode`. Under autocast, inputs other than float64 are cast to its precision, as in
    PyTorch's own attention.

    Backends:
        "reference": plain PyTorch; holds the N × M matrices in memory.
        "triton": the fused kernels, on a CUDA device (or a CPU in Triton's interpreter). Float32 products are
            IEEE, not TF32; half precision is accumulated in float32.
        "auto": with a tangent or key lengths, the fused kernels where they can run, else the reference.
            Without either, PyTorch's fused attention. Float64 tangents, and transforms of `torch.func` that
            an operator cannot follow, go to the reference.

    Args:
        q: queries (B, H, N, D); N ≥ 1, 1 ≤ D ≤ 256. Views with any strides are fine.
        k: keys (B, H, M, D); M ≥ 1.
        v: values (B, H, M, D).
        scale: α, by default D^(−1/2).
        causal: query i sees the keys j ≤ i alone, whatever N and M.
        key_lengths: integers (B,) in 0 … M; the keys and values from there on are not seen, but must be
            finite. A query with no keys gives zero value and zero tangent. Checking them waits for a GPU.
        backend: see above.

    Returns:
        (B, H, N, D): a Dual if one of q, k, v is; its tangent is None if all of theirs are.

    Raises:
        TypeError: if dtypes are not floating-point or differ between q, k, v and their tangents, if
            key_lengths are not integers or scale is not a number, if float64 is forced onto "triton".
        ValueError: if shapes or devices do not fit, the head width is above 256, key_lengths are outside
            0 … M, scale is not finite, or the backend is unknown.
        RuntimeError: if "triton" is forced where it cannot run; for a forward-mode transform around or inside
            `torch.compile(fullgraph=True)`, where a hidden tangent would be lost.
    """
    duals = as_duals(q, k, v)
    device_type = duals[0].value.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # meta has none
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            result = _attend(*_cast(duals, dtype), scale, causal, key_lengths, backend)
    else:
        result = _attend(*duals, scale, causal, key_lengths, backend)
    return result if any(isinstance(x, Dual) for x in (q, k, v)) else result.value


def _cast(duals: tuple[Dual, Dual, Dual], dtype: torch.dtype) -> tuple[Dual, Dual, Dual]:
    """To the precision of autocast, which leaves float64 alone."""

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    q, k, v = (linear_map(cast, x) for x in duals)
    return q, k, v


def _attend(
    q: Dual, k: Dual, v: Dual, scale: float | None, causal: bool, key_lengths: Tensor | None, backend: str
) -> Dual:
    """Check the arguments, then compute, in forward mode where a level of it is open."""
    check_arguments(q, k, v, scale, causal, key_lengths, backend)
    scale = 1 / math.sqrt(q.value.shape[-1]) if scale is None else float(scale)
    compute = partial(_compute, scale=scale, causal=causal, key_lengths=key_lengths)
    if forward_ad._current_level >= 0:
        from tvmatch.attention import forward_mode

        return forward_mode.attend(compute, q, k, v, backend)
    return compute(q, k, v, backend)


def _compute(
    q: Dual, k: Dual, v: Dual, backend: str, *, scale: float, causal: bool, key_lengths: Tensor | None
) -> Dual:
    """Attention on Duals by the backend that was asked for or, if that is "auto", fits best."""
    has_tangent = any(x.tangent is not None for x in (q, k, v))
    # PyTorch's gives NaN for a scale of zero or less where the mask is causal (seen on a CPU with 2.13).
    if backend == "auto" and not has_tangent and key_lengths is None and scale > 0:
        return Dual(pytorch_attention(q.value, k.value, v.value, scale=scale, is_causal=causal))
    if backend == "triton" or (backend == "auto" and q.value.device.type == "cuda"):
        obstacle = _obstacle_to_kernels(q.value, forced=backend == "triton")
        if obstacle is None:
            from tvmatch.attention.operators import attention_triton

            return attention_triton(q, k, v, scale=scale, causal=causal, key_lengths=key_lengths)
        if backend == "triton":
            raise RuntimeError(f'backend: "triton" cannot run here: {obstacle}')
    return attention_reference(q, k, v, scale=scale, causal=causal, key_lengths=key_lengths)


def _obstacle_to_kernels(x: Tensor, *, forced: bool) -> str | None:
    """Why the fused kernels cannot serve tensors like `x`, or None."""
    if x.dtype == torch.float64:
        if forced:
            raise TypeError('backend: "triton" has no float64, got torch.float64; use "reference" or "auto"')
        return "float64"
    if torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return "inside a transform of torch.func other than jvp"
    from tvmatch.attention.operators import unusable

    reason: str | None = unusable(x.device, x.dtype)
    return reason
