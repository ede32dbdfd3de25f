"""Softmax attention on (value, tangent) in plain PyTorch; the tests compare the kernels with it.

Shapes: B batch, H heads, N queries, M keys, D head width.
"""

import math

import torch
from torch import Tensor

from tvmatch.dual import Dual, linear_map


def attention_reference(
    q: Dual,
    k: Dual,
    v: Dual,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
) -> Dual:
    """O = P V with P = softmax(S), S = α Q Kᵀ, and its tangent Ȯ = Ṗ V + P V̇.

    Ṡ = α (Q̇ Kᵀ + Q K̇ᵀ), μ_i = Σ_j P_ij Ṡ_ij, Ṗ = P ∘ (Ṡ − μ). A masked key has S = −∞, so P = Ṗ = 0; a
    query without keys has P = 0. Stores the N × M matrices. Half-precision inputs are computed in float32 and
    the result is rounded. The arguments are not checked; `attention` checks them.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D). Masked keys and values must be finite, too.
        scale: α. Default: D^(−1/2).
        causal: query i attends only to keys j ≤ i, for any N and M.
        key_lengths: integers (B,) in 0 … M; later keys are masked. None: no key is masked.

    Returns:
        (B, H, N, D) in the dtype of q; the tangent is None if all three tangents are.
    """
    scale = 1 / math.sqrt(q.value.shape[-1]) if scale is None else scale
    dtype = q.value.dtype
    precision = torch.promote_types(dtype, torch.float32)
    q, k, v = (linear_map(lambda x: x.to(precision), x) for x in (q, k, v))

    masked = None
    if key_lengths is not None:
        positions = torch.arange(k.value.shape[2], device=k.value.device)
        masked = positions >= key_lengths.to(torch.int64)[:, None, None, None]
    probabilities = masked_softmax(scale * (q.value @ k.value.mT), causal, masked)
    output = probabilities @ v.value

    tangent = None if v.tangent is None else probabilities @ v.tangent
    scores_tangent = _scores_tangent(q, k)
    if scores_tangent is not None:
        scores_tangent = scale * scores_tangent
        mean = (probabilities * scores_tangent).sum(-1, keepdim=True)
        moved = (probabilities * (scores_tangent - mean)) @ v.value
        tangent = moved if tangent is None else tangent + moved
    return linear_map(lambda x: x.to(dtype), Dual(output, tangent))


def masked_softmax(scores: Tensor, causal: bool, masked: Tensor | None) -> Tensor:
    """Softmax over the keys that are not masked; zero in a row where all are.

    Args:
        scores: (..., N, M).
        causal: mask the keys j > i of query i.
        masked: bool, of a shape that broadcasts to the scores'; True for a masked key.
    """
    if causal:
        later = ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        masked = later if masked is None else later | masked
    if masked is None:
        return scores.softmax(-1)
    # The softmax of a row of −∞ is NaN, and its gradient is NaN even after multiplication by 0. Rows without
    # keys therefore keep their finite scores here, and are set to zero afterwards.
    empty = masked.all(-1, keepdim=True)
    return scores.masked_fill(masked & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0.0)


def _scores_tangent(q: Dual, k: Dual) -> Tensor | None:
    """Q̇ Kᵀ + Q K̇ᵀ as one product over the concatenated head dimension, or None."""
    if q.tangent is not None and k.tangent is not None:
        return torch.cat([q.tangent, q.value], -1) @ torch.cat([k.value, k.tangent], -1).mT
    if q.tangent is not None:
        return q.tangent @ k.value.mT
    if k.tangent is not None:
        return q.value @ k.tangent.mT
    return None
