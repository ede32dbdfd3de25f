"""Dual numbers: tensors with a tangent, and the rules of the operations on them."""

from tvmatch.dual.rules import (
    Dual,
    add,
    add_product,
    as_dual,
    gelu,
    layer_norm,
    linear,
    linear_map,
    modulate,
    multiply,
    pointwise,
    rms_norm,
    silu,
    split,
    subtract,
    unbind,
)

__all__ = [
    "Dual",
    "add",
    "add_product",
    "as_dual",
    "gelu",
    "layer_norm",
    "linear",
    "linear_map",
    "modulate",
    "multiply",
    "pointwise",
    "rms_norm",
    "silu",
    "split",
    "subtract",
    "unbind",
]
