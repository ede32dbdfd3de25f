"""`scaled_dot_product_attention` in forward mode: masks, dropout, grouped queries, any leading dimensions.

PyTorch's unfused attention is not used: it has forward-mode rules (2.11 and 2.13), but gradients through its
tangent are NaN for a query that attends to no key, and `torch.nn.attention.sdpa_kernel` is global.

Importing this module loads the compiler; import it only in forward mode.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tvmatch.attention import forward_mode
from tvmatch.attention.arguments import MAX_HEAD_DIM, autocast, autocast_dtype
from tvmatch.attention.dispatch import attention
from tvmatch.attention.reference import masked_softmax
from tvmatch.attention.refusals import hides_tangent

# query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool]


def attend(*arguments: *Arguments) -> Tensor:
    """Compute `drop_in.scaled_dot_product_attention`, with the same arguments by position."""
    query, key, value, attn_mask, dropout_p, *_ = arguments
    if torch.compiler.is_compiling() and not _can_be_traced(query, key, value, attn_mask, dropout_p):
        result: Tensor = _attend_eagerly(*arguments)
        return result
    return _attend(*arguments)


def _can_be_traced(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> bool:
    """Whether the compiler sees the tangents, and only operators that have forward-mode rules."""
    if query.device.type == "cuda" and _has_kernel(query, value, attn_mask, dropout_p):
        return False
    return forward_mode.is_single_level() and hides_tangent((query, key, value, attn_mask))


def _has_kernel(query: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> bool:
    """Whether `attention` supports these arguments."""
    same_width = query.shape[-1] == value.shape[-1] <= MAX_HEAD_DIM
    some_positions = query.shape[-2] >= 1 and value.shape[-2] >= 1
    return attn_mask is None and dropout_p == 0 and same_width and some_positions


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    dtype = autocast_dtype(query)
    query, key, value = (autocast(x, dtype) for x in (query, key, value))
    _check_inputs(query, key, value)
    if enable_gqa:
        key, value = _repeat_heads("key", key, query), _repeat_heads("value", value, query)
    batch = _broadcast(query, key, value)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if attn_mask is not None:
        _check_mask(attn_mask, (*batch, query.shape[-2], key.shape[-2]))
    elif _has_kernel(query, value, attn_mask, dropout_p):
        return _attend_fused(query, key, value, batch, is_causal, scale)
    if dtype is None:
        return _attend_plainly(query, key, value, attn_mask, dropout_p, is_causal, scale)
    with torch.autocast(query.device.type, enabled=False):
        return _attend_plainly(query, key, value, attn_mask, dropout_p, is_causal, scale)


_attend_eagerly = torch.compiler.disable(
    _attend,
    reason="tvmatch.attention.scaled_dot_product_attention inside a forward-mode transform (torch.func.jvp, "
    "forward_ad): a compiled graph would drop the tangent. Do without fullgraph=True, or pass "
    "tvmatch.Dual(value, tangent) to tvmatch.attention.attention instead of using the transform",
)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, batch: torch.Size, is_causal: bool, scale: float
) -> Tensor:
    """`attention`, reshaped for any number of leading dimensions."""
    heads = batch[-1] if batch else 1

    def four_dimensional(x: Tensor) -> Tensor:
        x = x if x.shape[:-2] == batch else x.expand(*batch, *x.shape[-2:])
        return x.reshape(math.prod(batch[:-1]), heads, *x.shape[-2:])

    q, k, v = four_dimensional(query), four_dimensional(key), four_dimensional(value)
    result = attention(q, k, v, scale=scale, causal=is_causal)
    return result.reshape(*batch, *result.shape[-2:])


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """softmax(α Q Kᵀ + mask) V; half-precision inputs are computed in float32, and the result is rounded."""
    precision = torch.promote_types(query.dtype, torch.float32)
    scores = scale * (query.to(precision) @ key.to(precision).mT)
    probabilities = _softmax(scores, attn_mask, is_causal)
    if dropout_p != 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return (probabilities @ value.to(precision)).to(query.dtype)


def _softmax(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Softmax over the keys that are not masked; zero in a row where all are."""
    masked = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        masked = ~attn_mask
    elif attn_mask is not None:
        attn_mask = attn_mask.to(scores.dtype)
        masked = attn_mask == -math.inf
        scores = scores + attn_mask.masked_fill(masked, 0.0)
    return masked_softmax(scores, is_causal, masked)


def _repeat_heads(name: str, x: Tensor, query: Tensor) -> Tensor:
    """Repeat the heads of key or value to the query's number of heads."""
    if min(x.ndim, query.ndim) < 3 or not x.shape[-3] or query.shape[-3] % x.shape[-3]:
        raise ValueError(
            f"{name}: with enable_gqa, a number of heads that divides the query's is needed in the third "
            f"dimension from the end, got shape {tuple(x.shape)} and a query of {tuple(query.shape)}"
        )
    groups = query.shape[-3] // x.shape[-3]
    return x if groups == 1 else x.repeat_interleave(groups, -3)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: a floating-point dtype is needed, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: the dtype of query, {query.dtype}, is needed, got {x.dtype}")
        if x.ndim < 2:
            raise ValueError(f"{name}: at least 2 dimensions are needed, got shape {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: the width of query, {query.shape[-1]}, is needed, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value: the length of key, {key.shape[-2]}, is needed, got {value.shape[-2]}")


def _broadcast(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    """The broadcast leading dimensions."""
    try:
        shape: torch.Size = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key, value: leading dimensions do not broadcast: {shapes}") from None
    return shape


def _check_mask(attn_mask: Tensor, shape: tuple[int, ...]) -> None:
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: a boolean or floating-point dtype is needed, got {attn_mask.dtype}")
    sizes = zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    if attn_mask.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"attn_mask: a shape that broadcasts to {shape} is needed, got {tuple(attn_mask.shape)}"
        )
