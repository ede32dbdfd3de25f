"""Dual numbers: a value and its derivative along one direction, as explicit data.

Every layer of the project is written once as a map Dual → Dual. With tangent None (exactly zero) a rule
computes only the value. With a tangent it also computes the Jacobian-vector product, in ordinary tensor
operations that autograd, `torch.compile`, hooks and sharding support.

For a map y = f(x) the rule is ẏ = (∂f/∂x) ẋ. In the objective the direction is the terminal time s, so a
tangent is d value / d s (TVM, arXiv 2511.19797, section 4).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from tvmatch.dual import joint_backward


class Dual(NamedTuple):
    """A tensor and its derivative along one direction.

    Attributes:
        value: a floating-point tensor.
        tangent: of the value's shape and dtype, or None for exactly zero.
    """

    value: Tensor
    tangent: Tensor | None = None

    # The operators of tuples would silently concatenate, repeat and compare.
    def __add__(self, other: object) -> NoReturn:
        raise TypeError("+ would join two Duals as tuples: use tvmatch.dual.add")

    def __radd__(self, other: object) -> NoReturn:  # also of `sum`
        raise TypeError("+ has no meaning for a Dual: use tvmatch.dual.add")

    def __mul__(self, other: object) -> NoReturn:
        raise TypeError("* would repeat a Dual as a tuple: use tvmatch.dual.multiply")

    def __rmul__(self, other: object) -> NoReturn:
        raise TypeError("* would repeat a Dual as a tuple: use tvmatch.dual.multiply")

    def __lt__(self, other: object) -> NoReturn:
        raise TypeError("< would compare Duals as tuples: compare their values")

    def __le__(self, other: object) -> NoReturn:
        raise TypeError("<= would compare Duals as tuples: compare their values")

    def __gt__(self, other: object) -> NoReturn:
        raise TypeError("> would compare Duals as tuples: compare their values")

    def __ge__(self, other: object) -> NoReturn:
        raise TypeError(">= would compare Duals as tuples: compare their values")


def as_dual(x: Tensor | Dual) -> Dual:
    """`x` itself if it is a Dual, otherwise Dual(x) with tangent None."""
    return x if isinstance(x, Dual) else Dual(x)


def linear_map(function: Callable[[Tensor], Tensor], x: Dual) -> Dual:
    """ẏ = f(ẋ) for a linear `function`, such as a reshape, a slice or a product with a constant."""
    return Dual(function(x.value), None if x.tangent is None else function(x.tangent))


def pointwise(
    function: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor], x: Dual
) -> Dual:
    """ẏ = f′(x) ∘ ẋ for an elementwise `function`, where `product(ẋ, x)` computes the right side."""
    return Dual(function(x.value), None if x.tangent is None else product(x.tangent, x.value))


def unbind(x: Dual, dimension: int = 0) -> tuple[Dual, ...]:
    """Slices along a dimension, as views.

    The backward of `Tensor.unbind` stacks the gradients once; that of indexing allocates zeros per slice.
    """
    return _parts(lambda y: _unbind(y, dimension), x)


def _unbind(x: Tensor, dimension: int) -> tuple[Tensor, ...]:
    """`Tensor.unbind`; PyTorch 2.11 cannot compile it in parts that the backward pass recomputes."""
    if torch.compiler.is_compiling():
        return tuple(part.squeeze(dimension) for part in x.split(1, dimension))
    return x.unbind(dimension)


def split(x: Dual, sizes: Sequence[int], dimension: int = 0) -> tuple[Dual, ...]:
    """Parts of the given sizes along a dimension, as views; see `unbind`."""
    return _parts(lambda y: y.split(sizes, dimension), x)


def _parts(function: Callable[[Tensor], tuple[Tensor, ...]], x: Dual) -> tuple[Dual, ...]:
    """Linear maps of x to several tensors."""
    values = function(x.value)
    tangents = [None] * len(values) if x.tangent is None else function(x.tangent)
    return tuple(Dual(value, tangent) for value, tangent in zip(values, tangents, strict=True))


def add(x: Dual, y: Dual) -> Dual:
    """x + y, with tangent ẋ + ẏ; shapes broadcast."""
    value = x.value + y.value
    if x.tangent is None or y.tangent is None:
        tangent = y.tangent if x.tangent is None else x.tangent
        return Dual(value, None if tangent is None else tangent.expand_as(value).to(value.dtype))
    return Dual(value, x.tangent + y.tangent)


def subtract(x: Dual, y: Dual) -> Dual:
    """x − y, with tangent ẋ − ẏ; shapes broadcast."""
    return add(x, linear_map(torch.neg, y))


def multiply(x: Dual, y: Dual) -> Dual:
    """x ∘ y, with tangent ẋ ∘ y + x ∘ ẏ; shapes broadcast."""
    value = x.value * y.value
    if x.tangent is None:
        return Dual(value, None if y.tangent is None else x.value * y.tangent)
    if y.tangent is None:
        return Dual(value, x.tangent * y.value)
    return Dual(value, torch.addcmul(x.tangent * y.value, x.value, y.tangent))


def add_product(x: Dual, y: Dual, z: Dual) -> Dual:
    """x + y ∘ z, with tangent ẋ + ẏ ∘ z + y ∘ ż; y and z broadcast to the shape of x."""
    value, tangent = torch.addcmul(x.value, y.value, z.value), x.tangent
    for factor, other in ((y.tangent, z.value), (y.value, z.tangent)):
        if factor is not None and other is not None:
            tangent = factor * other if tangent is None else torch.addcmul(tangent, factor, other)
    return Dual(value, None if tangent is None else tangent.expand_as(value).to(value.dtype))


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x ∘ (1 + scale) + shift, the adaptive part of adaLN (DiT, arXiv 2212.09748)."""
    return add(multiply(x, Dual(1 + scale.value, scale.tangent)), shift)


def linear(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Dual:
    """x Wᵀ + b, with tangent ẋ Wᵀ; value and tangent share one matrix product.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
    """
    if x.tangent is None:
        return Dual(F.linear(x.value, weight, bias))
    if x.value.device.type == "cpu" and not torch.compiler.is_compiling():
        # On a CPU one product with twice the rows is no faster than two, and in eager mode it needs copies.
        return Dual(F.linear(x.value, weight, bias), F.linear(x.tangent, weight))
    pair = F.linear(torch.stack([x.value, x.tangent]), weight)
    if bias is not None:
        # One sum for both: a view of the product would keep all of it in memory. Under autocast the sum is in
        # half precision, as in `F.linear`.
        biases = torch.stack([bias, torch.zeros_like(bias)]).to(pair.dtype)
        pair = pair + biases.reshape(2, *[1] * (pair.ndim - 2), -1)
    return Dual(*_unbind(pair, 0))


def silu(x: Dual) -> Dual:
    """x σ(x), σ the logistic function; derivative σ (1 + x (1 − σ))."""
    return pointwise(F.silu, _silu_product, x)


def _silu_product(tangent: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return tangent * sigmoid * (1 + x * (1 - sigmoid))


def gelu(x: Dual) -> Dual:
    """x σ(z) with z = 2 √(2/π) (x + 0.044715 x³): the tanh form of GELU."""
    if x.tangent is None:
        return Dual(F.gelu(x.value, approximate="tanh"))
    return Dual(*joint_backward.gelu(x.value, x.tangent))


def rms_norm(x: Dual, epsilon: float = 1e-6, *, scale: Dual | None = None, shift: Dual | None = None) -> Dual:
    """y ∘ scale + shift, where y = r x, r = (mean x² + ε)^(−1/2) over the last dimension.

    Its tangent is ẏ ∘ scale + y ∘ scale′ + shift′ with ẏ = r (ẋ − y · mean(y ẋ)). Near x = 0 the slope is
    ε^(−1/2), so half-precision inputs are computed, and the result is returned, in float32.

    Args:
        x: (..., C).
        epsilon: ε.
        scale: broadcasts to x's shape; None is 1.
        shift: broadcasts to x's shape; None is 0.
    """
    parts = (*x, *(scale or (None, None)), *(shift or (None, None)))
    if all(tangent is None for tangent in parts[1::2]):
        y, _ = joint_backward.normalize(x.value, epsilon)
        y = y if scale is None else y * scale.value
        return Dual(y if shift is None else y + shift.value)
    return Dual(*joint_backward.rms_norm(parts, epsilon))


def layer_norm(
    x: Dual, epsilon: float = 1e-6, *, scale: Dual | None = None, shift: Dual | None = None
) -> Dual:
    """LayerNorm over the last dimension: `rms_norm` of x − mean(x)."""
    return rms_norm(linear_map(_centre, x), epsilon, scale=scale, shift=shift)


def _centre(x: Tensor) -> Tensor:
    x = joint_backward.at_least_float32(x)
    return x - x.mean(-1, keepdim=True)
