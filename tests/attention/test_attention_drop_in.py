"""PyTorch's call of attention in forward mode, in every form, eager and compiled.

Without a GPU the fused kernels run in Triton's interpreter, where a test asks for them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from forward_mode_tools import (
    DEVICE,
    DOUBLE,
    SEEN,
    SEES_TANGENTS,
    SINGLE,
    compiler,
    derivatives,
    force_kernels,
    through_level,
)
from helpers import jvp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tvmatch.attention import drop_in, repair_forward_mode, scaled_dot_product_attention, sdpa
from tvmatch.seeds import generator


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> None:
    torch._dynamo.reset()


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By exponentials, which float64 has room for; a query without keys gives zero."""
    assert dropout_p == 0
    if enable_gqa:
        key = torch.cat([key[..., [h * key.shape[-3] // query.shape[-3]], :, :] for h in heads(query)], -3)
        value = torch.cat(
            [value[..., [h * value.shape[-3] // query.shape[-3]], :, :] for h in heads(query)], -3
        )
    scores = torch.einsum("...nd,...md->...nm", query, key)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = scores.exp()
    if is_causal:
        rows, columns = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
        weights = weights * (columns <= rows).to(scores)
    if attn_mask is not None:
        weights = weights * (attn_mask.to(scores) if attn_mask.dtype == torch.bool else attn_mask.exp())
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("...nm,...me->...ne", weights / (total + (total == 0)), value)


def heads(query: Tensor) -> range:
    return range(query.shape[-3])


class Call(NamedTuple):
    """One form of the call."""

    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    mask_shape: tuple[int, ...] = ()
    mask: str = "none"
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.enable_gqa}

    def draw(
        self, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> tuple[list[Tensor], list[Tensor]]:
        """query, key, value, the mask if it is added, and their tangents."""
        draws = generator(0, "drop-in")
        shapes = [*self.shapes, *([self.mask_shape] if self.mask in ("added", "added -inf") else [])]
        values, tangents = (
            [torch.randn(s, generator=draws, dtype=torch.float64) for s in shapes] for _ in "12"
        )
        if self.mask == "added -inf":
            values[3].masked_fill_(torch.rand(self.mask_shape, generator=draws) < 0.5, -math.inf)
        return [x.to(device, dtype) for x in values], [x.to(device, dtype) for x in tangents]

    def function(self, attend: Callable[..., Tensor], device: str = "cpu") -> Callable[..., Tensor]:
        """Of query, key, value and the mask if it is added."""
        if self.mask != "boolean":
            return partial(attend, **self.options)
        mask = (torch.rand(self.mask_shape, generator=generator(1, "drop-in")) < 0.5).to(device)
        return partial(attend, attn_mask=mask, **self.options)


def assert_right(
    call: Call, dtype: torch.dtype = torch.float64, device: str = "cpu", **tolerance: float
) -> None:
    actual = derivatives(call.function(scaled_dot_product_attention, device), *call.draw(dtype, device))
    assert {x.dtype for x in actual} == {dtype}
    exact = [[x.double().cpu() for x in part] for part in call.draw(dtype)]
    expected = derivatives(call.function(oracle), *exact)
    for part, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(part.cpu(), right, check_dtype=False, **(tolerance or DOUBLE))


# Each form of the call, in forward mode and in reverse mode through it.


@st.composite
def calls(draw: st.DrawFn) -> Call:
    batch = draw(st.lists(st.integers(1, 3), max_size=3))
    queries, keys, head_dim = (draw(st.integers(1, 5)) for _ in range(3))
    value_dim = draw(st.sampled_from([head_dim, head_dim + 2]))
    groups = draw(st.integers(1, 2)) if batch else 1
    broken = [size if draw(st.booleans()) else 1 for size in batch]  # for key and value to broadcast
    query_batch = [*batch[:-1], batch[-1] * groups] if batch else []
    key_batch = broken if groups == 1 else batch
    full = [*query_batch, queries, keys]
    mask_shape = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, len(batch))) :]
    return Call(
        shapes=(
            (*query_batch, queries, head_dim),
            (*key_batch, keys, head_dim),
            (*key_batch, keys, value_dim),
        ),
        mask_shape=tuple(mask_shape),
        mask=draw(st.sampled_from(["none", "none", "boolean", "added", "added -inf"])),
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.7])),
        enable_gqa=groups > 1 or (bool(batch) and draw(st.booleans()) and key_batch == query_batch),
    )


SELF = ((2, 2, 3, 4),) * 3
CROSS = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4))


@given(calls())
@example(Call(((3, 4),) * 3))
@example(Call(((0, 2, 3, 4),) * 3))
@example(Call(((2, 2, 0, 4), *CROSS[1:])))
@example(Call((CROSS[0], (2, 2, 0, 4), (2, 2, 0, 4)), (3, 1), "boolean"))
@example(Call(((2, 2, 3, 300),) * 3))
@example(Call(((4, 3, 2), (2, 5, 2), (1, 5, 6)), enable_gqa=True))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_value_tangent_and_gradients(call: Call) -> None:
    assert_right(call)


@pytest.mark.parametrize("mask", ["none", "boolean", "added -inf"])
def test_a_level_of_ones_own(mask: str) -> None:
    """`forward_ad.dual_level` as `torch.func.jvp`."""
    call = Call(CROSS, (3, 5), mask)
    values, tangents = call.draw()
    actual = through_level(call.function(scaled_dot_product_attention), values, tangents)
    expected = jvp(call.function(oracle), tuple(values), tuple(tangents))
    torch.testing.assert_close(actual, expected, **DOUBLE)


@pytest.mark.parametrize("moving", range(4))
def test_one_input_moves_and_the_others_do_not(moving: int) -> None:
    values, tangents = Call(CROSS, (2, 1, 3, 5), "added").draw()
    fixed = [[*values[:moving], None, *values[moving + 1 :]]]

    def run(attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        def of_one(x: Tensor) -> Tensor:
            return attend(*[x if y is None else y for y in fixed[0]])

        return jvp(of_one, (values[moving],), (tangents[moving],))

    torch.testing.assert_close(run(scaled_dot_product_attention), run(oracle), **DOUBLE)


NESTED: dict[str, Callable[..., Any]] = {
    "jacfwd": lambda f, x, d: torch.func.jacfwd(f, tuple(range(len(x))))(*x),
    "hessian": lambda f, x, d: torch.func.hessian(lambda *y: f(*y).sin().sum(), (0, 2))(*x),
    "grad of jvp": lambda f, x, d: torch.func.grad(lambda *y: jvp(f, y, tuple(d))[1].sin().sum(), (0, 1, 2))(
        *x
    ),
    "jvp of vmap": lambda f, x, d: jvp(
        torch.func.vmap(f), tuple(torch.stack([y, 2 * y]) for y in x), tuple(torch.stack([y, -y]) for y in d)
    ),
}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("mask", ["none", "boolean", "added"])
def test_nested_transforms(mask: str, nested: Callable[..., Any]) -> None:
    call = Call(((2, 3, 2), (2, 4, 2), (2, 4, 2)), (2, 3, 1), mask)
    inputs = call.draw()
    actual = nested(call.function(scaled_dot_product_attention), *inputs)
    torch.testing.assert_close(actual, nested(call.function(oracle), *inputs), **DOUBLE)


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_queries_that_see_no_key(kind: str) -> None:
    """Zero value and tangent, and zero instead of NaN in all gradients."""
    (query, key, value), tangents = Call(CROSS).draw()
    seen = torch.tensor([True, False, True])[:, None].expand(3, 5)
    mask = seen if kind == "boolean" else torch.zeros(3, 5).double().masked_fill(~seen, -math.inf)
    attend = partial(scaled_dot_product_attention, attn_mask=mask)
    with torch.autograd.set_detect_anomaly(True):  # nor NaN on the way
        output, tangent, *gradients = derivatives(attend, [query, key, value], tangents)
    assert not output[:, :, 1].any()
    assert not tangent[:, :, 1].any()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.any()
    assert not gradients[0][:, :, 1].any()


def test_dropout_drops_the_same_of_value_and_tangent() -> None:
    """With the identity as values, the output shows the softmax and what was dropped of it."""
    (query, key, _), (direction, *_) = Call(CROSS).draw()
    identity = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)
    torch.manual_seed(0)
    value, tangent, *gradients = derivatives(
        lambda q: scaled_dot_product_attention(q, key, identity, dropout_p=0.4), [query], [direction]
    )
    kept = value != 0
    assert 0.3 < kept.double().mean() < 0.9  # 60 entries kept with probability 0.6: ± 5 standard deviations
    expected = derivatives(lambda q: oracle(q, key, identity) * kept / 0.6, [query], [direction])
    torch.testing.assert_close((value, tangent, *gradients), expected, **DOUBLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "added"])
def test_half_precision(mask: str, dtype: torch.dtype) -> None:
    """Computed in float32; the gradient of rounded numbers goes through them once more."""
    # Value, tangent and the loss made of them are rounded; gradients of order 1 are sums of ten such.
    assert_right(Call(CROSS, (3, 5), mask), dtype, rtol=0, atol=40 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("mask", ["none", "added"])
def test_autocast(mask: str) -> None:
    """As PyTorch's own: computed from rounded inputs, and float64 is left alone."""
    call = Call(CROSS, (3, 5), mask)
    values, tangents = (tuple(part) for part in call.draw(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*values).dtype == torch.bfloat16
        actual = jvp(call.function(scaled_dot_product_attention), values, tangents)
        exact = jvp(call.function(scaled_dot_product_attention), *map(tuple, call.draw()))
    rounded = [tuple(x.bfloat16().double() for x in part[:3]) for part in (values, tangents)]
    added = [tuple(x.double() for x in part[3:]) for part in (values, tangents)]  # the mask is not rounded
    expected = jvp(call.function(oracle), rounded[0] + added[0], rounded[1] + added[1])
    for part, right in zip(actual, expected, strict=True):
        assert part.dtype == torch.bfloat16
        # Rounded once; the values' tangent is of order 4.
        torch.testing.assert_close(part.double(), right, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)
    torch.testing.assert_close(exact, jvp(call.function(oracle), *map(tuple, call.draw())), **DOUBLE)


# The kernels behind it.

FUSED = [
    Call(((3, 4),) * 3),
    Call(((2, 3, 4), (2, 5, 4), (2, 5, 4)), scale=0.7),
    Call(CROSS, is_causal=True),
    Call(((2, 1, 2, 3, 4), (2, 1, 5, 4), (1, 1, 5, 4))),  # by broadcasting
    Call(((2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)), enable_gqa=True),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return force_kernels(monkeypatch)


@pytest.mark.parametrize("call", FUSED, ids=lambda call: f"{call.shapes[0]}")
def test_kernels(call: Call, launches: list[str]) -> None:
    assert_right(call, torch.float32, DEVICE, **SINGLE)
    assert launches == ["forward", "backward"]


UNFUSED = [Call(CROSS, (3, 5), "boolean"), Call((*CROSS[:2], (2, 2, 5, 6))), Call(((1, 1, 2, 300),) * 3)]


@pytest.mark.parametrize("call", UNFUSED, ids=["mask", "width of the values", "wide heads"])
def test_plain_operators_where_there_is_no_kernel(call: Call, launches: list[str]) -> None:
    assert_right(call, torch.float32, DEVICE, **SINGLE)
    assert launches == []


# Outside forward mode.


def test_the_call_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(drop_in, "pytorch_attention", lambda *x, **y: seen.append((x, y)))
    scaled_dot_product_attention("q", "k", "v", "m", 0.1, True, scale=2.0, enable_gqa=True)  # type: ignore[arg-type]
    scaled_dot_product_attention(query="q", key="k", value="v")  # type: ignore[arg-type]
    assert seen == [
        (("q", "k", "v", "m", 0.1, True), {"scale": 2.0, "enable_gqa": True}),
        (("q", "k", "v", None, 0.0, False), {"scale": None, "enable_gqa": False}),
    ]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["eager", "one graph"])
def test_outside_forward_mode_it_is_pytorch(mode: str, dropout_p: float) -> None:
    def run(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        if mode == "one graph":
            attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
        inputs = [x.requires_grad_() for x in Call(CROSS).draw(torch.float32)[0]]
        torch.manual_seed(0)
        output = attend(*inputs, dropout_p=dropout_p)
        return output, *torch.autograd.grad(output.sin().sum(), inputs)

    for part, own in zip(run(scaled_dot_product_attention), run(F.scaled_dot_product_attention), strict=True):
        assert torch.equal(part, own)


# What it refuses.


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((4,),) * 3, {}, ValueError, r"query: at least 2 dimensions are needed, got shape \(4,\)"),
        ((SELF[0], (2, 2, 3, 5), SELF[0]), {}, ValueError, "key: the width of query, 4, is needed, got 5"),
        ((SELF[0], SELF[0], (2, 2, 2, 4)), {}, ValueError, "value: the length of key, 3, is needed, got 2"),
        ((SELF[0], (3, 2, 3, 4), (3, 2, 3, 4)), {}, ValueError, r"do not broadcast: .*\(3, 2, 3, 4\)"),
        (
            ((1, 3, 3, 4), *SELF[1:]),
            {"enable_gqa": True},
            ValueError,
            r"key: with enable_gqa.*\(1, 3, 3, 4\)",
        ),
        (((3, 4),) * 3, {"enable_gqa": True}, ValueError, r"key: with enable_gqa.*\(3, 4\)"),
        (SELF, {"attn_mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"attn_mask: .*\(3, 4\)"),
        (
            SELF,
            {"attn_mask": torch.ones(2, 1, 1, 3, 3)},
            ValueError,
            r"attn_mask: .*\(2, 2, 3, 3\).*\(2, 1, 1",
        ),
        (SELF, {"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "attn_mask: .*got torch.int64"),
        (SELF, {"scale": math.inf}, ValueError, "scale: a finite number is needed, got inf"),
        (SELF, {"dropout_p": 1.5}, ValueError, "dropout probability.*1.5"),
    ],
)
def test_refusals(shapes: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = tuple(torch.randn(shape) for shape in shapes)
    with pytest.raises(error, match=message):
        jvp(partial(scaled_dot_product_attention, **options), inputs, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_refused_precisions(dropout_p: float) -> None:
    x = torch.randn(SELF[0])
    for key, message in (
        (x.double(), "key: .*torch.float32.*torch.float64"),
        (x.long(), "key: .*torch.int64"),
    ):
        with pytest.raises(TypeError, match=message):
            jvp(lambda q, key=key: scaled_dot_product_attention(q, key, key, dropout_p=dropout_p), (x,), (x,))


# Under `torch.compile`: right, or an error; never a wrong tangent.


COMPILED = {
    "no mask": Call(
        ((2, 3, 4), (2, 5, 4), (2, 5, 4))
    ),  # of three dimensions: what brings them to four counts
    "mask": Call(CROSS, (3, 5), "boolean"),
    "added": Call(CROSS, (3, 5), "added -inf", is_causal=True),
}


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "by its own name"])
@pytest.mark.parametrize("name", COMPILED)
def test_the_transform_within_the_compiled_function(name: str, replaced: bool) -> None:
    """Plain operators are traced, gradients included."""
    call = COMPILED[name]
    by_own_name = call.function(scaled_dot_product_attention)
    by_pytorchs_name = call.function(lambda *x, **options: F.scaled_dot_product_attention(*x, **options))

    def run(*inputs: Tensor) -> Any:
        half = len(inputs) // 2
        if not replaced:
            return jvp(by_own_name, inputs[:half], inputs[half:])
        with repair_forward_mode():
            return jvp(by_pytorchs_name, inputs[:half], inputs[half:])

    def gradients(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        value, tangent = function(*inputs)
        return value, tangent, *torch.autograd.grad((value * tangent).sin().sum(), inputs)

    values, tangents = call.draw()
    inputs = [x.requires_grad_() for x in [*values, *tangents]]
    actual = gradients(compiler(run, fullgraph=True), inputs)
    half = len(values)
    expected = gradients(lambda *x: jvp(call.function(oracle), x[:half], x[half:]), inputs)
    torch.testing.assert_close(actual, expected, **DOUBLE)


@pytest.mark.parametrize("name", COMPILED)
def test_the_transform_around_the_compiled_function(name: str) -> None:
    """The compiler cannot see the tangents: eager execution, or an error, also for code compiled before."""
    call = COMPILED[name]
    values, tangents = call.draw()
    attend = call.function(scaled_dot_product_attention)
    expected = jvp(call.function(oracle), tuple(values), tuple(tangents))
    compiled = compiler(lambda *x: attend(*x))
    as_one_graph = compiler(lambda *x: attend(*x), fullgraph=True)
    for _ in range(2):
        if call.is_causal and SEES_TANGENTS:  # 2.14 refuses a mask as well, in plain calls that it compiles
            with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
                as_one_graph(*values)
        else:
            torch.testing.assert_close(as_one_graph(*values), expected[0], **DOUBLE)
            torch.testing.assert_close(compiled(*values), expected[0], **DOUBLE)
        torch.testing.assert_close(through_level(compiled, values, tangents), expected, **DOUBLE)
        torch.testing.assert_close(jvp(compiled, tuple(values), tuple(tangents)), expected, **DOUBLE)
    refusal = SEEN if SEES_TANGENTS else r"scaled_dot_product_attention inside a forward-mode transform"
    with pytest.raises(RuntimeError, match=refusal):
        through_level(as_one_graph, values, tangents)


@pytest.mark.parametrize("where", ["around", "within"])
def test_compiled_kernels(where: str, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds on a GPU: its operators are no plain ones, and left to eager execution or refused."""
    real = sdpa._can_be_traced
    monkeypatch.setattr(sdpa, "_can_be_traced", lambda *x: x[3] is not None and real(*x))
    call = COMPILED["no mask"]
    values, tangents = call.draw(torch.float32)
    attend = call.function(scaled_dot_product_attention)

    def within(function: Callable[..., Any], **options: Any) -> Any:
        compiled = compiler(lambda values, tangents: jvp(function, values, tangents), **options)
        return compiled(tuple(values), tuple(tangents))

    def around(function: Callable[..., Any], **options: Any) -> Any:
        return through_level(compiler(function, **options), values, tangents)

    run = within if where == "within" else around
    actual = run(attend)
    assert launches == ["forward"]
    exact = [tuple(x.double() for x in part) for part in (values, tangents)]
    torch.testing.assert_close(actual, jvp(call.function(oracle), *exact), check_dtype=False, **SINGLE)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"scaled_dot_product_attention inside a forward-mode transform"):
        run(attend, fullgraph=True)


def test_compiled_dropout_drops_the_same_of_value_and_tangent() -> None:
    (query, key, _), (direction, *_) = Call(CROSS).draw()
    identity = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)

    def attend(q: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, key, identity, dropout_p=0.4)

    value, tangent = compiler(lambda x, d: jvp(attend, (x,), (d,)), fullgraph=True)(query, direction)
    kept = value != 0
    assert 0.3 < kept.double().mean() < 0.9
    expected = jvp(lambda q: oracle(q, key, identity) * kept / 0.6, (query,), (direction,))
    torch.testing.assert_close((value, tangent), expected, **DOUBLE)
