"""Stand-ins for PyTorch's functions in other people's models, and the context that puts them there.

Outside forward mode each is PyTorch's own. Inside `torch.func.jvp` and `torch.autograd.forward_ad` PyTorch's
are not right. Fused attention, and the one operator for a whole layer that `nn.MultiheadAttention` and
`nn.TransformerEncoderLayer` run in eval mode without gradients, have no forward-mode rule: PyTorch raises.
For the norms see `attention.norms`, for what has no stand-in `attention.refusals`.
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
    - `layer_norm` and `group_norm` are computed by operators whose rules are right, in any memory format and
      under autocast, and so is `batch_norm` by running statistics;
    - operators whose tangent PyTorch gets wrong without a word raise `NotImplementedError` where they meet
      one, by whatever name they are called: see `attention.refusals`. Those whose tangent is right, but not
      the gradients through it (`batch_norm` in training, `instance_norm`, `linalg.solve`, `det`, …), do so
      while gradients are recorded. Operators registered with `torch.library` that lose the tangent are among
      them, and `torch.utils.checkpoint`, and TorchScript that holds such an operator or layer norm.

    What remains wrong without a word is what a model does to hide values from PyTorch: `detach`, `.data`,
    NumPy, kernels of its own outside an operator.

    The functions are replaced in `torch.nn.functional`, where models and PyTorch's own modules look them up
    when they are called, for all threads until the last of them has left the context. In the thread that
    entered it, a `TorchFunctionMode` reaches the names besides that a module took for itself by
    `from torch.nn.functional import …`, except inside `nn.MultiheadAttention`, which PyTorch hands to the
    mode as a whole.

    Under `torch.compile` the context may be around the compiled function or within it. But the compiler does
    not look into `F.multi_head_attention_forward`: models with `nn.MultiheadAttention` run eagerly in forward
    mode or, with `fullgraph=True`, raise.
    """
    if torch.compiler.is_compiling():
        # The compiler cannot trace a lock. Compiled code puts back what it found when it ends; within another
        # context, which may have ended by then, it changes nothing.
        if F.scaled_dot_product_attention is scaled_dot_product_attention:
            yield
            return
        found = _put(_FUNCTIONS + refusing_functions())
        try:
            yield
        finally:
            _put(found)
        return
    _enter()
    try:
        with _MODE:
            yield
    finally:
        _leave()


# A function's module or class, its name there, and what is to be there.
_Names = tuple[tuple[Any, str, Callable[..., Any]], ...]

_lock = threading.Lock()
_entered = 0
_found: _Names = ()


def _enter() -> None:
    global _entered, _found
    with _lock:
        if _entered == 0:
            _found = _put(_FUNCTIONS + _METHODS)
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


_FUNCTIONS: _Names = (
    (F, "scaled_dot_product_attention", scaled_dot_product_attention),
    (F, "layer_norm", norms.layer_norm),
    (F, "group_norm", norms.group_norm),
    (F, "batch_norm", norms.batch_norm),
    (F, "instance_norm", norms.instance_norm),
    (torch.backends.mha, "get_fastpath_enabled", _fastpath_enabled),
)


# Its name when the oldest, and the newest PyTorch is installed.
_WITHOUT_REENTRANCE = [
    name
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
    if hasattr(checkpoint, name)
]


def _without_reentrance(start: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    """`start` runs a checkpoint's first half and pauses; without gradients there is nothing to prepare."""

    def started(*arguments: Any, **options: Any) -> Iterator[None]:
        if forward_ad._current_level < 0:
            return start(*arguments, **options)
        if torch.is_grad_enabled():
            refuse_checkpoint()
        return iter((None,))

    return started


class _CheckpointFunction(_pytorch_checkpoint_function):
    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_checkpoint()
        return _pytorch_checkpoint_function.apply(*arguments)


# The compiler cannot assign to a class, and looks into checkpoints by itself.
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

# The same for calls by another name: one that a module took for itself, or that of the C++ function.
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
