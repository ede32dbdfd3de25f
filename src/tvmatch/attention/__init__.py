"""Attention that carries a tangent."""

import torch.nn.functional as F
from torch.autograd import forward_ad

from tvmatch.attention.reference import attention_reference
from tvmatch.dual import Dual

__all__ = ["attention", "attention_reference"]


def attention(q: Dual, k: Dual, v: Dual, *, scale: float | None = None) -> Dual:
    """softmax(α Q Kᵀ) V and its tangent; see `attention_reference` for the equations.

    Without tangents PyTorch's fused attention is used. It has no forward-mode rule, so inside
    `torch.func.jvp` (where plain tensors hide a tangent) the reference is used instead.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, D).
        scale: α, by default D^(−1/2).

    Returns:
        (B, H, N, D); the tangent is None if all three tangents are.
    """
    has_tangent = any(x.tangent is not None for x in (q, k, v))
    inside_forward_mode = forward_ad._current_level >= 0
    if has_tangent or inside_forward_mode:
        return attention_reference(q, k, v, scale=scale)
    return Dual(F.scaled_dot_product_attention(q.value, k.value, v.value, scale=scale))
