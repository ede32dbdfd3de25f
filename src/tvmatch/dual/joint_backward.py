"""The rules of `dual.gelu` and `dual.rms_norm`: as formulas, and as functions with a backward of their own.

A formula is what PyTorch can differentiate by itself, as often as it is asked to. Left to it in eager
execution, it keeps several times as much for the backward pass and takes longer: there an `autograd.Function`
computes the same in place, keeps little, and computes the gradients of value and tangent together.

The formulas serve wherever those functions gain nothing or would be wrong:

- While the code is compiled. The compiler decides itself what is kept, from the graph of both passes. And it
  must not see such a function: PyTorch 2.11 gives zero gradients where `forward` returns a differentiable
  tensor that it has changed in place (`return (x * y).mul_(2)`), without a word.
- Inside transforms of `torch.func`, which may ask for derivatives of any order, or for forward mode.
- When autograd asks for a graph of `rms_norm`'s backward pass (`create_graph=True`). `gelu` has no inputs
  left by then: it raises when that graph is differentiated.
"""

import math
from typing import Any

import torch
from torch import Tensor

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def _left_to_pytorch() -> bool:
    """Whether PyTorch is to see the formula itself."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def gelu(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """x σ(z) with z = 2 √(2/π) (x + 0.044715 x³), and its tangent."""
    if _left_to_pytorch():
        return gelu_formula(x, tangent)
    value, tangent, *_ = _GELU.apply(x, tangent)  # type: ignore[no-untyped-call]
    return value, tangent


def gelu_formula(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """As `gelu`, with tangent [σ + x σ (1 − σ) z′] ẋ."""
    square = x * x
    sigmoid = torch.sigmoid(x * (_LINEAR + _CUBIC * square))
    slope = _LINEAR + 3 * _CUBIC * square
    return x * sigmoid, (sigmoid + x * slope * (sigmoid * (1 - sigmoid))) * tangent


class _GELU(torch.autograd.Function):
    """`gelu` with a backward in two saved tensors, g′ and g″ ẋ.

    The same mathematics left to autograd, through the double backward of PyTorch's GELU, made a
    training step on one CPU core 14 % longer (108 ms against 95 ms). With q = σ (1 − σ): g′ = σ + x q z′,
    g″ = q [2 z′ + x z″ + x (1 − 2 σ) z′²].
    """

    @staticmethod
    def forward(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        square = x * x
        sigmoid = (_CUBIC * square).add_(_LINEAR).mul_(x).sigmoid_()
        value = x * sigmoid
        slope = (3 * _CUBIC * square).add_(_LINEAR)  # z'; x z'' is 6 cubic x²
        spread = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1)
        first = torch.addcmul(sigmoid, x * slope, spread)
        # g″ / q = z′ [2 + (x − 2 x σ) z′] + x z″
        second = torch.sub(x, value, alpha=2).mul_(slope).add_(2).mul_(slope).add_(square, alpha=6 * _CUBIC)
        second = second.mul_(spread).mul_(tangent)
        return value, first * tangent, first, second

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        # As outputs that can be differentiated, so that a derivative of the backward pass comes back here and
        # is refused. `once_differentiable` refuses it in `.backward()` alone: `torch.autograd.grad` and
        # `torch.func` then get zeros without a word.
        ctx.save_for_backward(*output[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if any(gradient is not None for gradient in gradients[2:]):
            raise RuntimeError(
                "tvmatch.dual.gelu: the gradient of a gradient (create_graph=True) through a tangent would "
                "need what is not kept; take it with torch.func.grad, vjp or jacrev, or in a function that "
                "torch.compile compiles"
            )
        cotangents = _filled(*gradients[:2])
        if cotangents is None:
            return None, None
        first, second_tangent = ctx.saved_tensors
        value, tangent = cotangents
        return torch.addcmul(first * value, second_tangent, tangent), first * tangent


def _filled(value: Tensor | None, tangent: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Cotangents with zeros for an output that was not used; None if neither was.

    Left to do it, autograd makes zeros for the outputs that are only saved as well.
    """
    if value is None:
        return None if tangent is None else (torch.zeros_like(tangent), tangent)
    return value, torch.zeros_like(value) if tangent is None else tangent


def rms_norm(parts: tuple[Tensor | None, ...], epsilon: float) -> tuple[Tensor, Tensor]:
    """y ∘ scale + shift with y = r x, and its tangent; see `dual.rms_norm`.

    Args:
        parts: x, ẋ, scale, scale′, shift, shift′, where all but x may be None, but not all three tangents.
        epsilon: ε.
    """
    if _left_to_pytorch():
        return rms_norm_formula(*parts, epsilon=epsilon)  # type: ignore[arg-type]
    value, tangent, *_ = _RMSNorm.apply(*parts, epsilon)  # type: ignore[no-untyped-call]
    return value, tangent


def rms_norm_formula(
    x: Tensor,
    x_tangent: Tensor | None = None,
    scale: Tensor | None = None,
    scale_tangent: Tensor | None = None,
    shift: Tensor | None = None,
    shift_tangent: Tensor | None = None,
    *,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, with tangent ẏ ∘ scale + y ∘ scale′ + shift′, ẏ = r (ẋ − y · mean(y ẋ))."""
    y, inverse_rms = normalize(x, epsilon)
    tangent = None
    if x_tangent is not None:
        x_tangent = at_least_float32(x_tangent)
        tangent = inverse_rms * (x_tangent - y * (y * x_tangent).mean(-1, keepdim=True))
        tangent = tangent if scale is None else tangent * scale
    if scale_tangent is not None:
        product = y * scale_tangent
        tangent = product if tangent is None else tangent + product
    if shift_tangent is not None:
        tangent = shift_tangent.expand_as(y).to(y.dtype) if tangent is None else tangent + shift_tangent
    assert tangent is not None
    y = y if scale is None else y * scale
    return y if shift is None else y + shift, tangent


def normalize(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y = r x and r = (mean x² + ε)^(−1/2) over the last dimension, in float32 at least."""
    x = at_least_float32(x)
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * inverse_rms, inverse_rms


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """Value and tangent of `rms_norm`, with a backward that keeps its inputs and two numbers a row.

    Left to autograd, the same mathematics keeps y, ẏ and what leads to them as well, all in float32.
    With a = mean(y ẋ), cotangents G of y and H of ẏ, and b = mean(y H):

        ẋ receives h = r (H − b y)        x receives r [G − b ẏ − a h − y mean(y G + H ẏ)]
    """

    @staticmethod
    def forward(
        x: Tensor,
        x_tangent: Tensor | None,
        scale: Tensor | None,
        scale_tangent: Tensor | None,
        shift: Tensor | None,
        shift_tangent: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        y, inverse_rms = normalize(x, epsilon)
        along, tangent = None, None
        if x_tangent is not None:
            x_tangent = at_least_float32(x_tangent)
            along = (y * x_tangent).mean(-1, keepdim=True)
            tangent = torch.addcmul(x_tangent, y, along, value=-1).mul_(inverse_rms)
            tangent = tangent if scale is None else tangent.mul_(scale)
        if scale_tangent is not None:
            tangent = y * scale_tangent if tangent is None else tangent.addcmul_(y, scale_tangent)
        if shift_tangent is not None:
            tangent = shift_tangent.expand_as(y).clone() if tangent is None else tangent.add_(shift_tangent)
        assert tangent is not None
        y = y if scale is None else y.mul_(scale)
        return y if shift is None else y.add_(shift), tangent, inverse_rms, along

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, x_tangent, *parts, ctx.epsilon = inputs
        _, _, *rows = output
        ctx.mark_non_differentiable(*(row for row in rows if row is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, x_tangent, *parts[:2], *rows)
        ctx.shapes = [None if part is None else part.shape for part in parts]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = _filled(*gradients[:2])
        if cotangents is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, *cotangents), None
        value, tangent = cotangents
        x, x_tangent, scale, scale_tangent, inverse_rms, along = ctx.saved_tensors
        y = at_least_float32(x) * inverse_rms
        on_y = value.clone() if scale is None else value * scale
        on_y = on_y if scale_tangent is None else on_y.addcmul_(tangent, scale_tangent)
        if x_tangent is None:
            row = (y * on_y).mean(-1, keepdim=True)
            on_x_tangent, on_scale = None, value * y
        else:
            y_tangent = torch.addcmul(at_least_float32(x_tangent), y, along, value=-1).mul_(inverse_rms)
            on_y_tangent = tangent.clone() if scale is None else tangent * scale
            across = (y * on_y_tangent).mean(-1, keepdim=True)
            row = (y * on_y).addcmul_(on_y_tangent, y_tangent).mean(-1, keepdim=True)
            on_x_tangent = on_y_tangent.addcmul_(y, across, value=-1).mul_(inverse_rms)
            on_y = on_y.addcmul_(y_tangent, across, value=-1).addcmul_(on_x_tangent, along, value=-1)
            on_x_tangent = on_x_tangent.to(x_tangent.dtype)
            on_scale = y_tangent.mul_(tangent).addcmul_(value, y)
        on_x = on_y.addcmul_(y, row, value=-1).mul_(inverse_rms).to(x.dtype)

        on_parts = (on_scale, y.mul_(tangent), value, tangent)
        reduced = (
            None if shape is None else part.sum_to_size(shape)
            for part, shape in zip(on_parts, ctx.shapes, strict=True)
        )
        return on_x, on_x_tangent, *reduced, None


def _differentiable_gradients(ctx: Any, *cotangents: Tensor) -> list[Tensor | None]:
    """The gradients of `_RMSNorm`'s tensors as functions of everything that they depend on."""
    shifts = [None if shape is None else cotangents[0].new_zeros(shape) for shape in ctx.shapes[2:]]
    parts = [*ctx.saved_tensors[:4], *shifts]

    def formula(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        x, *others = (None if part is None else next(rest) for part in parts)
        assert x is not None
        value, tangent = rms_norm_formula(x, *others, epsilon=ctx.epsilon)
        return value.to(cotangents[0].dtype), tangent.to(cotangents[1].dtype)

    pull_back = torch.func.vjp(formula, *(part for part in parts if part is not None))[1]
    gradients = iter(pull_back(cotangents))
    return [None if part is None else next(gradients) for part in parts]
