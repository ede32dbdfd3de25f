"""Replacements for PyTorch functions that fail or are wrong in forward mode, and the context that uses them.

Outside forward mode each replacement calls PyTorch's function. In forward mode, PyTorch has no rule for fused
attention, nor for the fused layer operator that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run
in eval mode without gradients. For the norms see `attention.norms`; for functions without a replacement
`attention.refusals`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint

from tvmatch.attention import norms
from tvmatch.attention.native import pytorch_attention
from tvmatch.attention.refusals import (
    RefuseWrongDerivatives,
    refuse_checkpoint,
    refusing_functions,
    refusing_script,
)

_pytorch_checkpoint_function = checkpoint.CheckpointFunction
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
    """`torch.nn.functional.scaled_dot_product_attention` with a correct tangent in forward mode.

    Outside forward mode this calls PyTorch's function. In forward mode, softmax(α Q Kᵀ + mask) V is computed
    by `attention` if there is no mask other than the causal one, no dropout, and keys and values have the
    same width of at most 256; otherwise by plain operators, which store the N × M matrices. Both
    support reverse mode. For `torch.compile` see `attention.forward_mode`.

    Args:
        query: (..., N, D). The leading dimensions of query, key and value broadcast.
        key: (..., M, D).
        value: (..., M, E).
        attn_mask: of a shape that broadcasts to (..., N, M). Boolean: True for keys that take part. Otherwise
            it is added to the scores, and may have a tangent and a gradient. Queries without keys give 0.
        dropout_p: dropout probability of the softmax; value and tangent drop the same entries.
        is_causal: query i attends only to keys j ≤ i, in addition to `attn_mask`.
        scale: α. Default: D^(−1/2).
        enable_gqa: each head of key and value (third dimension from the end) serves a group of query heads.

    Returns:
        (..., N, E).

    Raises:
        TypeError: in forward mode, for dtypes that are not floating-point or differ, or an integer mask.
        ValueError: in forward mode, for shapes that do not match.
        RuntimeError: under `torch.compile(fullgraph=True)`, if the compiled graph would lose the tangent.
    """
    if forward_ad._current_level < 0:
        return pytorch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    from tvmatch.attention import sdpa

    return sdpa.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


@contextmanager
def repair_forward_mode() -> Iterator[None]:
    """Make forward mode, and reverse mode through it, correct for models called in this context.

        with tvmatch.attention.repair_forward_mode():
            output, tangent = torch.func.jvp(model, (x,), (direction,))

    In forward mode, and only there:

    - `torch.nn.functional.scaled_dot_product_attention` is `tvmatch.attention.scaled_dot_product_attention`;
    - PyTorch's transformer layers do not use their fused layer operator;
    - `layer_norm`, `group_norm`, and `batch_norm` with running statistics use operators with correct rules;
    - operators with a wrong rule raise `NotImplementedError` (see `attention.refusals`), as do
      `torch.utils.checkpoint` and TorchScript. Operators whose tangent is correct, but not the gradients
      through it, raise only while gradients are recorded.

    Values that a model hides from PyTorch remain silently wrong: `detach`, `.data`, NumPy, custom kernels
    that are not registered as operators.

    The functions are replaced in `torch.nn.functional` for all threads until the last one leaves the context.
    In the entering thread a `TorchFunctionMode` also catches names imported by `from torch.nn.functional
    import …`, except inside `nn.MultiheadAttention`.

    Under `torch.compile` the context may be outside or inside the compiled function. Models with
    `nn.MultiheadAttention` run eagerly in forward mode or, with `fullgraph=True`, raise.
    """
    if torch.compiler.is_compiling():
        # The compiler cannot trace a lock. Compiled code restores the functions that it found, unless an
        # enclosing context, which may end first, has already replaced them.
        if F.scaled_dot_product_attention is scaled_dot_product_attention:
            yield
            return
        found = _assign(_FUNCTIONS + refusing_functions())
        try:
            yield
        finally:
            _assign(found)
        return
    _enter()
    try:
        with _MODE:
            yield
    finally:
        _leave()


# Module or class, name of the function in it, and the function to assign.
_Names = tuple[tuple[Any, str, Callable[..., Any]], ...]

_lock = threading.Lock()
_entered = 0
_found: _Names = ()


def _enter() -> None:
    global _entered, _found
    with _lock:
        if _entered == 0:
            _found = _assign(_FUNCTIONS + _METHODS)
        _entered += 1


def _leave() -> None:
    global _entered
    with _lock:
        _entered -= 1
        if _entered == 0:
            _assign(_found)


def _assign(names: _Names) -> _Names:
    """Assign the functions to their names; returns the previous functions."""
    found = tuple((module, name, getattr(module, name)) for module, name, _ in names)
    for module, name, function in names:
        setattr(module, name, function)
    return found


def _fastpath_enabled() -> bool:
    """Whether PyTorch's transformer layers may use their fused layer operator."""
    return forward_ad._current_level < 0 and _pytorch_fastpath_enabled()


_FUNCTIONS: _Names = (
    (F, "scaled_dot_product_attention", scaled_dot_product_attention),
    (F, "layer_norm", norms.layer_norm),
    (F, "group_norm", norms.group_norm),
    (F, "batch_norm", norms.batch_norm),
    (F, "instance_norm", norms.instance_norm),
    (torch.backends.mha, "get_fastpath_enabled", _fastpath_enabled),
)


# The name differs between the oldest and the newest supported PyTorch.
_WITHOUT_REENTRANCE = [
    name
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
    if hasattr(checkpoint, name)
]


def _without_reentrance(generator: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    """`generator` prepares a non-reentrant checkpoint, then yields; without gradients nothing is prepared."""

    def prepare(*arguments: Any, **options: Any) -> Iterator[None]:
        if forward_ad._current_level < 0:
            return generator(*arguments, **options)
        if torch.is_grad_enabled():
            refuse_checkpoint()
        return iter((None,))

    return prepare


class _CheckpointFunction(_pytorch_checkpoint_function):
    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_checkpoint()
        return _pytorch_checkpoint_function.apply(*arguments)


# Not assigned in compiled code: the compiler cannot assign to a class, and traces checkpoints itself.
_METHODS: _Names = (
    *((checkpoint, name, _without_reentrance(getattr(checkpoint, name))) for name in _WITHOUT_REENTRANCE),
    (checkpoint, "CheckpointFunction", _CheckpointFunction),
    (torch.nn.modules.batchnorm._BatchNorm, "forward", norms.batch_norm_forward),
    (torch.nn.SyncBatchNorm, "forward", norms.sync_batch_norm_forward),
    *(
        (kind, "__call__", refusing_script(kind.__call__))
        for kind in (torch.ScriptFunction, torch.ScriptMethod)
    ),
)

# Replacements for calls by another name: an imported function, or the C++ function.
_STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    pytorch_attention: scaled_dot_product_attention,
    norms.pytorch_layer_norm: norms.layer_norm,
    torch.layer_norm: norms.layer_norm,
    norms.pytorch_group_norm: norms.group_norm,
    torch.group_norm: norms.group_norm,
    norms.pytorch_batch_norm: norms.batch_norm,
    norms.pytorch_instance_norm: norms.instance_norm,
}

_MODE = RefuseWrongDerivatives(_STAND_INS)
