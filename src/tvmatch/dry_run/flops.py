"""Floating-point operations of PyTorch's operators and of this package's attention.

Only matrix products are counted, with two operations for a multiply-add, as in PyTorch and most papers.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# Products of N × M × D per head (TVM, arXiv 2511.19797, section 7): S = QKᵀ and PV in the forward pass, with
# tangents also Q̇Kᵀ, QK̇ᵀ, ṖV and PV̇. 5 and 15 in the backward pass, without products that are computed twice.
FORWARD, FORWARD_DUAL, BACKWARD, BACKWARD_DUAL = 2, 6, 5, 15


def operations(operator: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], result: Any) -> int:
    """FLOPs of a call of an operator; 0 if it is not a matrix product."""
    packet = operator.overloadpacket
    attention = _attention_formulas().get(packet)
    if attention is not None:
        return attention(*arguments)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*arguments, **options, out_val=result))


@cache
def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for operators of attention that PyTorch has no formula for."""
    from tvmatch.attention import operators as ours

    aten = torch.ops.aten

    def forward(q: Tensor, k: Tensor, *_: Any) -> int:
        return _products(FORWARD, q, k)

    def forward_dual(q: Tensor, k: Tensor, *_: Any) -> int:
        return _products(FORWARD_DUAL, q, k)

    def backward(gradient: Tensor, q: Tensor, k: Tensor, *_: Any) -> int:
        return _products(BACKWARD, q, k)

    def joint_backward(
        gradient: Tensor | None, tangent_gradient: Tensor | None, q: Tensor, k: Tensor, *_: Any
    ) -> int:
        return _products(BACKWARD if tangent_gradient is None else BACKWARD_DUAL, q, k)

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        ours.attention_value._opoverload.overloadpacket: forward,
        ours.attention_dual._opoverload.overloadpacket: forward_dual,
        ours.attention_backward._opoverload.overloadpacket: joint_backward,
    }


def _products(count: int, q: Tensor, k: Tensor) -> int:
    """FLOPs of `count` products, for queries (B, H, N, D) and keys (B, H, M, D)."""
    return 2 * count * q.numel() * k.shape[2]
