"""Softmax attention on (value, tangent) in plain PyTorch: any device and precision, the oracle for kernels.

Shapes: B batch, H heads, N queries, M keys, D head width.
"""

import math

import torch
from torch import Tensor

from tvmatch.dual import Dual


def attention_reference(q: Dual, k: Dual, v: Dual, *, scale: float | None = None) -> Dual:
    """O = P V with P = softmax(S), S = α Q Kᵀ, and its tangent Ȯ = Ṗ V + P V̇.

    Ṡ = α (Q̇ Kᵀ + Q K̇ᵀ), μ_i = Σ_j P_ij Ṡ_ij, Ṗ = P ∘ (Ṡ − μ). The N × M matrices are held in memory, and
    the softmax is computed in float32 at least.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        scale: α, by default D^(−1/2).

    Returns:
        (B, H, N, D); the tangent is None if all three tangents are.
    """
    scale = 1 / math.sqrt(q.value.shape[-1]) if scale is None else scale
    scores = scale * (q.value @ k.value.mT)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = probabilities.to(v.value.dtype)
    output = weights @ v.value

    tangent = None if v.tangent is None else weights @ v.tangent
    scores_tangent = _scores_tangent(q, k)
    if scores_tangent is not None:
        scores_tangent = scale * scores_tangent
        mean = (probabilities * scores_tangent).sum(-1, keepdim=True)
        moved = (probabilities * (scores_tangent - mean)).to(v.value.dtype) @ v.value
        tangent = moved if tangent is None else tangent + moved
    return Dual(output, tangent)


def _scores_tangent(q: Dual, k: Dual) -> Tensor | None:
    """Q̇ Kᵀ + Q K̇ᵀ as one product over the concatenated head dimension, or None."""
    if q.tangent is not None and k.tangent is not None:
        return torch.cat([q.tangent, q.value], -1) @ torch.cat([k.value, k.tangent], -1).mT
    if q.tangent is not None:
        return q.tangent @ k.value.mT
    if k.tangent is not None:
        return q.value @ k.tangent.mT
    return None
