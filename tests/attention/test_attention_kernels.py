"""The Triton kernels against the float64 reference, on a GPU if there is one, else in the interpreter."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvmatch.attention import attention, attention_reference, launch, operators
from tvmatch.attention.operands import Forward, Gradients, Operands
from tvmatch.attention.tiles import Tile, Tiles, parts
from tvmatch.dual import Dual
from tvmatch.seeds import generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN: what a kernel does not write is seen."""
    for name in ("empty_like_heads", "empty_rows"):
        make: Callable[[Tensor], Tensor] = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda x, make=make: make(x).fill_(math.nan))


class Case(NamedTuple):
    """An attention with cotangents G (B, H, N, D) of its value and Ġ of its tangent, either of them None."""

    operands: Operands
    gradient: Tensor | None
    tangent_gradient: Tensor | None
    key_lengths: Tensor | None = None
    causal: bool = False

    @property
    def scale(self) -> float:
        return float(self.operands.q.shape[3] ** -0.5)


def make_case(
    *,
    batch: int = 2,
    heads: int = 2,
    queries: int = 37,
    keys: int = 37,
    head_dim: int = 16,
    tangents: tuple[bool, bool, bool] = (True, True, True),
    cotangents: tuple[bool, bool] = (True, True),
    key_lengths: list[int] | None = None,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    seed: int = 0,
) -> Case:
    """Normal draws, with standard deviation `size` for q and k; views of (B, rows, H, D) as in a layer."""
    random = generator(seed, "attention")

    def draw(rows: int, std: float = 1.0) -> Tensor:
        x = std * torch.randn(batch, rows, heads, head_dim, generator=random, dtype=torch.float64)
        return x.to(DEVICE, dtype).transpose(1, 2)

    values = draw(queries, size), draw(keys, size), draw(keys)
    rows = queries, keys, keys
    dots = [draw(count) if wanted else None for count, wanted in zip(rows, tangents, strict=True)]
    of_value, of_tangent = (draw(queries) if wanted else None for wanted in cotangents)
    lengths = None if key_lengths is None else torch.tensor(key_lengths, device=DEVICE)
    return Case(Operands(*values, *dots), of_value, of_tangent if any(tangents) else None, lengths, causal)


def oracle(case: Case) -> tuple[Dual, Gradients]:
    """The reference in float64, and reverse mode through it."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in case.operands]
    q, k, v, q_tangent, k_tangent, v_tangent = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    output = attention_reference(
        Dual(q, q_tangent),
        Dual(k, k_tangent),
        Dual(v, v_tangent),
        causal=case.causal,
        key_lengths=case.key_lengths,
    )
    pairs = [
        (out, cotangent.double())
        for out, cotangent in zip(output, (case.gradient, case.tangent_gradient), strict=True)
        if out is not None and cotangent is not None
    ]
    wanted = [x for x in leaves if x is not None]
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
    return output, Gradients(*(None if x is None else next(found) for x in leaves))  # type: ignore[arg-type]


def run(
    case: Case, *, tiles: Tiles | None = None, descriptors: bool | None = None
) -> tuple[Forward, Gradients]:
    """The kernels, through their launchers."""
    shared: Any = (case.key_lengths, case.scale, case.causal)
    tile = None if tiles is None else tiles.forward
    result = launch.forward(case.operands, *shared, tile=tile, descriptors=descriptors)
    gradients = launch.backward(
        case.operands,
        result,
        case.gradient,
        case.tangent_gradient,
        *shared,
        tiles=tiles,
        descriptors=descriptors,
    )
    return result, gradients


def tolerance(dtype: torch.dtype) -> float:
    """Four roundings to half precision (operands of two products, P, the result).

    In float32, sums of some hundred terms and a GPU's approximate 2^x and log₂ x (2 ulp each) lose more.
    """
    return max(4 * torch.finfo(dtype).eps, 2e-5)


def check(case: Case, result: Forward, gradients: Gradients, limit: float | None = None) -> None:
    """Every output and gradient against the oracle, in norm."""
    expected, expected_gradients = oracle(case)
    limit = tolerance(case.operands.q.dtype) if limit is None else limit
    cotangents = [x for x in (case.gradient, case.tangent_gradient) if x is not None]
    # A softmax over one key has gradients of exactly zero: what is left is the rounding of terms that cancel,
    # which are as large as the cotangents times an operand. 0.05 keeps that below the gradients of others.
    sizes = [float(x.double().abs().max()) for x in case.operands if x is not None and x.numel()]
    largest = max([1.0, *sizes])
    floor = 0.05 * largest * float(sum(x.double().norm() for x in cotangents))
    named = {"output": (result.output, expected.value), "tangent": (result.output_tangent, expected.tangent)}
    named |= {
        name: (getattr(gradients, name), getattr(expected_gradients, name)) for name in Gradients._fields
    }
    for name, (actual, right) in named.items():
        if right is None or actual is None:
            assert not (torch.zeros(1) if right is None else right).any(), f"{name} is missing"
            assert not (torch.zeros(1) if actual is None else actual).any(), f"{name} should be zero"
            continue
        assert actual.dtype == case.operands.q.dtype
        error = float((actual.double() - right).norm().detach())
        allowed = limit * (float(right.norm().detach()) + floor * (name not in ("output", "tangent")))
        assert error <= allowed, f"{name}: {error} > {allowed}"  # NaN is not <=


lengths = st.integers(1, 40)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, keys = draw(st.integers(1, 3)), draw(lengths)
    some = draw(st.booleans())
    tangents = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    cotangents = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return make_case(
        batch=batch,
        heads=draw(st.integers(1, 2)),
        queries=draw(lengths),
        keys=keys,
        head_dim=draw(st.sampled_from([1, 5, 8, 16, 20, 24, 33])),
        tangents=tangents,
        cotangents=cotangents if any(tangents) else (True, False),
        key_lengths=[draw(st.integers(0, keys)) for _ in range(batch)] if some else None,
        causal=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )


SMALL = Tile(16, 16, 4, 1)
# Several tiles in both directions at the sizes that the interpreter can afford, in the parts of the table.
TOGETHER = Tiles(SMALL, parts({"q q_tangent": SMALL}), parts({"k k_tangent v v_tangent": SMALL}))
APART = Tiles(
    SMALL,
    parts(dict.fromkeys(("q", "q_tangent"), SMALL)),
    parts({"k": SMALL, "v": SMALL, "k_tangent v_tangent": SMALL}),
)
UNEQUAL = Tiles(
    Tile(32, 16, 4, 1),
    parts({"q q_tangent": Tile(16, 32, 4, 1)}),
    parts({"k k_tangent v v_tangent": Tile(32, 16, 4, 1)}),
)


@pytest.mark.parametrize("tiles", [TOGETHER, APART, UNEQUAL], ids=["together", "apart", "unequal"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@settings(
    max_examples=12,
    derandomize=True,  # the same cases everywhere: on a GPU each is a compilation
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
@example(case=make_case(keys=1, key_lengths=[0, 1]))
def test_kernels_equal_the_reference(case: Case, tiles: Tiles, descriptors: bool) -> None:
    """Shapes, absent tangents and cotangents, masks and precisions are drawn."""
    check(case, *run(case, tiles=tiles, descriptors=descriptors))


@pytest.mark.parametrize("tangents", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("cotangents", [(True, True), (True, False), (False, True)], ids=str)
def test_every_absence(tangents: tuple[bool, bool, bool], cotangents: tuple[bool, bool]) -> None:
    """All combinations of tangents and cotangents, causal so that rows differ in their number of keys."""
    if not any(tangents):
        cotangents = (True, False)
    case = make_case(batch=1, queries=20, keys=35, tangents=tangents, cotangents=cotangents, causal=True)
    check(case, *run(case, tiles=TOGETHER))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
def test_default_tiles(head_dim: int, dtype: torch.dtype) -> None:
    """The table's tiles, more than one of them in each direction where that is affordable."""
    wide = dtype != torch.float32 and head_dim <= 128
    queries, keys = (140, 150) if wide else (20, 33)
    case = make_case(batch=1, heads=1, queries=queries, keys=keys, head_dim=head_dim, dtype=dtype)
    check(case, *run(case))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tangent", [True, False])
def test_default_tiles_with_masks(head_dim: int, tangent: bool, dtype: torch.dtype) -> None:
    """More than one tile each way, the last ones ragged, causal and key lengths together."""
    case = make_case(
        queries=200,
        keys=190,
        heads=1,
        head_dim=head_dim,
        tangents=(tangent,) * 3,
        cotangents=(True, tangent),
        key_lengths=[190, 77],
        causal=True,
        dtype=dtype,
    )
    check(case, *run(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_alone_with_default_tiles(dtype: torch.dtype) -> None:
    queries, keys = (20, 33) if dtype == torch.float32 else (140, 130)
    case = make_case(
        queries=queries, keys=keys, head_dim=64, tangents=(False,) * 3, cotangents=(True, False), dtype=dtype
    )
    check(case, *run(case))


def test_large_logits_stay_finite() -> None:
    """|S| up to 1e4: P is nearly one-hot. A float32 logit of 1e4 has an error of 1e-3, and so has P."""
    case = make_case(queries=33, keys=40, head_dim=64, size=32.0)
    scores = case.scale * (case.operands.q @ case.operands.k.mT).abs()
    case = case._replace(operands=case.operands._replace(q=case.operands.q * (1e4 / float(scores.max()))))
    result, gradients = run(case, tiles=TOGETHER)
    for x in (*result, *gradients):
        assert x is not None
        assert x.isfinite().all()
    check(case, result, gradients, limit=2e-2)


def test_mean_of_the_tangent_of_the_scores_costs_no_digits() -> None:
    """Ṡ with a mean far beyond its spread: centred sums keep what a difference of two large ones loses."""
    case = make_case(queries=32, keys=64, head_dim=16, dtype=torch.float16, tangents=(False, True, False))
    q, k, v, _, k_tangent, _ = case.operands
    assert k_tangent is not None
    q = q.abs() + 1
    along = torch.full_like(
        k_tangent, 30.0
    )  # adds 30 Σ_d q_d to every Ṡ of a row: the softmax does not see it
    shifted = case._replace(operands=Operands(q, k, v, None, k_tangent + along, None))
    plain = case._replace(operands=Operands(q, k, v, None, shifted.operands.k_tangent - along, None))  # type: ignore[operator]
    expected = run(plain, tiles=TOGETHER)[0].output_tangent
    actual = run(shifted, tiles=TOGETHER)[0].output_tangent
    assert expected is not None
    assert actual is not None
    # Without centring the error is that of 30 · 32 / 4 = 240 in half precision, larger than the result.
    assert float((actual - expected).double().norm() / expected.double().norm()) < 2e-2


def test_kernels_repeat_bit_for_bit() -> None:
    case = make_case(queries=50, keys=45, causal=True)
    first, second = run(case, tiles=APART), run(case, tiles=APART)
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_views_of_a_packed_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.randn(2, 2, 24, 3, 2, 16, generator=generator(0, "packed")).to(
        DEVICE
    )  # (value or tangent, …)
    operands = Operands(*(x.transpose(1, 2) for part in packed for x in part.unbind(2)))
    gradient = torch.ones(2, 2, 24, 1, device=DEVICE).expand(2, 2, 24, 16).contiguous()
    broadcast = torch.ones(1, 1, 1, 16, device=DEVICE).expand(2, 2, 24, 16)  # strides of zero
    case = Case(operands, gradient, broadcast)
    expected = run(case)

    def refuse(self: Tensor) -> Tensor:
        raise AssertionError("a copy")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", refuse)
        result, gradients = run(case)
    check(case, result, gradients)
    assert torch.equal(expected[0].output, result.output)


def test_columns_that_are_not_neighbours_are_copied() -> None:
    case = make_case(queries=16, keys=16)
    wide = Operands(*(None if x is None else x.repeat_interleave(2, -1)[..., ::2] for x in case.operands))  # type: ignore[arg-type]
    assert wide.q.stride(3) == 2
    result, gradients = run(case._replace(operands=wide))
    check(case, result, gradients)


def test_key_lengths_in_any_layout() -> None:
    """A slice with gaps and a repeated number are not read as if they were contiguous."""
    case = make_case(batch=3, queries=20, keys=33, key_lengths=[5, 0, 33])
    wide = torch.tensor([5, 33, 0, 33, 33, 33], device=DEVICE)[::2]
    for lengths in (wide, wide.to(torch.int32), wide.to(torch.uint8)):
        check(case, *run(case._replace(key_lengths=lengths)))
    same = case._replace(key_lengths=torch.tensor([7], device=DEVICE).expand(3))
    check(same, *run(same))


def test_strides_of_any_order() -> None:
    """Tensors laid out (B, H, rows, D), (H, B, rows, D) and with gaps between rows, mixed."""
    case = make_case(queries=20, keys=33)
    layouts = [
        lambda x: x.contiguous(),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
        lambda x: x.repeat_interleave(3, 2)[:, :, 1::3],
        lambda x: x[:, [0]].expand_as(x) if x.shape[1] == 1 else x,
    ]
    assert all(x is not None for x in case.operands)
    moved = Operands(*(layout(x) for layout, x in zip(layouts, case.operands, strict=True)))
    for descriptors in (False, True):
        check(case, *run(case._replace(operands=moved), tiles=TOGETHER, descriptors=descriptors))


def test_empty_batch() -> None:
    case = make_case(batch=0, key_lengths=[])
    result, gradients = run(case)
    assert [None if x is None else x.shape for x in gradients] == [
        x.shape for x in case.operands if x is not None
    ]
    assert result.output.shape == case.operands.q.shape


def test_a_scale_of_zero_averages() -> None:
    case = make_case(queries=20, keys=21)
    result = launch.forward(case.operands, None, 0.0, False)
    expected = case.operands.v.double().mean(2, keepdim=True).expand_as(result.output)
    torch.testing.assert_close(result.output.double(), expected, rtol=0, atol=1e-6)  # a mean of 21 numbers
    gradients = launch.backward(case.operands, result, case.gradient, case.tangent_gradient, None, 0.0, False)
    assert not gradients.q.any()
    assert gradients.v.isfinite().all()


# The operators, through the public entry


def duals(operands: Operands) -> tuple[Dual, Dual, Dual]:
    q, k, v, q_tangent, k_tangent, v_tangent = operands
    return Dual(q, q_tangent), Dual(k, k_tangent), Dual(v, v_tangent)


def through_autograd(function: Callable[..., Dual], case: Case) -> tuple[Dual, Gradients]:
    leaves = Operands(*(None if x is None else x.detach().requires_grad_() for x in case.operands))  # type: ignore[arg-type]
    output = function(*duals(leaves), causal=case.causal, key_lengths=case.key_lengths)
    pairs = [
        pair for pair in zip(output, (case.gradient, case.tangent_gradient), strict=True) if None not in pair
    ]
    outputs, cotangents = zip(*pairs, strict=True)
    wanted = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
    return output, Gradients(*(None if x is None else next(found) for x in leaves))  # type: ignore[arg-type]


def triton_attention(q: Dual, k: Dual, v: Dual, **options: Any) -> Dual:
    return attention(q, k, v, backend="triton", **options)


ROUTES: dict[str, Case] = {
    "value and tangent": make_case(queries=20, keys=33, causal=True),
    "one tangent": make_case(queries=20, keys=33, tangents=(False, False, True)),
    "value alone": make_case(queries=20, keys=33, tangents=(False,) * 3, cotangents=(True, False)),
    "no cotangent of the tangent": make_case(queries=20, keys=33, cotangents=(True, False)),
    "no cotangent of the value": make_case(queries=20, keys=33, cotangents=(False, True)),
    "key lengths": make_case(queries=20, keys=33, key_lengths=[0, 17]),
    "empty batch": make_case(batch=0),
}


@pytest.mark.parametrize("name", ROUTES)
def test_autograd_through_the_operator(name: str) -> None:
    case = ROUTES[name]
    output, gradients = through_autograd(triton_attention, case)
    check(case, Forward(output.value, output.tangent, output.value, None), gradients)


@pytest.mark.parametrize("name", ROUTES)
def test_compiled_equals_eager(name: str) -> None:
    """One graph without a break; the same kernels, so the same bits."""
    case = ROUTES[name]
    eager = through_autograd(triton_attention, case)
    torch.compiler.reset()
    compiled = through_autograd(torch.compile(triton_attention, fullgraph=True, backend="aot_eager"), case)
    for one, other in zip((*eager[0], *eager[1]), (*compiled[0], *compiled[1]), strict=True):
        if one is None or other is None:  # None and zeros are the same gradient
            assert not any(x is not None and x.any() for x in (one, other))
        else:
            assert torch.equal(one, other)


def test_compiled_by_inductor() -> None:
    case = ROUTES["value and tangent"]
    eager = through_autograd(triton_attention, case)
    torch.compiler.reset()
    compiled = through_autograd(torch.compile(triton_attention, fullgraph=True), case)
    for one, other in zip((*eager[0], *eager[1]), (*compiled[0], *compiled[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("operator", "present"),
    [("attention_value", "111000"), ("attention_dual", "111111"), ("attention_dual", "111001")],
)
def test_registration(operator: str, present: str) -> None:
    """PyTorch's own checks: schema, fake tensors, autograd, ahead-of-time autograd."""
    case = make_case(queries=5, keys=7, tangents=tuple(x == "1" for x in present[3:]))  # type: ignore[arg-type]
    operands = [None if x is None else x.detach().requires_grad_() for x in case.operands]
    arguments = operands[:3] if operator == "attention_value" else operands
    overload = getattr(operators, operator)._opoverload
    torch.library.opcheck(overload, (*arguments, torch.tensor([0, 7], device=DEVICE), 0.3, True))


def test_nothing_quadratic_is_kept() -> None:
    """What waits for the backward pass is linear in the length: no saved tensor has N × M numbers."""
    case = make_case(batch=1, heads=1, queries=96, keys=96, head_dim=8)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        through_autograd(triton_attention, case)
    assert sizes
    assert max(sizes) == 96 * 8


# Where the kernels cannot run


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton's interpreter were off."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


def test_forced_triton_on_a_cpu(compiled_kernels: None) -> None:
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match=r"triton.*cpu.*NVIDIA GPU"):
        attention(x, x, x, backend="triton")


def test_auto_on_a_cpu_takes_the_reference(compiled_kernels: None) -> None:
    case = make_case()
    q, k, v = (
        Dual(x.value.cpu(), None if x.tangent is None else x.tangent.cpu()) for x in duals(case.operands)
    )
    for one, other in zip(attention(q, k, v), attention_reference(q, k, v), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_interpreter_refuses_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    x = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"interpreter.*bfloat16"):
        attention(x, x, x, backend="triton")


def test_float64_is_a_type_error() -> None:
    x = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"triton.*float64"):
        attention(x, x, x, backend="triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(operators, "_launch", fail)
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(RuntimeError, match=r"No module named 'triton'"):
        attention(x, x, x, backend="triton")
