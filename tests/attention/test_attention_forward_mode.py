"""Attention on plain tensors that hide a tangent of PyTorch's forward mode, eager and compiled.

The fused kernels are registered operators, whose tangent PyTorch takes for zero without a word. They run on a
GPU if there is one, else in Triton's interpreter.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forward_mode_tools import SEEN, SEES_TANGENTS
from functorch.compile import make_boxed_func
from helpers import jvp
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from tvmatch.attention import attention, launch
from tvmatch.dual import Dual
from tvmatch.models import JVPNetwork
from tvmatch.seeds import generator

# Two computations in float32 of the same few sums of numbers of order 1; each derivative adds some roundings.
SINGLE = {"rtol": 1e-4, "atol": 2e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "auto", "triton"]
FUSED = {"triton", "auto"} if DEVICE == "cuda" else {"triton"}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels' launches: of a forward or a backward pass, with how many tangents."""
    seen: list[str] = []

    def note(name: str) -> None:
        run = getattr(launch, name)

        def spy(operands: Any, *rest: Any, **options: Any) -> Any:
            seen.append(f"{name} {sum(x is not None for x in operands[3:])}")
            return run(operands, *rest, **options)

        monkeypatch.setattr(launch, name, spy)

    note("forward")
    note("backward")
    torch._dynamo.reset()
    return seen


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)


def draw(seed: int = 0) -> list[Tensor]:
    """q, k, v and their tangents: N = 3, M = 4, D = 4."""
    draws = generator(seed, "forward mode")
    shapes = [(2, 2, length, 4) for length in (3, 4, 4)]
    return [torch.randn(shape, generator=draws).to(DEVICE) for shape in shapes * 2]


def through_jvp(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return jvp(function, tensors[:3], tensors[3:])


def through_level(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(tensors[:3], tensors[3:], strict=True)]
        value, tangent = forward_ad.unpack_dual(function(*duals))
    assert tangent is not None, "the tangent was dropped"
    return value, tangent


TRANSFORMS = [pytest.param(through_jvp, id="jvp"), pytest.param(through_level, id="dual_level")]
Transform = Callable[..., tuple[Tensor, Tensor]]


def assert_same(actual: Any, expected: Any) -> None:
    """Of any nesting; expected values are computed in float64."""
    torch.testing.assert_close(actual, expected, check_dtype=False, **SINGLE)


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


# One level, eager.


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_tangent(backend: Any, transform: Transform, calls: list[str]) -> None:
    tensors = draw()
    actual = transform(lambda *x: attention(*x, backend=backend), *tensors)
    assert_same(actual, through_jvp(plain_attention, *double(tensors)))
    assert calls == (["forward 3"] if backend in FUSED else [])  # both in one pass


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_mode_through_the_transform(backend: Any, transform: Transform, calls: list[str]) -> None:
    """One joint backward pass gives the gradients of all six."""

    def gradients(
        through: Transform, function: Callable[..., Tensor], tensors: list[Tensor]
    ) -> tuple[Tensor, ...]:
        value, tangent = through(function, *tensors)
        return torch.autograd.grad((value * tangent).sin().sum(), tensors)

    tensors = [x.requires_grad_() for x in draw()]
    actual = gradients(transform, lambda *x: attention(*x, backend=backend), tensors)
    assert_same(actual, gradients(through_jvp, plain_attention, double(tensors)))
    assert calls == (["forward 3", "backward 3"] if backend in FUSED else [])


@pytest.mark.parametrize("moving", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_argument_moves_and_the_others_need_gradients(
    backend: Any, moving: int, calls: list[str]
) -> None:
    """Work for the tangents of the two others is skipped."""

    def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        def of_one(x: Tensor) -> Tensor:
            return function(*tensors[:moving], x, *tensors[moving + 1 : 3])

        value, tangent = jvp(of_one, (tensors[moving],), (tensors[3 + moving],))
        used = [*tensors[:3], tensors[3 + moving]]
        return value, tangent, *torch.autograd.grad((value * tangent).sin().sum(), used)

    tensors = [x.requires_grad_() for x in draw()]
    actual = gradients(lambda *x: attention(*x, backend=backend), tensors)
    assert_same(actual, gradients(plain_attention, double(tensors)))
    assert calls == (["forward 1", "backward 1"] if backend in FUSED else [])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_duals_without_tangents_hide_one_too(backend: Any, transform: Transform) -> None:
    def function(*x: Tensor) -> Tensor:
        result = attention(*map(Dual, x), backend=backend)
        assert result.tangent is None
        return result.value

    tensors = draw()
    assert_same(transform(function, *tensors), through_jvp(plain_attention, *double(tensors)))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_do_not_move_inside_a_transform(backend: Any, transform: Transform) -> None:
    """Neither plain ones nor Duals are disturbed by an open level."""
    tensors, others = draw(), draw(seed=1)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        constant = attention(*others[:3], backend=backend)
        duals = attention(*map(Dual, others[:3], others[3:]), backend=backend)
        assert duals.tangent is not None
        return q * (constant + duals.value) * duals.tangent

    value, tangent = through_jvp(plain_attention, *double(others))
    actual = transform(function, *tensors)
    assert_same(actual, (2 * tensors[0] * value * tangent, 2 * tensors[3] * value * tangent))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_masks(transform: Transform) -> None:
    """A sample without keys has no tangent, the others that of their keys."""
    tensors = [x.requires_grad_() for x in draw()]
    value, tangent = transform(
        lambda *x: attention(*x, key_lengths=torch.tensor([0, 2], device=DEVICE), causal=True), *tensors
    )
    expected = attention(
        *map(Dual, tensors[:3], tensors[3:]),
        key_lengths=torch.tensor([0, 2], device=DEVICE),
        causal=True,
        backend="reference",
    )
    assert_same((value, tangent), tuple(expected))
    assert not tangent[0].any()
    for gradient in torch.autograd.grad((value + tangent).sum(), tensors):
        assert gradient.isfinite().all()
        assert not gradient[0].any()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: Any, transform: Transform) -> None:
    # Triton's interpreter cannot multiply bfloat16.
    dtype = torch.float16 if DEVICE == "cpu" else torch.bfloat16
    tensors = draw()
    with torch.autocast(DEVICE, dtype):
        actual = transform(lambda *x: attention(*x, backend=backend), *tensors)
    expected = through_jvp(plain_attention, *[x.to(dtype).double() for x in tensors])
    for part, exact in zip(actual, expected, strict=True):
        assert part.dtype == dtype
        # Rounded once, and by the kernels P before its product with V.
        torch.testing.assert_close(part.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


class OwnNetwork(nn.Module):
    """Someone's own network: attention between a projection and its input scaled by s."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(4, 12)
        self.attend = attend

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        q, k, v = self.project(x * s.cos()[:, None, None, None]).chunk(3, -1)
        return self.attend(q, k, v) * t[:, None, None, None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_of_ones_own(backend: Any) -> None:
    """∂_s F through `JVPNetwork`, and the parameters' gradients through it."""

    def run(network: OwnNetwork, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        result = JVPNetwork(network)(x, t, Dual(s, torch.ones_like(s)))
        loss = (result.value * result.tangent).sin().sum()
        return result.value, result.tangent, *torch.autograd.grad(loss, list(network.parameters()))

    x, t = draw()[0], torch.tensor([0.3, 0.9], device=DEVICE)
    own = OwnNetwork(lambda *y: attention(*y, backend=backend)).to(DEVICE)
    plain = OwnNetwork(plain_attention).to(DEVICE).double()
    assert_same(run(own, x, t, 0.5 * t), run(plain, *double([x, t, 0.5 * t])))


# Anything else than one level.


def nested_jvp(function: Callable[..., Tensor], *x: Tensor) -> Any:
    """Second derivatives along two directions."""

    def once(*y: Tensor) -> tuple[Tensor, Tensor]:
        return through_jvp(function, *y, *x[3:])

    return torch.func.jvp(once, x[:3], tuple(torch.ones_like(y) for y in x[:3]))


NESTED = {
    "jvp of jvp": nested_jvp,
    "jacfwd": lambda f, *x: torch.func.jacfwd(f, (0, 1, 2))(*x[:3]),
    "hessian": lambda f, *x: torch.func.hessian(lambda *y: f(*y).sin().sum(), (0, 2))(*x[:3]),
    "grad of jvp": lambda f, *x: torch.func.grad(
        lambda *y: sum(part.sin().sum() for part in through_jvp(f, *y)), tuple(range(6))
    )(*x),
    "jvp of grad": lambda f, *x: torch.func.jvp(
        torch.func.grad(lambda *y: f(*y).sin().sum(), (0, 1, 2)), x[:3], x[3:]
    ),
    "vmap of jvp": lambda f, *x: torch.func.vmap(lambda *y: through_jvp(f, *y))(
        *[torch.stack([y, 2 * y]) for y in x]
    ),
    "jvp of vmap": lambda f, *x: through_jvp(torch.func.vmap(f), *[torch.stack([y, 2 * y]) for y in x]),
    "grad inside dual_level": lambda f, *x: through_level(
        torch.func.grad(lambda q, k, v: f(q, k, v).sin().sum()), *x
    ),
    "linearize": lambda f, *x: torch.func.linearize(f, *x[:3])[1](*x[3:]),
}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nested_transforms(backend: Any, nested: Callable[..., Any]) -> None:
    tensors = draw()
    actual = nested(lambda *x: attention(*x, backend=backend), *tensors)
    assert_same(actual, nested(plain_attention, *double(tensors)))


@pytest.mark.parametrize("name", NESTED)
def test_forced_kernels_refuse_nested_transforms(name: str) -> None:
    def run() -> Any:
        return NESTED[name](lambda *x: attention(*x, backend="triton"), *draw())

    if name == "linearize":  # one level, traced
        assert_same(run(), NESTED[name](plain_attention, *double(draw())))
        return
    with pytest.raises(
        RuntimeError, match=r'tvmatch\.attention: the backend "triton"|backend: "triton" cannot'
    ):
        run()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_duals_whose_parts_hide_tangents(backend: Any, transform: Transform) -> None:
    """d/ds of the tangent that the Duals carry: second derivatives along two directions."""
    tensors, directions = draw(), draw(seed=1)[:3]

    def tangent(*x: Tensor) -> Tensor:
        result = attention(*map(Dual, x, directions), backend=backend)
        assert result.tangent is not None
        return result.tangent

    def expected(*x: Tensor) -> Tensor:
        return through_jvp(plain_attention, *x, *exact_directions)[1]

    exact_directions = double(directions)
    assert_same(transform(tangent, *tensors), through_jvp(expected, *double(tensors)))


def test_duals_whose_parts_hide_tangents_are_refused_by_forced_kernels() -> None:
    tensors = draw()

    def value(*x: Tensor) -> Tensor:
        return attention(*map(Dual, x, tensors[:3]), backend="triton").value

    with pytest.raises(RuntimeError, match=r"Duals whose parts carry hidden tangents"):
        through_jvp(value, *tensors)


# Under `torch.compile`: right, or an error; never a wrong tangent.


def without_tangents(graph: torch.fx.GraphModule, _: Any) -> Any:
    """Stands for compiled code, which computes on memory: the tangents of a graph's inputs are lost."""

    def run(*inputs: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(False):
            return graph(*inputs)

    return make_boxed_func(run)


LIKE_INDUCTOR = aot_autograd(fw_compiler=without_tangents)


def test_the_stand_in_for_a_compiler_loses_tangents() -> None:
    """Else the tests below could not fail; where PyTorch keeps such tangents from it, that holds them."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        tangent = forward_ad.unpack_dual(torch.compile(lambda y: y.sin(), backend=LIKE_INDUCTOR)(x)).tangent
        if not SEES_TANGENTS:
            assert tangent is None
            return
        assert_same(tangent, torch.ones(2).cos())
        with pytest.raises(RuntimeError, match=SEEN):
            torch.compile(lambda y: y.sin(), backend=LIKE_INDUCTOR, fullgraph=True)(x)


def outside(transform: Transform, compiler: Callable[..., Any], backend: Any) -> Any:
    """The transform around the compiled function."""
    compiled = compiler(lambda *x: attention(*x, backend=backend))
    return transform(compiled, *draw())


def afterwards(transform: Transform, compiler: Callable[..., Any], backend: Any) -> Any:
    """The same, after the function was compiled without any transform, and again after that."""
    compiled = compiler(lambda *x: attention(*x, backend=backend))
    assert_same(compiled(*draw()[:3]), plain_attention(*draw()[:3]))
    result = transform(compiled, *draw())
    assert_same(compiled(*draw()[:3]), plain_attention(*draw()[:3]))
    assert_same(transform(compiled, *draw()), result)
    return result


def inside(transform: Transform, compiler: Callable[..., Any], backend: Any) -> Any:
    """The transform within the compiled function."""
    return compiler(lambda *x: transform(lambda *y: attention(*y, backend=backend), *x))(*draw())


def gradients_inside(transform: Transform, compiler: Callable[..., Any], backend: Any) -> Any:
    tensors = [x.requires_grad_() for x in draw()]
    value, tangent = compiler(lambda *x: transform(lambda *y: attention(*y, backend=backend), *x))(*tensors)
    return value, tangent, *torch.autograd.grad((value * tangent).sin().sum(), tensors)


def duals_outside(transform: Transform, compiler: Callable[..., Any], backend: Any) -> Any:
    """Duals within a compiled function, tangents of the transform around it."""
    compiled = compiler(lambda *x: attention(*map(Dual, x), backend=backend).value)
    return transform(compiled, *draw())


def expected_result(where: Callable[..., Any]) -> Any:
    tensors = double([x.requires_grad_() for x in draw()])
    value, tangent = through_jvp(plain_attention, *tensors)
    if where is not gradients_inside:
        return value, tangent
    return value, tangent, *torch.autograd.grad((value * tangent).sin().sum(), tensors)


PLACES = [outside, afterwards, inside, gradients_inside, duals_outside]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiled_with_graph_breaks_is_right(
    backend: Any, transform: Transform, where: Callable[..., Any]
) -> None:
    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=LIKE_INDUCTOR)

    assert_same(where(transform, compiler, backend), expected_result(where))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_as_one_graph_is_right_or_refused(
    backend: Any, transform: Transform, where: Callable[..., Any]
) -> None:
    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend=LIKE_INDUCTOR, fullgraph=True)

    within = where in (inside, gradients_inside)
    if within and backend == "reference":
        assert_same(where(transform, compiler, backend), expected_result(where))
        return
    # PyTorch itself refuses to trace a function that someone else's jvp calls.
    refusal = "functorch" if transform is through_jvp and not within else r"tvmatch\.attention.*tvmatch\.Dual"
    if SEES_TANGENTS and transform is not through_jvp and not within:
        refusal = SEEN
    with pytest.raises(RuntimeError, match=refusal):
        where(transform, compiler, backend)


@pytest.mark.parametrize("name", ["jvp of jvp", "jacfwd", "jvp of grad", "grad inside dual_level"])
def test_compiled_nested_transforms_are_right(name: str) -> None:
    compiled = torch.compile(lambda *x: NESTED[name](attention, *x), backend=LIKE_INDUCTOR)
    assert_same(compiled(*draw()), NESTED[name](plain_attention, *double(draw())))
