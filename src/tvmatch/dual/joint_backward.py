"""`dual.gelu` and `dual.rms_norm` with a tangent: as formulas, and as autograd functions.

Differentiating a formula by autograd keeps several times as much memory and takes longer than necessary. In
eager execution an `autograd.Function` therefore computes the same in place, saves little, and computes the
gradients of value and tangent together.

The formula is used where that gains nothing or would be wrong:

- Under `torch.compile`, which decides itself what to save. PyTorch 2.11 also gives silent zero gradients for
  functions whose `forward` returns a differentiable tensor that it changed in place.
- Inside transforms of `torch.func`, which may need higher derivatives or forward mode.
- In `rms_norm`'s backward pass with `create_graph=True`. `gelu` has not saved its inputs for that: it raises
  when this graph is differentiated.
"""

import math
from typing import Any

import torch
from torch import Tensor

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def _use_formula() -> bool:
    """Whether PyTorch should differentiate the formula itself."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def gelu(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """x σ(z) with z = 2 √(2/π) (x + 0.044715 x³), and its tangent."""
    if _use_formula():
        return gelu_formula(x, tangent)
    value, tangent, *_ = _GELU.apply(x, tangent)  # type: ignore[no-untyped-call]
    return value, tangent


def gelu_formula(x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu` by formula; the tangent is [σ + x σ (1 − σ) z′] ẋ."""
    square = x * x
    sigmoid = torch.sigmoid(x * (_LINEAR + _CUBIC * square))
    slope = _LINEAR + 3 * _CUBIC * square
    return x * sigmoid, (sigmoid + x * slope * (sigmoid * (1 - sigmoid))) * tangent


class _GELU(torch.autograd.Function):
    """`gelu`; the backward pass needs two saved tensors, g′ and g″ ẋ.

    With q = σ (1 − σ): g′ = σ + x q z′, g″ = q [2 z′ + x z″ + x (1 − 2 σ) z′²].
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
        # Saved as differentiable outputs, so that differentiating the backward pass calls `backward` with
        # their gradients, where it is refused. `once_differentiable` would refuse it only in `.backward()`,
        # and `torch.autograd.grad` and `torch.func` would silently return zeros.
        ctx.save_for_backward(*output[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if any(gradient is not None for gradient in gradients[2:]):
            raise RuntimeError(
                "tvmatch.dual.gelu: the gradient of a gradient (create_graph=True) through a tangent needs "
                "tensors that are not saved; use torch.func.grad, vjp or jacrev, or torch.compile"
            )
        cotangents = _filled(*gradients[:2])
        if cotangents is None:
            return None, None
        first, second_tangent = ctx.saved_tensors
        value, tangent = cotangents
        return torch.addcmul(first * value, second_tangent, tangent), first * tangent


def _filled(value: Tensor | None, tangent: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both cotangents, with zeros in place of one that is None; None if both are None.

    Autograd's own zeros (`materialize_grads`) would also be allocated for the saved outputs.
    """
    if value is None:
        return None if tangent is None else (torch.zeros_like(tangent), tangent)
    return value, torch.zeros_like(value) if tangent is None else tangent


def rms_norm(parts: tuple[Tensor | None, ...], epsilon: float) -> tuple[Tensor, Tensor]:
    """y ∘ scale + shift with y = r x, and its tangent; see `dual.rms_norm`.

    Args:
        parts: x, ẋ, scale, scale′, shift, shift′. All but x may be None, but at least one tangent is given.
        epsilon: ε.
    """
    if _use_formula():
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
    """`rms_norm` by formula; the tangent is ẏ ∘ scale + y ∘ scale′ + shift′, ẏ = r (ẋ − y · mean(y ẋ))."""
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
    """y = r x and r = (mean x² + ε)^(−1/2) over the last dimension, at least in float32."""
    x = at_least_float32(x)
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x * inverse_rms, inverse_rms


def at_least_float32(x: Tensor) -> Tensor:
    """x, converted to float32 if it is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """`rms_norm`; saves its inputs and two numbers per row for the backward pass.

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
    """The gradients of `_RMSNorm` as differentiable functions, for `create_graph=True`."""
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
