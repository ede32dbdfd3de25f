"""Softmax attention on (value, tangent) in plain PyTorch: any device and precision, the oracle for kernels.

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

    Ṡ = α (Q̇ Kᵀ + Q K̇ᵀ), μ_i = Σ_j P_ij Ṡ_ij, Ṗ = P ∘ (Ṡ − μ). A hidden key has S = −∞, so P = Ṗ = 0; a
    query with no keys has P = 0 throughout. The N × M matrices are held in memory. Half precision is computed
    in float32 and rounded at the end.

    The arguments are not checked here: `attention` does that.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D). Keys and values must be finite also where they are hidden.
        scale: α, by default D^(−1/2).
        causal: query i sees the keys j ≤ i alone, whatever N and M.
        key_lengths: integers (B,) in 0 … M; the keys from there on are hidden. None: all are seen.

    Returns:
        (B, H, N, D) in the precision of q; the tangent is None if all three tangents are.
    """
    scale = 1 / math.sqrt(q.value.shape[-1]) if scale is None else scale
    dtype = q.value.dtype
    precision = torch.promote_types(dtype, torch.float32)
    q, k, v = (linear_map(lambda x: x.to(precision), x) for x in (q, k, v))

    probabilities = _softmax(scale * (q.value @ k.value.mT), causal, key_lengths)
    output = probabilities @ v.value

    tangent = None if v.tangent is None else probabilities @ v.tangent
    scores_tangent = _scores_tangent(q, k)
    if scores_tangent is not None:
        scores_tangent = scale * scores_tangent
        mean = (probabilities * scores_tangent).sum(-1, keepdim=True)
        moved = (probabilities * (scores_tangent - mean)) @ v.value
        tangent = moved if tangent is None else tangent + moved
    return linear_map(lambda x: x.to(dtype), Dual(output, tangent))


def _softmax(scores: Tensor, causal: bool, key_lengths: Tensor | None) -> Tensor:
    """P of shape (B, H, N, M): softmax over the keys that are not hidden."""
    if not causal and key_lengths is None:
        return scores.softmax(-1)
    queries, keys = scores.shape[-2:]
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=scores.device)
    if causal:
        hidden = ~hidden.logical_not().tril()
    if key_lengths is not None:
        positions = torch.arange(keys, device=scores.device)
        hidden = hidden | (positions >= key_lengths.to(torch.int64)[:, None, None, None])
    return softmax_of_visible(scores, hidden)


def softmax_of_visible(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the keys that are not hidden; zero in a row where all are."""
    # A softmax of −∞ alone is NaN, and 0 · NaN stays NaN in its gradient: rows without keys are left as they
    # are, which is finite, and cleared afterwards.
    empty = hidden.all(-1, keepdim=True)
    return scores.masked_fill(hidden & ~empty, -math.inf).softmax(-1).masked_fill(empty, 0.0)


def _scores_tangent(q: Dual, k: Dual) -> Tensor | None:
    """Q̇ Kᵀ + Q K̇ᵀ as one product over the concatenated head dimension, or None."""
    if q.tangent is not None and k.tangent is not None:
        return torch.cat([q.tangent, q.value], -1) @ torch.cat([k.value, k.tangent], -1).mT
    if q.tangent is not None:
        return q.tangent @ k.value.mT
    if k.tangent is not None:
        return q.value @ k.tangent.mT
    return None
