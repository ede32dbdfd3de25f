"""`attention`: argument checks, autocast, forward mode, and the choice of a backend."""

import math
from functools import partial
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tvmatch.attention.arguments import as_duals, autocast, autocast_dtype, check_arguments
from tvmatch.attention.native import pytorch_attention
from tvmatch.attention.reference import attention_reference
from tvmatch.dual import Dual, linear_map

Backend = Literal["auto", "reference", "triton"]


class Options(TypedDict, total=False):
    """The optional arguments of `attention`."""

    scale: float | None
    causal: bool
    key_lengths: Tensor | None
    backend: Backend


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> Tensor: ...


@overload
def attention(q: Dual, k: Tensor | Dual, v: Tensor | Dual, **options: Unpack[Options]) -> Dual: ...


@overload
def attention(q: Tensor | Dual, k: Dual, v: Tensor | Dual, **options: Unpack[Options]) -> Dual: ...


@overload
def attention(q: Tensor | Dual, k: Tensor | Dual, v: Dual, **options: Unpack[Options]) -> Dual: ...


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
    """Compute softmax(α Q Kᵀ) V and, for Duals, its tangent; `attention_reference` has the equations.

    A tangent of None costs nothing. Plain tensors also work inside `torch.func.jvp` and
    `torch.autograd.forward_ad`: the tangent, and gradients through it, are correct (see
    `attention.forward_mode`). Under autocast, inputs other than float64 are cast to its dtype, as in PyTorch.

    Backends:
        "reference": plain PyTorch operators; stores the N × M matrices.
        "triton": the fused kernels, on a CUDA device (or on the CPU in Triton's interpreter). Float32
            products are IEEE, not TF32; half-precision products are accumulated in float32.
        "auto": with a tangent or key lengths, the fused kernels if they can run, else the reference;
            without either, PyTorch's fused attention. Float64 tangents, and `torch.func` transforms other
            than jvp, use the reference.

    Args:
        q: queries (B, H, N, D); N ≥ 1, 1 ≤ D ≤ 256. Any strides.
        k: keys (B, H, M, D); M ≥ 1.
        v: values (B, H, M, D).
        scale: α. Default: D^(−1/2).
        causal: query i attends only to keys j ≤ i, for any N and M.
        key_lengths: integers (B,) in 0 … M. Later keys and values are masked, but must be finite. A query
            without keys has value and tangent zero. The check of their values synchronises with the GPU.
        backend: see above.

    Returns:
        (B, H, N, D): a Dual if one of q, k, v is; its tangent is None if all of theirs are.

    Raises:
        TypeError: if dtypes are not floating-point or differ between q, k, v and their tangents, if
            key_lengths are not integers, scale is not a number, or the backend "triton" is given float64.
        ValueError: if shapes or devices do not match, the head width is above 256, key_lengths are outside
            0 … M, scale is not finite, or the backend is unknown.
        RuntimeError: if the backend "triton" cannot run here; or under `torch.compile(fullgraph=True)` in
            forward mode, if the compiled graph would lose the tangent.
    """
    duals = as_duals(q, k, v)
    dtype = autocast_dtype(duals[0].value)
    if dtype is None:
        result = _attend(*duals, scale, causal, key_lengths, backend)
    else:
        q_cast, k_cast, v_cast = (linear_map(partial(autocast, dtype=dtype), x) for x in duals)
        with torch.autocast(q_cast.value.device.type, enabled=False):
            result = _attend(q_cast, k_cast, v_cast, scale, causal, key_lengths, backend)
    return result if any(isinstance(x, Dual) for x in (q, k, v)) else result.value


def _attend(
    q: Dual, k: Dual, v: Dual, scale: float | None, causal: bool, key_lengths: Tensor | None, backend: str
) -> Dual:
    """Check the arguments, then compute; if a forward-mode level is active, by `forward_mode.attend`."""
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
    """Attention on Duals with the given backend; "auto" chooses one."""
    has_tangent = any(x.tangent is not None for x in (q, k, v))
    # With a causal mask PyTorch's attention returns NaN for a scale ≤ 0 (PyTorch 2.13 on a CPU).
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
    """Why the fused kernels do not support tensors like `x`; None if they do."""
    if x.dtype == torch.float64:
        if forced:
            raise TypeError('backend: "triton" has no float64, got torch.float64; use "reference" or "auto"')
        return "float64"
    if torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return "inside a transform of torch.func other than jvp"
    from tvmatch.attention.operators import unusable

    reason: str | None = unusable(x.device, x.dtype)
    return reason
