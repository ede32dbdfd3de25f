"""The kernels as custom PyTorch operators, with fake implementations and autograd formulas.

`torch.compile` keeps such an operator in its graph, and autograd differentiates value and tangent in one
backward pass. A custom operator has no forward-mode rule: it would silently drop the tangent of a plain
tensor. Call `tvmatch.attention.attention`, never these operators directly.

The kernels are imported when the first operator runs, so this module can be imported without Triton.
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
    """Attention by the fused kernels. The arguments are those of `attention`, already checked."""
    tangents = q.tangent, k.tangent, v.tangent
    if all(tangent is None for tangent in tangents):
        return Dual(attention_value(q.value, k.value, v.value, key_lengths, scale, causal)[0])
    output, output_tangent, _, _ = attention_dual(
        q.value, k.value, v.value, *tangents, key_lengths, scale, causal
    )
    return Dual(output, output_tangent)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels do not support this device and dtype; None if they do."""
    try:
        launch = _launch()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there are kernels for float32, float16 and bfloat16, not for {dtype}"
    if launch.INTERPRETED:
        # Triton 3.8's interpreter computes wrong bfloat16 matrix products.
        return "Triton's interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device}; it needs an NVIDIA GPU or the variable TRITON_INTERPRET=1"
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
    """O, and the log-sum-exp of the rows for the backward pass."""
    result = _launch().forward(Operands(q, k, v), key_lengths, scale, causal)
    return result.output, result.log_sum_exp


@attention_value.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
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
    """O, Ȯ, and log-sum-exp and μ of the rows for the backward pass; μ is empty if Ṡ = 0."""
    operands = Operands(q, k, v, q_tangent, k_tangent, v_tangent)
    result = _launch().forward(operands, key_lengths, scale, causal)
    mean = q.new_empty(0, dtype=torch.float32) if result.mean is None else result.mean
    return result.output, result.output_tangent, result.log_sum_exp, mean


@attention_dual.register_fake
def _(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_mean = Operands(q, *inputs[:5]).has_scores_tangent
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
    """Gradients of q, k, v and, if `tangent_gradient` is given, of the tangents that are not None."""
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    """Save the same twelve tensors for both operators; without tangents, some are None."""
    *operands, key_lengths, ctx.scale, ctx.causal = inputs
    if len(operands) == 3:
        operands, output = [*operands, None, None, None], (output[0], None, output[1], None)
    ctx.mark_non_differentiable(*(x for x in output[2:] if x is not None))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output, key_lengths)


def _differentiate(
    ctx: Any, gradient: Tensor | None, tangent_gradient: Tensor | None, *of_rows: None
) -> tuple[Tensor | None, ...]:
    """Backward of both operators. For `attention_value`, the second output has no gradient."""
    count = 6 if of_rows else 3
    if gradient is None and tangent_gradient is None:
        return (None,) * (count + 3)
    *operands, output, output_tangent, log_sum_exp, mean, key_lengths = ctx.saved_tensors
    found = iter(
        attention_backward(
            gradient,
            tangent_gradient,
            *operands,
            output,
            output_tangent,
            log_sum_exp,
            None if mean is None or not mean.numel() else mean,
            key_lengths,
            ctx.scale,
            ctx.causal,
        )
    )
    last = 6 if tangent_gradient is not None else 3
    gradients = [
        None if x is None or place >= last else next(found) for place, x in enumerate(operands[:count])
    ]
    return *gradients, None, None, None


attention_value.register_autograd(_differentiate, setup_context=_save)
attention_dual.register_autograd(_differentiate, setup_context=_save)
