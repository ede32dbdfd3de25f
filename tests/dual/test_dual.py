"""Every tangent rule against `torch.func.jvp`, central differences and, through the tangent, gradcheck."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import central_difference, jvp, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tvmatch import dual
from tvmatch.attention import attention, attention_reference
from tvmatch.dual import Dual
from tvmatch.seeds import generator

Shape = tuple[int, ...]

# Two float64 computations of the same few sums: a handful of roundings of order-1 numbers. The slope of the
# norms is 1000 near zero.
EXACT = (1e-11, 1e-12)  # relative, absolute
# `central_difference` has errors near 1e-13 times a fifth derivative, which is about 1e3 for the norms.
DIFFERENCES = (1e-7, 1e-8)


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: tuple[float, float] = EXACT) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=tolerance[0], atol=tolerance[1])


def plain_rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_layer_norm(x: Tensor) -> Tensor:
    variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()


def plain_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)


@dataclass(frozen=True)
class Rule:
    """A rule, the plain function it differentiates, and shapes of its Duals and of its plain arguments."""

    rule: Callable[..., Dual]
    plain: Callable[..., Tensor]
    shapes: tuple[Shape, ...]
    constants: tuple[Shape, ...] = ()


RULES = {
    "linear_map": Rule(lambda x: dual.linear_map(torch.neg, x), torch.neg, ((2, 3),)),
    "pointwise": Rule(
        lambda x: dual.pointwise(torch.sin, lambda tangent, y: tangent * y.cos(), x), torch.sin, ((2, 3),)
    ),
    "add": Rule(dual.add, torch.add, ((2, 1, 3), (2, 3))),
    "subtract": Rule(dual.subtract, torch.sub, ((2, 1, 3), (2, 3))),
    "multiply": Rule(dual.multiply, torch.mul, ((2, 1, 3), (2, 3))),
    "modulate": Rule(
        dual.modulate, lambda x, shift, scale: x * (1 + scale) + shift, ((2, 2, 3), (2, 1, 3), (1, 3))
    ),
    "add_product": Rule(dual.add_product, lambda x, y, z: x + y * z, ((2, 2, 3), (2, 1, 3), (2, 2, 3))),
    "unbind": Rule(lambda x: dual.unbind(x, 1)[1], lambda x: x[:, 1], ((2, 2, 3),)),
    "split": Rule(lambda x: dual.split(x, (2, 1), 1)[0], lambda x: x[:, :2], ((2, 3, 2),)),
    "linear": Rule(dual.linear, F.linear, ((2, 2, 3),), ((4, 3), (4,))),
    "linear without bias": Rule(dual.linear, F.linear, ((2, 3),), ((4, 3),)),
    "silu": Rule(dual.silu, lambda x: x / (1 + torch.exp(-x)), ((2, 3),)),
    "gelu": Rule(dual.gelu, plain_gelu, ((2, 3),)),
    "rms_norm": Rule(dual.rms_norm, plain_rms_norm, ((2, 3),)),
    "layer_norm": Rule(dual.layer_norm, plain_layer_norm, ((2, 3),)),
    "rms_norm, scaled": Rule(
        lambda x, scale: dual.rms_norm(x, scale=scale),
        lambda x, scale: plain_rms_norm(x) * scale,
        ((2, 2, 3), (2, 3)),
    ),
    "rms_norm, shifted": Rule(
        lambda x, shift: dual.rms_norm(x, shift=shift),
        lambda x, shift: plain_rms_norm(x) + shift,
        ((2, 2, 3), (2, 1, 3)),
    ),
    "rms_norm, scaled and shifted": Rule(
        lambda x, scale, shift: dual.rms_norm(x, scale=scale, shift=shift),
        lambda x, scale, shift: plain_rms_norm(x) * scale + shift,
        ((2, 2, 3), (2, 1, 3), (3,)),
    ),
    "layer_norm, scaled and shifted": Rule(
        lambda x, scale, shift: dual.layer_norm(x, scale=scale, shift=shift),
        lambda x, scale, shift: plain_layer_norm(x) * scale + shift,
        ((2, 3), (2, 3), (1, 3)),
    ),
    "attention": Rule(attention, plain_attention, ((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2))),
    "scaled attention": Rule(
        lambda *x: attention(*x, scale=0.3),
        lambda q, k, v: plain_attention(q, k, v, scale=0.3),
        ((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2)),
    ),
}
# One case for each rule and each choice of arguments that carry a tangent.
CASES = [
    pytest.param(rule, carried, id=f"{name}-{''.join('.T'[c] for c in carried)}")
    for name, rule in RULES.items()
    for carried in itertools.product([False, True], repeat=len(rule.shapes))
    if any(carried)
]


def draw(*shapes: Shape, seed: int = 0) -> list[Tensor]:
    draws = generator(seed, "test_dual")
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]


def carry(values: list[Tensor], tangents: list[Tensor], carried: tuple[bool, ...]) -> list[Dual]:
    """Duals with tangent None where nothing is carried."""
    return [
        Dual(value, tangent if has else None)
        for value, tangent, has in zip(values, tangents, carried, strict=True)
    ]


def compare_with_jvp(rule: Rule, shapes: tuple[Shape, ...], carried: tuple[bool, ...], seed: int = 0) -> None:
    """Value and tangent against the plain function and `torch.func.jvp` of it."""
    values, tangents, constants = (
        draw(*shapes, seed=seed),
        draw(*shapes, seed=seed + 1),
        draw(*rule.constants),
    )
    result = rule.rule(*carry(values, tangents, carried), *constants)
    given = [tangent * has for tangent, has in zip(tangents, carried, strict=True)]
    value, tangent = jvp(lambda *x: rule.plain(*x, *constants), tuple(values), tuple(given))
    assert_close(result.value, value)
    if any(carried):
        assert_close(result.tangent, tangent)
    else:
        assert result.tangent is None


@pytest.mark.parametrize(("rule", "carried"), CASES)
def test_tangent_is_the_jvp(rule: Rule, carried: tuple[bool, ...]) -> None:
    compare_with_jvp(rule, rule.shapes, carried)


@pytest.mark.parametrize(("rule", "carried"), CASES)
def test_tangent_is_the_central_difference(rule: Rule, carried: tuple[bool, ...]) -> None:
    values, tangents = draw(*rule.shapes), draw(*rule.shapes, seed=1)
    constants = draw(*rule.constants, seed=2)

    def along(step: float) -> Tensor:
        moved = [x + step * dx * has for x, dx, has in zip(values, tangents, carried, strict=True)]
        return rule.plain(*moved, *constants)

    result = rule.rule(*carry(values, tangents, carried), *constants)
    assert_close(result.tangent, central_difference(along), DIFFERENCES)


@pytest.mark.parametrize(("rule", "carried"), CASES)
def test_gradients_through_value_and_tangent(rule: Rule, carried: tuple[bool, ...]) -> None:
    values, tangents = draw(*rule.shapes), draw(*rule.shapes, seed=1)
    constants = draw(*rule.constants, seed=2)
    moving = [tangent for tangent, has in zip(tangents, carried, strict=True) if has]
    arguments = [x.requires_grad_() for x in (*values, *moving, *constants)]

    def outputs(*x: Tensor) -> tuple[Tensor, Tensor]:
        given, rest = x[: len(values)], iter(x[len(values) :])
        duals = [Dual(y, next(rest) if has else None) for y, has in zip(given, carried, strict=True)]
        result = rule.rule(*duals, *rest)
        assert result.tangent is not None
        # Addition and the like return an input's own tangent, which gradcheck must not meet as an output.
        return result.value.clone(), result.tangent.clone()

    assert torch.autograd.gradcheck(outputs, arguments)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_tangents_give_no_tangent(rule: Rule) -> None:
    compare_with_jvp(rule, rule.shapes, (False,) * len(rule.shapes))


@pytest.mark.parametrize(("rule", "carried"), CASES)
def test_none_equals_explicit_zeros(rule: Rule, carried: tuple[bool, ...]) -> None:
    values, tangents = draw(*rule.shapes), draw(*rule.shapes, seed=1)
    constants = draw(*rule.constants, seed=2)
    zeros = [tangent * has for tangent, has in zip(tangents, carried, strict=True)]
    actual = rule.rule(*carry(values, tangents, carried), *constants)
    expected = rule.rule(*map(Dual, values, zeros), *constants)
    assert_close(actual.value, expected.value)
    assert expected.tangent is not None
    assert_close(actual.tangent, expected.tangent)


@given(data=st.data(), name=st.sampled_from(["add", "subtract", "multiply", "modulate"]))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_shapes_broadcast(data: st.DataObject, name: str) -> None:
    rule = RULES[name]
    count = len(rule.shapes)
    shapes = data.draw(mutually_broadcastable_shapes(num_shapes=count, min_side=0, max_side=3, max_dims=3))
    carried = data.draw(st.tuples(*[st.booleans()] * count))
    compare_with_jvp(rule, shapes.input_shapes, carried, seed=data.draw(st.integers(0, 99)))


@given(
    name=st.sampled_from(["linear", "linear without bias", "silu", "gelu", "rms_norm", "layer_norm"]),
    batch=st.lists(st.integers(0, 3), max_size=3),
    width=st.integers(1, 4),
    has_tangent=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_batch_shape(name: str, batch: list[int], width: int, has_tangent: bool, seed: int) -> None:
    width = 3 if name.startswith("linear") else width
    compare_with_jvp(RULES[name], ((*batch, width),), (has_tangent,), seed)


@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 2),
    queries=st.integers(1, 4),
    keys=st.integers(1, 4),
    width=st.integers(1, 3),
    carried=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_attention_of_any_shape(
    batch: int, heads: int, queries: int, keys: int, width: int, carried: tuple[bool, ...], seed: int
) -> None:
    key_shape = (batch, heads, keys, width)
    shapes = ((batch, heads, queries, width), key_shape, key_shape)
    compare_with_jvp(RULES["attention"], shapes, carried, seed)


def test_attention_inside_forward_mode() -> None:
    """Plain tensors that hide a tangent: PyTorch's fused attention would raise there."""
    shapes = RULES["attention"].shapes
    values, tangents = tuple(draw(*shapes)), tuple(draw(*shapes, seed=1))
    value, tangent = jvp(lambda *x: attention(*map(Dual, x)).value, values, tangents)
    expected_value, expected_tangent = jvp(plain_attention, values, tangents)
    assert_close(value, expected_value)
    assert_close(tangent, expected_tangent)


def test_attention_ignores_a_shift_of_the_scores() -> None:
    """P does not move when all scores of a row move alike, so K̇ + c gives the same Ȯ; at 1e6 as at 0."""
    shapes = RULES["attention"].shapes
    (q, k, v), (dq, dk, dv) = draw(*shapes), draw(*shapes, seed=1)
    expected = attention_reference(Dual(q, dq), Dual(k, dk), Dual(v, dv)).tangent
    shifted = attention_reference(Dual(q, dq), Dual(k, dk + 1e6), Dual(v, dv)).tangent
    # Ṡ itself is a sum of numbers near 1e6 · 1e-16 wrong; centring must not lose more than that.
    assert expected is not None
    assert_close(shifted, expected, (0, 1e-8))


def test_attention_of_extreme_scores() -> None:
    """Scores of ±1e4 overflow exp in float32; one key then takes all the weight, and Ṗ = 0 there."""
    q = torch.tensor([[[[1e4]]]])
    k = torch.tensor([[[[1.0], [-1.0], [0.5]]]])
    v = torch.tensor([[[[2.0], [3.0], [4.0]]]])
    ones = torch.ones_like
    result = attention_reference(Dual(q, ones(q)), Dual(k, ones(k)), Dual(v, 7 * ones(v)))
    assert result.tangent is not None
    assert result.value.item() == 2.0
    assert result.tangent.item() == 7.0


def test_attention_in_bfloat16() -> None:
    shapes: tuple[Shape, ...] = ((2, 2, 8, 16),) * 3
    values, tangents = draw(*shapes), draw(*shapes, seed=1)
    half = [Dual(x.bfloat16(), dx.bfloat16()) for x, dx in zip(values, tangents, strict=True)]
    actual = attention(*half)
    expected = attention(*[Dual(x.double(), y.double()) for x, y in half if y is not None])
    assert actual.tangent is not None
    assert expected.tangent is not None
    assert actual.value.dtype == actual.tangent.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 2⁻⁹ = 0.2 % a rounding, of which a few add up.
    assert relative_error(actual.value.double(), expected.value) < 0.01
    assert relative_error(actual.tangent.double(), expected.tangent) < 0.02


@pytest.mark.parametrize("norm", [dual.rms_norm, dual.layer_norm])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_compute_in_float32(norm: Callable[[Dual], Dual], dtype: torch.dtype) -> None:
    # 300² overflows float16, 1e-3² underflows it; the slope near zero is 1000.
    size = torch.tensor([300.0, 1.0, 1e-3])[:, None]
    (x, dx) = (draw_.float() * size for draw_ in draw((3, 8), (3, 8)))
    half = Dual(x.to(dtype), dx.to(dtype))
    assert half.tangent is not None
    actual = norm(half)
    expected = norm(Dual(half.value.double(), half.tangent.double()))
    assert actual.tangent is not None
    assert expected.tangent is not None
    assert actual.value.dtype == actual.tangent.dtype == torch.float32
    for row in range(3):
        # float32 rounding (6e-8), a few times over.
        assert relative_error(actual.value[row].double(), expected.value[row]) < 1e-6
        assert relative_error(actual.tangent[row].double(), expected.tangent[row]) < 1e-5


def test_rms_norm_at_zero_has_slope_one_over_root_epsilon() -> None:
    (tangent,) = draw((2, 4))
    result = dual.rms_norm(Dual(torch.zeros_like(tangent), tangent))
    assert torch.equal(result.value, torch.zeros_like(tangent))
    assert_close(result.tangent, 1000 * tangent)


@pytest.fixture
def one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `linear` does on a GPU, and when it is compiled."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@pytest.mark.usefixtures("one_product")
@pytest.mark.parametrize("name", ["linear", "linear without bias"])
def test_one_product_for_value_and_tangent(name: str) -> None:
    rule = RULES[name]
    test_tangent_is_the_jvp(rule, (True,))
    test_gradients_through_value_and_tangent(rule, (True,))
    (x, dx), constants = (draw(*rule.shapes, seed=i)[0] for i in range(2)), draw(*rule.constants)
    with FlopCounterMode(display=False) as counter:
        rule.rule(Dual(x, dx), *constants)
    (count,) = counter.get_flop_counts()["Global"].values()
    assert count == 2 * 2 * x.numel() * 4  # value and tangent, a product and a sum, four features
    assert len(products(lambda: rule.rule(Dual(x, dx), *constants))) == 1


def products(function: Callable[[], object]) -> list[str]:
    """The matrix products that `function` calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return [event.name for event in profiler.events() if event.name in ("aten::mm", "aten::addmm")]


def test_an_unused_output_of_a_rule_has_no_gradient_of_its_own() -> None:
    """The backward of the rules that have one takes an absent cotangent as zero."""
    for rule in (dual.gelu, dual.rms_norm):
        x, dx = (y.requires_grad_() for y in draw((2, 3), (2, 3)))
        value, tangent = rule(Dual(x, dx))  # type: ignore[operator]
        assert tangent is not None
        whole = torch.autograd.grad((value + 0 * tangent).sum(), (x, dx), retain_graph=True)
        for actual, expected in zip(
            torch.autograd.grad(value.sum(), (x, dx), retain_graph=True), whole, strict=True
        ):
            assert torch.equal(actual, expected)
        whole = torch.autograd.grad((tangent + 0 * value).sum(), (x, dx), retain_graph=True)
        for actual, expected in zip(torch.autograd.grad(tangent.sum(), (x, dx)), whole, strict=True):
            assert torch.equal(actual, expected)


def test_linear_under_autocast_keeps_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and tangent in the precision of the plain product, though value and bias are added apart."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, dx, weight, bias = (y.float() for y in draw((2, 3), (2, 3), (4, 3), (4,)))
    with torch.autocast("cpu", torch.bfloat16):
        plain, result = dual.linear(Dual(x), weight, bias), dual.linear(Dual(x, dx), weight, bias)
    assert result.tangent is not None
    assert plain.value.dtype == result.value.dtype == result.tangent.dtype == torch.bfloat16


@pytest.mark.parametrize("rule", [dual.add, dual.subtract, dual.multiply])
@pytest.mark.parametrize("carried", [(True, False), (False, True), (True, True)])
def test_mixed_precisions_give_value_and_tangent_the_wider(
    rule: Callable[[Dual, Dual], Dual], carried: tuple[bool, bool]
) -> None:
    (x, y), (dx, dy) = draw((2, 3), (2, 3)), draw((2, 3), (2, 3), seed=1)
    result = rule(*carry([x.bfloat16(), y.float()], [dx.bfloat16(), dy.float()], carried))
    assert result.tangent is not None
    assert result.value.dtype == result.tangent.dtype == torch.float32


@pytest.mark.parametrize("carried", list(itertools.product([False, True], repeat=3))[1:])
@pytest.mark.parametrize("wide", [0, 1, 2])
def test_mixed_precisions_in_a_product_that_is_added(carried: tuple[bool, ...], wide: int) -> None:
    values, tangents = draw(*[(2, 3)] * 3), draw(*[(2, 3)] * 3, seed=1)
    dtypes = [torch.float32 if place == wide else torch.bfloat16 for place in range(3)]
    cast = [[x.to(dtype) for x, dtype in zip(part, dtypes, strict=True)] for part in (values, tangents)]
    result = dual.add_product(*carry(*cast, carried))
    assert result.tangent is not None
    assert result.value.dtype == result.tangent.dtype == torch.float32


def test_as_dual() -> None:
    (x,) = draw((2,))
    constant = dual.as_dual(x)
    assert constant.value is x
    assert constant.tangent is None
    assert dual.as_dual(constant) is constant


def test_tuple_arithmetic_is_refused() -> None:
    x = Dual(torch.ones(2))
    with pytest.raises(TypeError, match=r"dual\.add"):
        x + x
    with pytest.raises(TypeError, match=r"dual\.multiply"):
        x * 2
