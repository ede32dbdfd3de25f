"""Attention against softmax attention written key by key, and what it refuses."""

import itertools
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import central_difference, jvp, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tvmatch.attention import attention, attention_reference
from tvmatch.dual import Dual
from tvmatch.seeds import generator

# Two float64 computations of the same few sums: a handful of roundings of order-1 numbers.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
# The same in float32.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
# `central_difference` has errors near 1e-13 times a fifth derivative of order 1 to 100.
DIFFERENCES = {"rtol": 1e-8, "atol": 1e-9}

CARRIED = list(itertools.product([False, True], repeat=3))
MASKS = [
    pytest.param({}, id="all"),
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"key_lengths": [4, 0, 2]}, id="lengths"),
    pytest.param({"causal": True, "key_lengths": [4, 0, 2]}, id="causal-lengths"),
]
# N > M and N < M; with N > M the last causal queries see every key, with N < M some keys are never seen.
LENGTHS = [pytest.param((6, 4), id="tall"), pytest.param((3, 5), id="wide")]


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, key_lengths: list[int] | None = None
) -> Tensor:
    """Softmax over just the keys that a query sees: no mask, no infinity."""
    samples = []
    for sample, (queries, keys, values) in enumerate(zip(q, k, v, strict=True)):
        seen = keys.shape[1] if key_lengths is None else key_lengths[sample]
        rows = []
        for i in range(queries.shape[1]):
            count = min(seen, i + 1) if causal else seen
            scores = torch.einsum("hd,hmd->hm", queries[:, i], keys[:, :count]) / math.sqrt(q.shape[-1])
            rows.append(torch.einsum("hm,hmd->hd", scores.softmax(-1), values[:, :count]))
        samples.append(torch.stack(rows, 1))
    return torch.stack(samples)


def draw(queries: int, keys: int, *, batch: int = 3, width: int = 4, seed: int = 0) -> list[Tensor]:
    """q, k, v and their tangents, float64; two heads."""
    draws = generator(seed, "test_attention")
    shapes = [(batch, 2, length, width) for length in (queries, keys, keys)]
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes * 2]


def carry(tensors: list[Tensor] | tuple[Tensor, ...], carried: tuple[bool, ...]) -> list[Dual]:
    """Duals of the first three and, where carried, the last three."""
    return [
        Dual(value, tangent if has else None)
        for value, tangent, has in zip(tensors[:3], tensors[3:], carried, strict=True)
    ]


def options(mask: dict[str, Any]) -> dict[str, Any]:
    """A mask of lists as arguments of `attention`."""
    lengths = mask.get("key_lengths")
    return mask | ({} if lengths is None else {"key_lengths": torch.tensor(lengths)})


def expected_parts(
    tensors: list[Tensor], carried: tuple[bool, ...], mask: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    tangents = tuple(x * has for x, has in zip(tensors[3:], carried, strict=True))
    return jvp(lambda q, k, v: plain_attention(q, k, v, **mask), tuple(tensors[:3]), tangents)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("carried", CARRIED, ids=lambda x: "".join(".T"[has] for has in x))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_value_and_tangent_are_those_of_the_jvp(
    lengths: tuple[int, int], mask: dict[str, Any], carried: tuple[bool, ...], backend: Any
) -> None:
    tensors = draw(*lengths)
    result = attention(*carry(tensors, carried), **options(mask), backend=backend)
    value, tangent = expected_parts(tensors, carried, mask)
    torch.testing.assert_close(result.value, value, **EXACT)
    if any(carried):
        torch.testing.assert_close(result.tangent, tangent, **EXACT)
    else:
        assert result.tangent is None


@given(
    data=st.data(),
    batch=st.integers(0, 3),
    queries=st.integers(1, 5),
    keys=st.integers(1, 5),
    width=st.integers(1, 5),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_any_lengths(
    data: st.DataObject, batch: int, queries: int, keys: int, width: int, causal: bool, seed: int
) -> None:
    tensors = draw(queries, keys, batch=batch, width=width, seed=seed)
    seen = data.draw(st.none() | st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
    result = attention(
        *carry(tensors, (True,) * 3),
        causal=causal,
        key_lengths=None if seen is None else torch.tensor(seen, dtype=torch.int32),
    )
    if batch == 0:
        assert result.value.shape == (0, 2, queries, width)
        return
    value, tangent = expected_parts(tensors, (True,) * 3, {"causal": causal, "key_lengths": seen})
    torch.testing.assert_close(result.value, value, **EXACT)
    torch.testing.assert_close(result.tangent, tangent, **EXACT)


@pytest.mark.parametrize("mask", MASKS)
def test_tangent_is_the_central_difference(mask: dict[str, Any]) -> None:
    tensors = draw(6, 4)

    def along(step: float) -> Tensor:
        moved = [x + step * dx for x, dx in zip(tensors[:3], tensors[3:], strict=True)]
        return plain_attention(*moved, **mask)

    result = attention(*carry(tensors, (True,) * 3), **options(mask))
    torch.testing.assert_close(result.tangent, central_difference(along), **DIFFERENCES)


@pytest.mark.parametrize("carried", CARRIED, ids=lambda x: "".join(".T"[has] for has in x))
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_through_value_and_tangent(mask: dict[str, Any], carried: tuple[bool, ...]) -> None:
    tensors = [x.requires_grad_() for x in draw(3, 4, width=2)]

    def outputs(*x: Tensor) -> tuple[Tensor, ...]:
        result = attention(*carry(x, carried), **options(mask), backend="reference")
        return tuple(part for part in result if part is not None)

    # Along one random direction: the whole Jacobian would take ten times as long.
    assert torch.autograd.gradcheck(outputs, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_queries_without_keys_give_exact_zeros_and_no_nan(backend: Any) -> None:
    tensors = [x.float().requires_grad_() for x in draw(3, 4)]
    result = attention(
        *carry(tensors, (True,) * 3), key_lengths=torch.tensor([0, 4, 0]), causal=True, backend=backend
    )
    assert result.tangent is not None
    for part in result:
        assert part is not None
        assert not part[[0, 2]].any()
        assert part[1].all()
    gradients = torch.autograd.grad([result.value.sum(), result.tangent.square().sum()], tensors)
    for gradient in gradients:
        assert not gradient[[0, 2]].any()
        assert gradient.isfinite().all()
        assert gradient[1].any()


def test_value_alone_of_queries_without_keys() -> None:
    tensors = [x.requires_grad_() for x in draw(3, 4)[:3]]
    value = attention(*tensors, key_lengths=torch.tensor([0, 4, 1]))
    gradients = torch.autograd.grad(value.square().sum(), tensors)
    assert not value[0].any()
    assert all(not gradient[0].any() and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("carried", "products"),
    [((0, 0, 0), 2), ((0, 0, 1), 3), ((1, 0, 0), 4), ((0, 1, 0), 4), ((1, 1, 0), 5), ((1, 1, 1), 6)],
)
def test_work_for_absent_tangents_is_skipped(carried: tuple[int, ...], products: int) -> None:
    """Counted in matrix products of size N × M × D: QKᵀ and PV, PV̇, Q̇Kᵀ, QK̇ᵀ and ṖV."""
    tensors = draw(5, 7)
    with FlopCounterMode(display=False) as counter:
        attention(*carry(tensors, tuple(map(bool, carried))), backend="reference")
    assert counter.get_total_flops() == products * (2 * 3 * 2 * 5 * 7 * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_half_precision_is_rounded_once(dtype: torch.dtype, mask: dict[str, Any]) -> None:
    half = [x.to(dtype) for x in draw(6, 4)]
    result = attention(*carry(half, (True,) * 3), **options(mask))
    expected = expected_parts([x.double() for x in half], (True,) * 3, mask)
    for actual, exact in zip(result, expected, strict=True):
        assert actual is not None
        assert actual.dtype == dtype
        # Rounding to nearest is wrong by half a unit in the last place, ε/2; float32 before it by 1e-6 or so.
        torch.testing.assert_close(
            actual.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny + 1e-6
        )


def test_views_of_a_packed_projection() -> None:
    """q, k, v of one (B, N, 3, H, D) tensor, and gradients that find their way back into it."""
    packed = torch.randn(
        2, 5, 3, 2, 4, generator=generator(0, "packed"), dtype=torch.float64, requires_grad=True
    )
    tangent = torch.randn(2, 5, 3, 2, 4, generator=generator(1, "packed"), dtype=torch.float64)

    def gradient(prepare: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        views = [prepare(x[:, :, i].transpose(1, 2)) for x in (packed, tangent) for i in range(3)]
        result = attention(*carry(views, (True,) * 3), causal=True)
        assert result.tangent is not None
        loss = result.value.square().sum() + result.tangent.square().sum()
        return result.value, result.tangent, *torch.autograd.grad(loss, packed)

    for strided, contiguous in zip(gradient(lambda x: x), gradient(torch.Tensor.contiguous), strict=True):
        torch.testing.assert_close(strided, contiguous, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    """|S| up to 1e4: e^S overflows every precision; the differences within a row decide."""
    tensors = draw(6, 4)
    largest = (tensors[0] @ tensors[1].mT / 2).abs().max()
    tensors[0] = tensors[0] * (1e4 / largest)
    given = [x.to(dtype).requires_grad_() for x in tensors]
    result = attention(*carry(given, (True,) * 3), key_lengths=torch.tensor([4, 0, 2]))
    gradients = torch.autograd.grad([part.sum() for part in result if part is not None], given)
    assert all(x.isfinite().all() for x in (*result, *gradients) if x is not None)
    value, _ = expected_parts([x.detach().double() for x in given], (True,) * 3, {"key_lengths": [4, 0, 2]})
    # Scores near 1e4 have errors near 1e4 · 6e-8 in float32, and so has the softmax.
    assert relative_error(result.value.double(), value) < 2e-3 + torch.finfo(dtype).eps


@pytest.mark.parametrize("carried", CARRIED, ids=lambda x: "".join(".T"[has] for has in x))
def test_a_dual_in_gives_a_dual_out(carried: tuple[bool, ...]) -> None:
    """Tensors and Duals mix; the tangent is None if none carries one."""
    tensors = draw(3, 4)
    duals = carry(tensors, carried)
    mixed = [x if x.tangent is not None else x.value for x in duals]
    result, expected = attention(*mixed), attention(*duals)
    if any(carried):
        assert isinstance(result, Dual)
        assert torch.equal(result.value, expected.value)
        assert torch.equal(result.tangent, expected.tangent)
    else:
        assert isinstance(result, Tensor)
        assert isinstance(expected, Dual)
        assert expected.tangent is None
        assert torch.equal(result, expected.value)


def test_scale() -> None:
    tensors = draw(3, 4)
    result = attention(*carry(tensors, (True,) * 3), scale=-0.7)
    # α Q Kᵀ with D = 4 and the default α = 1/2.
    scaled = [x * (-1.4 if i in (0, 3) else 1) for i, x in enumerate(tensors)]
    expected = expected_parts(scaled, (True,) * 3, {})
    torch.testing.assert_close(result.value, expected[0], **EXACT)
    torch.testing.assert_close(result.tangent, expected[1], **EXACT)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_of_zero_or_less_without_tangents(scale: float) -> None:
    """PyTorch's fused attention gives NaN here if it is causal."""
    tensors = draw(3, 4)[:3]
    result = attention(*tensors, scale=scale, causal=True)
    expected = attention_reference(*map(Dual, tensors), scale=scale, causal=True).value
    torch.testing.assert_close(result, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_key_lengths_of_any_integers(dtype: torch.dtype) -> None:
    tensors = draw(3, 4)
    lengths = torch.tensor([1, 0, 3])
    expected = attention(*carry(tensors, (True,) * 3), key_lengths=lengths)
    result = attention(*carry(tensors, (True,) * 3), key_lengths=lengths.to(dtype))
    assert torch.equal(result.value, expected.value)
    assert torch.equal(result.tangent, expected.tangent)


# Autocast.


def test_autocast_casts_all_but_float64() -> None:
    tensors = draw(3, 4)
    single = [x.float() for x in tensors]
    single[1] = single[1].half()  # PyTorch's own attention unites mixed inputs under autocast, too
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(*carry(single, (True,) * 3))
        untouched = attention(*carry(tensors, (True,) * 3))
        plain = attention(*single[:3])
    expected = attention(*carry([x.bfloat16() for x in single], (True,) * 3))
    assert result.tangent is not None
    assert result.value.dtype == result.tangent.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(result.value, expected.value)
    assert torch.equal(result.tangent, expected.tangent)
    assert untouched.value.dtype == torch.float64
    torch.testing.assert_close(untouched.tangent, expected_parts(tensors, (True,) * 3, {})[1], **EXACT)


def test_gradients_through_autocast_arrive_in_the_precision_of_the_inputs() -> None:
    tensors = [x.float().requires_grad_() for x in draw(3, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(*carry(tensors, (True,) * 3))
    assert result.tangent is not None
    gradients = torch.autograd.grad(result.value.sum() + result.tangent.sum(), tensors)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = attention(*carry(exact, (True,) * 3))
    assert expected.tangent is not None
    for gradient, right in zip(
        gradients, torch.autograd.grad(expected.value.sum() + expected.tangent.sum(), exact), strict=True
    ):
        assert gradient.dtype == torch.float32
        # bfloat16 keeps 8 bits: 0.4 % a rounding, of the inputs, the outputs and the gradients.
        assert relative_error(gradient.double(), right) < 0.02


# Compilation.


@pytest.mark.parametrize("mask", MASKS)
def test_compiled_without_graph_breaks_equals_eager(mask: dict[str, Any]) -> None:
    tensors = [x.requires_grad_() for x in draw(6, 4)]

    def step(*x: Tensor) -> tuple[Tensor, ...]:
        result = attention(*carry(x, (True, False, True)), **options(mask))
        assert result.tangent is not None
        return result.value, result.tangent, attention(x[0], x[1], x[2], **options(mask))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*tensors), step(*tensors), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)
    used = [x for i, x in enumerate(tensors) if i != 4]  # k carries no tangent
    for actual, expected in zip(
        *[torch.autograd.grad(sum(x.square().sum() for x in f(*tensors)), used) for f in (compiled, step)],  # type: ignore[arg-type]
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_compiled_key_lengths_are_checked_when_the_graph_runs() -> None:
    tensors = draw(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda lengths: attention(*tensors[:3], key_lengths=lengths), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.tensor([4, 0, 2])).isfinite().all()
    with pytest.raises(RuntimeError, match="key_lengths: 0 to 4"):
        compiled(torch.tensor([4, 0, 5]))


def test_a_scale_that_changes_does_not_break_the_graph() -> None:
    """From the second value on the compiler keeps it symbolic."""
    tensors = draw(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda scale: attention(*carry(tensors, (True,) * 3), scale=scale), fullgraph=True, backend="eager"
    )
    for scale in (0.3, 0.5, 0.7):
        expected = attention(*carry(tensors, (True,) * 3), scale=scale)
        torch.testing.assert_close(compiled(scale).tangent, expected.tangent, **EXACT)


# Transforms of reverse mode and batching.


# PyTorch has no batching rule for its fused attention on a CPU and goes through the samples, with a warning.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mask", MASKS[:2])
def test_grad_and_vmap(mask: dict[str, Any]) -> None:
    tensors = draw(3, 4)

    def loss(*x: Tensor) -> Tensor:
        result = attention(*carry(x, (True,) * 3), **mask)
        assert result.tangent is not None
        return (attention(*x[:3], **mask) * result.value * result.tangent).sum()

    arguments = tuple(range(6))
    given = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*given), given)
    for actual, right in zip(torch.func.grad(loss, arguments)(*tensors), expected, strict=True):
        torch.testing.assert_close(actual, right, **EXACT)
    batched = torch.func.vmap(loss)(*[torch.stack([x, 2 * x]) for x in tensors])
    torch.testing.assert_close(
        batched, torch.stack([loss(*tensors), loss(*[2 * x for x in tensors])]), **EXACT
    )


# Backends.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of the Triton operators: notes what it is asked, answers by the reference."""
    state = SimpleNamespace(obstacle=None, calls=[])

    def attention_triton(
        q: Dual, k: Dual, v: Dual, *, scale: float, causal: bool, key_lengths: Tensor | None
    ) -> Dual:
        state.calls.append((scale, causal, key_lengths))
        return attention_reference(q, k, v, scale=scale, causal=causal, key_lengths=key_lengths)

    state.attention_triton = attention_triton
    state.unusable = lambda device, dtype: state.obstacle
    monkeypatch.setitem(sys.modules, "tvmatch.attention.operators", state)
    return state


def test_auto_on_a_cpu_asks_for_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvmatch.attention.operators", None)  # its import would fail
    tensors = [x.float() for x in draw(3, 4)]
    attention(*carry(tensors, (True,) * 3))
    attention(*tensors[:3], key_lengths=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_auto_without_tangents_is_the_fused_attention_of_pytorch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        "tvmatch.attention.dispatch.pytorch_attention",
        lambda *x, **given: calls.append(given) or fused(*x, **given),
    )
    tensors = [x.to(dtype) for x in draw(6, 4)]
    attention(*tensors[:3], causal=True)
    attention(*map(Dual, tensors[:3]))
    assert calls == [{"scale": 0.5, "is_causal": True}, {"scale": 0.5, "is_causal": False}]
    attention(*tensors[:3], backend="reference")
    attention(*tensors[:3], key_lengths=torch.tensor([1, 2, 3]))
    attention(Dual(*tensors[::3]), *tensors[1:3])
    assert len(calls) == 2


def test_forced_triton_runs_the_kernels(kernels: SimpleNamespace) -> None:
    tensors = [x.float() for x in draw(3, 4)]
    lengths = torch.tensor([1, 2, 3])
    assert isinstance(attention(*tensors[:3], backend="triton"), Tensor)
    attention(*carry(tensors, (True,) * 3), backend="triton", scale=2, causal=True, key_lengths=lengths)
    assert kernels.calls == [(0.5, False, None), (2.0, True, lengths)]


@pytest.mark.parametrize("carried", [(False,) * 3, (True,) * 3])
def test_forced_triton_that_cannot_run(kernels: SimpleNamespace, carried: tuple[bool, ...]) -> None:
    tensors = draw(3, 4)
    with pytest.raises(TypeError, match=r'backend: "triton" has no float64, got torch\.float64'):
        attention(*carry(tensors, carried), backend="triton")
    kernels.obstacle = "there is no CUDA device"
    with pytest.raises(RuntimeError, match=r'backend: "triton" cannot run here: there is no CUDA device'):
        attention(*carry([x.float() for x in tensors], carried), backend="triton")
    assert not kernels.calls


def test_forced_triton_inside_a_transform_it_cannot_follow(kernels: SimpleNamespace) -> None:
    q, k, v = (x.float() for x in draw(3, 4)[:3])
    with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func other than jvp"):
        torch.func.grad(lambda x: attention(x, k, v, backend="triton").sum())(q)


@pytest.mark.parametrize(
    ("dtype", "obstacle", "expected"),
    [(torch.bfloat16, None, True), (torch.bfloat16, "too old", False), (torch.float64, None, False)],
)
def test_auto_on_a_gpu_takes_the_kernels_where_they_can_run(
    kernels: SimpleNamespace, dtype: torch.dtype, obstacle: str | None, expected: bool
) -> None:
    """Tensors without memory that say they are on a GPU: which route is taken, and shapes."""
    kernels.obstacle = obstacle
    with FakeTensorMode():
        tensors = [torch.empty(2, 3, 5, 8, dtype=dtype, device="cuda") for _ in range(6)]
        result = attention(*carry(tensors, (False, True, False)))
        assert result.tangent is not None
        assert result.tangent.shape == (2, 3, 5, 8)
        assert result.tangent.device.type == "cuda"
    assert len(kernels.calls) == expected


# Bad input.


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = zeros(2, 3, 4, 8)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"k": [1.0]}, TypeError, r"k: a tensor is needed, got list"),
    "no tensor in a Dual": ({"v": Dual(GOOD, 0.0)}, TypeError, r"v\.tangent: a tensor is needed, got float"),  # type: ignore[arg-type]
    "integers": ({"q": GOOD.long()}, TypeError, r"q: a floating-point dtype is needed, .*got torch\.int64"),
    "complex": (
        {"k": GOOD.to(torch.complex64)},
        TypeError,
        r"k: a floating-point dtype is needed, .*got torch\.complex64",
    ),
    "three dimensions": (
        {"q": zeros(3, 4, 8)},
        ValueError,
        r"q: four dimensions .* are needed, got shape \(3, 4, 8\)",
    ),
    "dtype of k": ({"k": GOOD.half()}, TypeError, r"k: the dtype of q, torch\.float32, .*got torch\.float16"),
    "dtype of v": ({"v": GOOD.double()}, TypeError, r"v: the dtype of q, torch\.float32, .*torch\.float64"),
    "dtype of a tangent": (
        {"q": Dual(GOOD, GOOD.double())},
        TypeError,
        r"q\.tangent: the dtype of q\.value, torch\.float32, is needed, got torch\.float64",
    ),
    "device of k": ({"k": zeros(2, 3, 4, 8, device="meta")}, ValueError, r"k: .*q, cpu, .*got meta"),
    "device of v": ({"v": zeros(2, 3, 4, 8, device="meta")}, ValueError, r"v: .*q, cpu, .*got meta"),
    "device of a tangent": (
        {"v": Dual(GOOD, zeros(2, 3, 4, 8, device="meta"))},
        ValueError,
        r"v\.tangent: the device of v\.value, cpu, is needed, got meta",
    ),
    "batch": ({"k": zeros(1, 3, 4, 8)}, ValueError, r"k: .*q, \(2, 3, 4, 8\), are .*got \(1, 3, 4, 8\)"),
    "heads": ({"k": zeros(2, 1, 4, 8)}, ValueError, r"k: .*q, \(2, 3, 4, 8\), are .*got \(2, 1, 4, 8\)"),
    "width": ({"k": zeros(2, 3, 4, 9)}, ValueError, r"k: .*q, \(2, 3, 4, 8\), are .*got \(2, 3, 4, 9\)"),
    "length of v": ({"v": zeros(2, 3, 5, 8)}, ValueError, r"v: .*k, \(2, 3, 4, 8\), .*got \(2, 3, 5, 8\)"),
    "shape of a tangent": (
        {"k": Dual(GOOD, zeros(2, 3, 4, 1))},
        ValueError,
        r"k\.tangent: the shape of k\.value, \(2, 3, 4, 8\), is needed, got \(2, 3, 4, 1\)",
    ),
    "wide heads": (
        dict.fromkeys("qkv", zeros(1, 1, 2, 257)),
        ValueError,
        r"q: a head width of 1 to 256 is needed, got 257",
    ),
    "empty heads": (
        dict.fromkeys("qkv", zeros(1, 1, 2, 0)),
        ValueError,
        r"q: a head width of 1 to 256 .*got 0",
    ),
    "no queries": ({"q": zeros(2, 3, 0, 8)}, ValueError, r"q: at least 1 position is needed, got 0"),
    "no keys": ({"k": zeros(2, 3, 0, 8)}, ValueError, r"k: at least 1 position is needed, got 0"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        r"backend: one of auto, reference, triton is needed, got 'cuda'",
    ),
    "scale of a tensor": ({"scale": torch.ones(())}, TypeError, r"scale: a number is needed, got Tensor"),
    "scale in words": ({"scale": "a"}, TypeError, r"scale: a number is needed, got str"),
    "causal": ({"causal": 1}, TypeError, r"causal: True or False is needed, got 1"),
    "eight bits": (
        dict.fromkeys("qkv", zeros(2, 3, 4, 8).to(torch.float8_e4m3fn)),
        TypeError,
        r"q: a floating-point dtype is needed, .*got torch\.float8_e4m3fn",
    ),
    "scale": ({"scale": math.nan}, ValueError, r"scale: a finite number is needed, got nan"),
    "infinite scale": ({"scale": -math.inf}, ValueError, r"scale: a finite number is needed, got -inf"),
    "lengths of a list": ({"key_lengths": [4, 4]}, TypeError, r"key_lengths: a tensor is needed, got list"),
    "lengths of floats": (
        {"key_lengths": zeros(2)},
        TypeError,
        r"key_lengths: an integer dtype is needed, got torch\.float32",
    ),
    "lengths of truths": (
        {"key_lengths": torch.ones(2, dtype=torch.bool)},
        TypeError,
        r"key_lengths: an integer dtype is needed, got torch\.bool",
    ),
    "too many lengths": (
        {"key_lengths": torch.tensor([4, 4, 4])},
        ValueError,
        r"key_lengths: shape \(2,\), the batch of q, is needed, got \(3,\)",
    ),
    "lengths elsewhere": (
        {"key_lengths": torch.ones(2, dtype=torch.int64, device="meta")},
        ValueError,
        r"key_lengths: the device of q, cpu, is needed, got meta",
    ),
    "too long": (
        {"key_lengths": torch.tensor([2, 5])},
        ValueError,
        r"key_lengths: 0 to 4, the number of keys, is needed, got 2 to 5",
    ),
    "negative": (
        {"key_lengths": torch.tensor([-1, 3], dtype=torch.int8)},
        ValueError,
        r"key_lengths: 0 to 4, the number of keys, is needed, got -1 to 3",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(
    given: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    arguments = dict.fromkeys("qkv", GOOD) | {"backend": backend} | given
    with pytest.raises(error, match=message):
        attention(**arguments)


def test_the_largest_head_and_the_full_range_of_lengths_are_accepted() -> None:
    wide = zeros(2, 1, 2, 256)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        attention(wide, wide, wide, key_lengths=torch.tensor([0, 2], dtype=dtype))
