"""The kernels as PyTorch operators: what they return without running (fakes), and their derivatives.

`torch.compile` puts such an operator into its graph as it is, and autograd differentiates it by the joint
backward. An operator has no forward mode: a tangent hidden in a plain tensor would be dropped without a word,
which is why `tvmatch.attention.attention` is the door and these operators are not for calling by hand.

The kernels are imported when the first operator runs, so that a machine without Triton can import this file.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tvmatch.attention.operands import Forward, Operands, empty_like_heads, empty_rows
from tvmatch.dual import Dual


def attention_triton(
    q: Dual, k: Dual, v: Dual, *, scale: float, causal: bool, key_lengths: Tensor | None
) -> Dual:
    """Attention by the fused kernels; arguments as for `attention`, already checked."""
    tangents = q.tangent, k.tangent, v.tangent
    if all(tangent is None for tangent in tangents):
        return Dual(attention_value(q.value, k.value, v.value, key_lengths, scale, causal)[0])
    output, output_tangent, _, _ = attention_dual(
        q.value, k.value, v.value, *tangents, key_lengths, scale, causal
    )
    return Dual(output, output_tangent)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot serve tensors of this device and precision; None if they can."""
    try:
        launch = _launch()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there are kernels for float32, float16 and bfloat16, not for {dtype}"
    if launch.INTERPRETED:
        # Seen with Triton 3.8: the interpreter's bfloat16 matrix products are garbage.
        return "Triton's interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device}; it needs an NVIDIA GPU, or TRITON_INTERPRET=1 before the start"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"it needs a GPU of compute capability 8.0, {name} has {capability[0]}.{capability[1]}"
    return None


def _launch() -> ModuleType:
    from tvmatch.attention import launch

    return launch


@torch.library.custom_op("tvmatch::attention_value", mutates_args=())
def attention_value(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """O and the logarithm of the softmax's sum, for the backward pass."""
    result = _launch().forward(Operands(q, k, v), key_lengths, scale, causal)
    return result.output, result.log_sum_exp


@attention_value.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q), empty_rows(q)


@torch.library.custom_op("tvmatch::attention_dual", mutates_args=())
def attention_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O, Ȯ and two row statistics for the backward pass, the last of no elements where Ṡ = 0."""
    operands = Operands(q, k, v, q_tangent, k_tangent, v_tangent)
    result = _launch().forward(operands, key_lengths, scale, causal)
    mean = q.new_empty(0, dtype=torch.float32) if result.mean is None else result.mean
    return result.output, result.output_tangent, result.log_sum_exp, mean


@attention_dual.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_mean = q_tangent is not None or k_tangent is not None
    mean = empty_rows(q) if has_mean else q.new_empty(0, dtype=torch.float32)
    return empty_like_heads(q), empty_like_heads(q), empty_rows(q), mean


@torch.library.custom_op("tvmatch::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor | None,
    tangent_gradient: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    output: Tensor,
    output_tangent: Tensor | None,
    log_sum_exp: Tensor,
    mean: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """The gradients of q, k, v and, if there is a cotangent of Ȯ, of the tangents that are not None."""
    gradients = _launch().backward(
        Operands(q, k, v, q_tangent, k_tangent, v_tangent),
        Forward(output, output_tangent, log_sum_exp, mean),
        gradient,
        tangent_gradient,
        key_lengths,
        scale,
        causal,
    )
    return [x for x in gradients if x is not None]


@attention_backward.register_fake
def _(gradient: Tensor | None, tangent_gradient: Tensor | None, *inputs: Any) -> list[Tensor]:
    operands = Operands(*inputs[:6])
    of_tangents = tangent_gradient is not None
    return [empty_like_heads(x) for x in (operands if of_tangents else operands[:3]) if x is not None]


def _save_value(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_lengths, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, key_lengths)


def _differentiate_value(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 6
    q, k, v, output, log_sum_exp, key_lengths = ctx.saved_tensors
    gradients = attention_backward(
        gradient,
        None,
        q,
        k,
        v,
        None,
        None,
        None,
        output,
        None,
        log_sum_exp,
        None,
        key_lengths,
        ctx.scale,
        ctx.causal,
    )
    return *gradients, None, None, None


def _save_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *operands, key_lengths, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output, key_lengths)


def _differentiate_dual(
    ctx: Any, gradient: Tensor | None, tangent_gradient: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if gradient is None and tangent_gradient is None:
        return (None,) * 9
    *operands, output, output_tangent, log_sum_exp, mean, key_lengths = ctx.saved_tensors
    found = iter(
        attention_backward(
            gradient,
            tangent_gradient,
            *operands,
            output,
            output_tangent,
            log_sum_exp,
            mean if mean.numel() else None,
            key_lengths,
            ctx.scale,
            ctx.causal,
        )
    )
    last = 6 if tangent_gradient is not None else 3
    gradients = [None if x is None or place >= last else next(found) for place, x in enumerate(operands)]
    return *gradients, None, None, None


attention_value.register_autograd(_differentiate_value, setup_context=_save_value)
attention_dual.register_autograd(_differentiate_dual, setup_context=_save_dual)
