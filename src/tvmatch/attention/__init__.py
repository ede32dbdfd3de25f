"""Softmax attention with Jacobian-vector products."""

from tvmatch.attention.dispatch import Backend, attention
from tvmatch.attention.drop_in import repair_forward_mode, scaled_dot_product_attention
from tvmatch.attention.reference import attention_reference

__all__ = [
    "Backend",
    "attention",
    "attention_reference",
    "repair_forward_mode",
    "scaled_dot_product_attention",
]
