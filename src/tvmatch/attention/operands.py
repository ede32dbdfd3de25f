"""Inputs and outputs of the kernels, as named tuples of tensors.

Shapes: B batch, H heads, N queries, M keys, D head width. Outputs and gradients are contiguous as (B, N, H,
D), so that the following linear layer needs no copy.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """Inputs of attention: q (B, H, N, D), k and v (B, H, M, D), and their tangents or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_tangent: Tensor | None = None
    k_tangent: Tensor | None = None
    v_tangent: Tensor | None = None

    @property
    def has_tangent(self) -> bool:
        return any(x is not None for x in self[3:])

    @property
    def has_scores_tangent(self) -> bool:
        """Whether Ṡ can be nonzero."""
        return self.q_tangent is not None or self.k_tangent is not None


class Forward(NamedTuple):
    """Results of the forward kernel.

    Attributes:
        output: O (B, H, N, D).
        output_tangent: Ȯ, or None without a tangent.
        log_sum_exp: log₂ Σ_j 2^(S_ij log₂e), float32 (B, H, N); 0 in a row without keys.
        mean: μ, float32 (B, H, N), or None where Ṡ = 0.
    """

    output: Tensor
    output_tangent: Tensor | None
    log_sum_exp: Tensor
    mean: Tensor | None


class Gradients(NamedTuple):
    """Gradients of `Operands`; None for an absent operand, or if the gradient is exactly zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_tangent: Tensor | None
    k_tangent: Tensor | None
    v_tangent: Tensor | None


def empty_like_heads(x: Tensor) -> Tensor:
    """Uninitialised (B, H, N, D), contiguous as (B, N, H, D)."""
    batch, heads, rows, head_dim = x.shape
    return x.new_empty(batch, rows, heads, head_dim).transpose(1, 2)


def empty_rows(q: Tensor) -> Tensor:
    """Uninitialised float32 (B, H, N)."""
    return q.new_empty(q.shape[:3], dtype=torch.float32)
