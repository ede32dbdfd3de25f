"""Derivatives of gradients: right by every route that PyTorch offers, or refused; never zero without a word.

A rule with a backward of its own keeps numbers that autograd takes for constants when it differentiates the
backward pass. What is compared is d/dx ⟨c, ∂L/∂x⟩ for L = ⟨a, value⟩ + ⟨b, tangent⟩, so third derivatives of
the plain function; L is linear: then the cotangents hang on nothing, and nothing but the rule can be wrong.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import NETWORKS, random_inputs, randomize_
from torch import Tensor

from tvmatch import dual
from tvmatch.attention import attention
from tvmatch.dual import Dual
from tvmatch.seeds import generator

Function = Callable[[Tensor], Tensor]


def draw(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=generator(seed, "higher"), dtype=torch.float64)


SCALE, SCALE_TANGENT, SHIFT, SHIFT_TANGENT = draw(4, 5, seed=1)
KEYS, KEYS_TANGENT, VALUES = draw(3, 1, 1, 4, 5, seed=2)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layer(x: Tensor) -> Tensor:
    return rms(x - x.mean(-1, keepdim=True))


def plain_attention(x: Tensor, keys: Tensor) -> Tensor:
    return (x.reshape(1, 1, 2, 5) @ keys.mT * 5**-0.5).softmax(-1) @ VALUES


# A rule, and the plain function of x, scale, shift and keys with the tangents that its parts have.
RULES: dict[str, tuple[Callable[[Dual], Dual], Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]]
RULES = {
    "gelu": (dual.gelu, partial(torch.nn.functional.gelu, approximate="tanh"), (), ()),
    "rms_norm": (dual.rms_norm, rms, (), ()),
    "layer_norm": (dual.layer_norm, layer, (), ()),
    "rms_norm, scaled": (lambda x: dual.rms_norm(x, scale=Dual(SCALE)), lambda x: rms(x) * SCALE, (), ()),
    "rms_norm, modulated": (
        lambda x: dual.rms_norm(x, scale=Dual(SCALE, SCALE_TANGENT), shift=Dual(SHIFT, SHIFT_TANGENT)),
        lambda x, scale, shift: rms(x) * scale + shift,
        (SCALE, SHIFT),
        (SCALE_TANGENT, SHIFT_TANGENT),
    ),
    "layer_norm, shifted": (
        lambda x: dual.layer_norm(x, shift=Dual(SHIFT, SHIFT_TANGENT)),
        lambda x, shift: layer(x) + shift,
        (SHIFT,),
        (SHIFT_TANGENT,),
    ),
    "attention": (
        lambda x: attention(
            dual.linear_map(lambda y: y.reshape(1, 1, 2, 5), x), Dual(KEYS, KEYS_TANGENT), Dual(VALUES)
        ),
        plain_attention,
        (KEYS,),
        (KEYS_TANGENT,),
    ),
}


def losses(name: str) -> tuple[Function, Function]:
    """L by the rule, and by PyTorch's forward mode of the plain function."""
    rule, plain, others, tangents = RULES[name]
    a, b = draw(2, 2, 5, seed=3)
    (direction,) = draw(1, 2, 5, seed=4)

    def by_rule(x: Tensor) -> Tensor:
        value, tangent = rule(Dual(x, direction))
        assert tangent is not None
        return (a.view_as(value) * value).sum() + (b.view_as(tangent) * tangent).sum()

    def by_forward_mode(x: Tensor) -> Tensor:
        value, tangent = torch.func.jvp(plain, (x, *others), (direction, *tangents))
        return (a.view_as(value) * value).sum() + (b.view_as(tangent) * tangent).sum()

    return by_rule, by_forward_mode


(WEIGHTS,) = draw(1, 2, 5, seed=5)


def by_grad(loss: Function, x: Tensor) -> Tensor:
    """`torch.autograd.grad` twice: a gradient penalty."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad((WEIGHTS * first).sum(), x)[0]


def by_backward(loss: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (WEIGHTS * first).sum().backward()
    assert x.grad is not None
    return x.grad


def by_backward_twice(loss: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss(x).backward(create_graph=True)
    first, x.grad = x.grad, None
    assert first is not None
    (WEIGHTS * first).sum().backward()
    return x.grad


def by_func_grad(loss: Function, x: Tensor) -> Tensor:
    first = torch.func.grad(loss)
    return torch.func.grad(lambda y: (WEIGHTS * first(y)).sum())(x)


def by_grad_of_func(loss: Function, x: Tensor) -> Tensor:
    """A transform inside, autograd outside."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad((WEIGHTS * torch.func.grad(loss)(x)).sum(), x)[0]


def by_func_of_grad(loss: Function, x: Tensor) -> Tensor:
    """Autograd inside, a transform outside."""

    def penalty(y: Tensor) -> Tensor:
        return (WEIGHTS * torch.autograd.grad(loss(y), y, create_graph=True)[0]).sum()

    return torch.func.grad(penalty)(x)


def by_vjp(loss: Function, x: Tensor) -> Tensor:
    first = torch.func.grad(loss)
    return torch.func.vjp(first, x)[1](WEIGHTS)[0]


def by_jacrev(loss: Function, x: Tensor) -> Tensor:
    return (WEIGHTS[..., None, None] * torch.func.jacrev(torch.func.jacrev(loss))(x)).sum((0, 1))


def by_hessian(loss: Function, x: Tensor) -> Tensor:
    return (WEIGHTS[..., None, None] * torch.func.hessian(loss)(x)).sum((0, 1))


def by_old_hessian(loss: Function, x: Tensor) -> Tensor:
    return (WEIGHTS[..., None, None] * torch.autograd.functional.hessian(loss, x)).sum((0, 1))


def compiled(loss: Function, x: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(partial(by_func_grad, loss), backend="aot_eager", fullgraph=True)(x)


def grad_of_compiled(loss: Function, x: Tensor) -> Tensor:
    """Which PyTorch refuses itself."""
    torch.compiler.reset()
    return by_grad(torch.compile(loss, backend="aot_eager", fullgraph=True), x)


ROUTES = [
    by_grad,
    by_backward,
    by_backward_twice,
    by_func_grad,
    by_grad_of_func,
    by_func_of_grad,
    by_vjp,
    by_jacrev,
    by_hessian,
    by_old_hessian,
    compiled,
]
KEEPS_TOO_LITTLE = (by_grad, by_backward, by_backward_twice, by_old_hessian)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", RULES)
def test_derivative_of_a_gradient(name: str, route: Callable[[Function, Tensor], Tensor]) -> None:
    by_rule, by_forward_mode = losses(name)
    (x,) = draw(1, 2, 5)
    if name == "gelu" and route in KEEPS_TOO_LITTLE:
        with pytest.raises(RuntimeError, match=r"tvmatch\.dual\.gelu: the gradient of a gradient"):
            route(by_rule, x)
        return
    expected = by_func_grad(by_forward_mode, x)
    # float64 sums of a few dozen terms; the norms' third derivative reaches some hundred near small rows.
    torch.testing.assert_close(route(by_rule, x), expected, rtol=1e-10, atol=1e-11)


# Of attention nothing that is kept hangs on x by itself: its gradient is a constant then, or x is unused.
@pytest.mark.parametrize("name", RULES)
def test_a_compiled_function_refuses(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"double backward|not have been used|does not require grad"):
        grad_of_compiled(losses(name)[0], draw(1, 2, 5)[0])


@pytest.mark.parametrize("route", [by_grad, by_backward, by_backward_twice, by_func_grad, by_old_hessian])
@pytest.mark.parametrize("has_tangent", [True, False])
def test_the_attention_operator_refuses(
    has_tangent: bool, route: Callable[[Function, Tensor], Tensor]
) -> None:
    keys, values, direction = (y.float().reshape(1, 1, 2, 5) for y in draw(3, 2, 5))

    def loss(x: Tensor) -> Tensor:
        x = x.reshape(1, 1, 2, 5)
        query = Dual(x, direction if has_tangent else None)
        result = attention(query, keys, values, backend="triton")
        return result.value.sum() if result.tangent is None else result.tangent.sum()

    with pytest.raises(
        RuntimeError, match=r"attention_backward.* no autograd formula|a transform of torch\.func"
    ):
        route(loss, draw(1, 2, 5)[0].float())


@pytest.mark.parametrize("name", [name for name in RULES if "norm" in name])
def test_second_derivatives_of_the_backward_of_a_norm(name: str) -> None:
    """By all of its inputs and cotangents, against finite differences."""
    rule = RULES[name][0]
    assert torch.autograd.gradgradcheck(
        lambda x, dx: rule(Dual(x, dx)), tuple(y.requires_grad_() for y in draw(2, 2, 5))
    )


def test_gelu_at_seven_tenths() -> None:
    """g‴(0.7) in closed form: the number that was 0.0."""
    x = torch.tensor(0.7, dtype=torch.float64)

    def slope(u: Tensor) -> Tensor:
        tangent = dual.gelu(Dual(u, torch.ones_like(u))).tangent
        assert tangent is not None
        return tangent

    third = torch.func.grad(torch.func.grad(slope))(x)
    assert float(third) == pytest.approx(-0.7663, abs=1e-4)


def test_a_derivative_by_the_cotangent_alone_is_no_third_one() -> None:
    """The backward pass is linear in the cotangents, and that much of it can be differentiated."""
    x, dx, cotangent = (y.requires_grad_() for y in draw(3, 2, 5))
    value, tangent = dual.gelu(Dual(x, dx))
    (gradient,) = torch.autograd.grad(tangent, x, cotangent, create_graph=True)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(gradient, cotangent, WEIGHTS)
    (_, along) = torch.func.jvp(lambda y: dual.gelu(Dual(y, dx)).tangent, (x,), (WEIGHTS,))
    torch.testing.assert_close(found, along, rtol=1e-12, atol=1e-13)
    assert value.requires_grad


def penalty(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """⟨c, ∂/∂x of the squares of F and ∂_s F⟩ as a function of the first weight, and this weight."""
    network = randomize_(NETWORKS[name]()).double()
    inputs = random_inputs(network.shape, network.class_count, batch=2)
    first, weight = next((key, y) for key, y in network.named_parameters() if y.ndim == 2)
    others = {key: y.detach() for key, y in network.named_parameters() if key != first}

    def squares(x: Tensor, y: Tensor) -> Tensor:
        s = Dual(inputs.s, torch.ones_like(inputs.s))
        arguments = (x, inputs.t, s, inputs.labels, inputs.guidance_weight)
        output = torch.func.functional_call(network, {first: y, **others}, arguments)
        return output.value.square().sum() + output.tangent.square().sum()  # type: ignore[no-any-return]

    def gradient_penalty(y: Tensor, transform: bool = True) -> Tensor:
        if transform:
            return torch.func.grad(squares)(inputs.x, y).square().sum()
        x = inputs.x.clone().requires_grad_()
        return torch.autograd.grad(squares(x, y), x, create_graph=True)[0].square().sum()

    return gradient_penalty, weight.detach()


@pytest.mark.parametrize("name", ["DiT", "MLP"])
def test_gradient_penalty_on_a_network(name: str) -> None:
    """The gradient of a gradient penalty by a weight, against central differences along it."""
    function, weight = penalty(name)
    found = torch.func.grad(function)(weight)
    direction = found / found.norm()
    step = 1e-4 * float(weight.norm())
    near, far = (
        (function(weight + h * direction) - function(weight - h * direction)) for h in (step, 2 * step)
    )
    difference = (8 * near - far) / (12 * step)
    # Fourth-order differences of a function of some 1e2 in float64.
    assert float((found * direction).sum()) == pytest.approx(float(difference), rel=1e-6)

    weight.requires_grad_()
    with pytest.raises(RuntimeError, match=r"dual\.gelu"):
        torch.autograd.grad(function(weight, transform=False), weight)
