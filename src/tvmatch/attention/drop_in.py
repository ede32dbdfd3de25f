"""Stand-ins for PyTorch's functions in other people's models, and the context that puts them there.

Outside forward mode each is PyTorch's own. Inside `torch.func.jvp` and `torch.autograd.forward_ad` PyTorch's
are not right, as seen with 2.11 and 2.13 and written in the table of derivatives that comes with it:

- Fused attention, and the one operator for a whole layer that `nn.MultiheadAttention` and
  `nn.TransformerEncoderLayer` run in eval mode without gradients, have no forward-mode rule; PyTorch raises.
- Layer norm and the norms by statistics of a batch have one that reads the mean and the deviation which the
  operator saved, and their backward drops the gradients of these two. The tangent is right; **gradients
  through it are wrong, without a word**, and so are second tangents. (Group norm and RMS norm are right.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# PyTorch's own, also while the name in `F` stands for another.
pytorch_attention = F.scaled_dot_product_attention
_pytorch_layer_norm = F.layer_norm
_pytorch_batch_norm = F.batch_norm
_pytorch_instance_norm = F.instance_norm
_pytorch_fastpath_enabled = torch.backends.mha.get_fastpath_enabled


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the right tangent in forward mode.

    Outside forward mode the call is passed on as it is. Inside, softmax(α Q Kᵀ + mask) V is computed by
    `attention`, with its kernels and its memory, if there is no mask other than the causal one, no dropout,
    and keys and values have the same width of at most 256; else by plain operators, which hold the N × M
    matrices in memory. Reverse mode through the tangent works on both.

    Under `torch.compile` the tangent is right as well, or it is an error (with `fullgraph=True`); see
    `attention.forward_mode`.

    Args:
        query: (..., N, D). The leading dimensions of query, key and value broadcast.
        key: (..., M, D).
        value: (..., M, E).
        attn_mask: of a shape that broadcasts to (..., N, M). Boolean: True where the key is seen. Else it is
            added to the scores, and may have a tangent and a gradient. A query that sees no key gives zero
            value, tangent and gradients.
        dropout_p: probability with which an entry of the softmax is dropped; value and tangent drop the same
            ones.
        is_causal: query i sees the keys j ≤ i alone; together with `attn_mask`, those that both let through.
        scale: α, by default D^(−1/2).
        enable_gqa: heads, the third dimension from the end, of key and value each serve a group of the
            query's.

    Returns:
        (..., N, E).

    Raises:
        TypeError: in forward mode, for dtypes that are not floating-point or differ, or a mask of integers.
        ValueError: in forward mode, for shapes that do not fit.
        RuntimeError: under `torch.compile(fullgraph=True)`, where a hidden tangent would be lost.
    """
    if forward_ad._current_level < 0:
        return pytorch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    from tvmatch.attention import sdpa

    return sdpa.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


@contextmanager
def repair_forward_mode() -> Iterator[None]:
    """Models called in this context are right in forward mode, and in reverse mode through it, unmodified.

        with tvmatch.attention.repair_forward_mode():
            output, tangent = torch.func.jvp(model, (x,), (direction,))

    In forward mode, and there alone,

    - `torch.nn.functional.scaled_dot_product_attention` is `tvmatch.attention.scaled_dot_product_attention`;
    - PyTorch's transformer layers leave out their one operator for a whole layer;
    - `layer_norm` is computed by operators whose rules are right;
    - `batch_norm` in training and `instance_norm` raise while gradients are recorded.

    This holds for all threads, until the last of them has left the context. Models look these functions up in
    `torch.nn.functional` when they are called (`F.scaled_dot_product_attention`), and so do PyTorch's own
    modules. A module that took a name for itself, by `from torch.nn.functional import …`, is not reached:
    there, assign the function of this package to the name.

    Under `torch.compile` the context may be around the compiled function or within it. But the compiler does
    not look into `F.multi_head_attention_forward`: models with `nn.MultiheadAttention` run eagerly in forward
    mode or, with `fullgraph=True`, raise.

    (A `torch.overrides.TorchFunctionMode` would reach names that were taken, but not the attention inside
    `nn.MultiheadAttention`: PyTorch hands the mode that same function as a whole and switches it off inside.)
    """
    if torch.compiler.is_compiling():
        # The compiler cannot trace a lock. Compiled code puts back what it found when it ends; within another
        # context, which may have ended by then, it changes nothing.
        if F.scaled_dot_product_attention is scaled_dot_product_attention:
            yield
            return
        found = _put(_OURS)
        try:
            yield
        finally:
            _put(found)
        return
    _enter()
    try:
        yield
    finally:
        _leave()


# A function's module, its name there, and what is to be there.
_Names = tuple[tuple[ModuleType, str, Callable[..., Any]], ...]

_lock = threading.Lock()
_entered = 0
_found: _Names = ()


def _enter() -> None:
    global _entered, _found
    with _lock:
        if _entered == 0:
            _found = _put(_OURS)
        _entered += 1


def _leave() -> None:
    global _entered
    with _lock:
        _entered -= 1
        if _entered == 0:
            _put(_found)


def _put(names: _Names) -> _Names:
    """Assign; returns what was there."""
    found = tuple((module, name, getattr(module, name)) for module, name, _ in names)
    for module, name, function in names:
        setattr(module, name, function)
    return found


def _fastpath_enabled() -> bool:
    """Whether PyTorch's transformer layers may run as one operator."""
    return forward_ad._current_level < 0 and _pytorch_fastpath_enabled()


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x − mean) (variance + ε)^(−1/2) ∘ weight + bias; half precision is computed in float32."""
    if forward_ad._current_level < 0:
        return _pytorch_layer_norm(input, normalized_shape, weight, bias, eps)
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"input: a shape that ends in {shape} is needed, got {tuple(input.shape)}")
    if any(x is not None and x.shape != shape for x in (weight, bias)):
        raise ValueError(f"weight, bias: the shape {shape} is needed")

    x = input.to(torch.promote_types(input.dtype, torch.float32))
    # As PyTorch: on a GPU, autocast wants the result in float32.
    device = input.device.type
    widened = device not in ("cpu", "meta") and torch.is_autocast_enabled(device)
    dimensions = list(range(-len(shape), 0))
    x = x - x.mean(dimensions, keepdim=True)
    x = x * (x.square().mean(dimensions, keepdim=True) + eps).rsqrt()
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return x if widened else x.to(input.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        _refuse_gradients("batch_norm(training=True)")
    return _pytorch_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if use_input_stats:
        _refuse_gradients("instance_norm(use_input_stats=True)")
    return _pytorch_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _refuse_gradients(name: str) -> None:
    if forward_ad._current_level >= 0 and torch.is_grad_enabled():
        raise NotImplementedError(
            f"torch.nn.functional.{name}: PyTorch's gradients through its tangent are wrong; use group_norm "
            "or layer_norm, or torch.no_grad() if the tangent alone is needed"
        )


_OURS: _Names = (
    (F, "scaled_dot_product_attention", scaled_dot_product_attention),
    (F, "layer_norm", _layer_norm),
    (F, "batch_norm", _batch_norm),
    (F, "instance_norm", _instance_norm),
    (torch.backends.mha, "get_fastpath_enabled", _fastpath_enabled),
)
