"""The context that replaces PyTorch's functions: what it puts where, and unmodified models within it.

Without a GPU the fused kernels run in Triton's interpreter, where a test asks for them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forward_mode_tools import DEVICE, DOUBLE, compiler, derivatives, force_kernels
from helpers import central_difference, jvp, randomize_, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad

from tvmatch.attention import attention, repair_forward_mode, scaled_dot_product_attention
from tvmatch.dual import Dual
from tvmatch.models import JVPNetwork
from tvmatch.seeds import generator


def is_pytorch() -> bool:
    """Whether PyTorch's functions are where it put them."""
    functions = [F.layer_norm, F.batch_norm, F.instance_norm, torch.backends.mha.get_fastpath_enabled]
    own = F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    return own and all(function.__module__.startswith("torch.") for function in functions)


@pytest.fixture(autouse=True)
def _nothing_is_left_replaced() -> Iterator[None]:
    """Neither by the import of the package, nor by any test here."""
    torch._dynamo.reset()
    assert is_pytorch()
    yield
    assert is_pytorch()


# What is where.


def test_import_replaces_nothing() -> None:
    assert is_pytorch()
    with repair_forward_mode():
        assert not is_pytorch()


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def test_calls_through_pytorchs_name_are_reached_inside_only() -> None:
    draws = generator(0, "replacement")
    inputs = tuple(torch.randn(2, 2, 3, 4, generator=draws, dtype=torch.float64) for _ in range(3))

    def run() -> Any:
        return jvp(lambda *x: F.scaled_dot_product_attention(*x), inputs, inputs)

    with pytest.raises(NotImplementedError):
        run()
    with repair_forward_mode():
        actual = run()
    torch.testing.assert_close(actual, jvp(plain_attention, inputs, inputs), **DOUBLE)
    with pytest.raises(NotImplementedError):
        run()


def test_nested_use_and_errors_restore() -> None:
    with repair_forward_mode():
        with repair_forward_mode():
            assert F.scaled_dot_product_attention is scaled_dot_product_attention
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
        with pytest.raises(ZeroDivisionError), repair_forward_mode():
            raise ZeroDivisionError
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
    assert is_pytorch()
    with pytest.raises(ZeroDivisionError), repair_forward_mode():
        raise ZeroDivisionError
    assert is_pytorch()


def test_another_function_that_was_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    with repair_forward_mode():
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
    assert F.scaled_dot_product_attention is plain_attention


def test_a_branch_that_does_not_move() -> None:
    """Attention among constants, such as a text beside the image: there is no tangent to take out."""
    x, constant = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        text = F.scaled_dot_product_attention(constant, constant, constant)
        also = attention(constant, constant, constant)
        return F.scaled_dot_product_attention(x, text, also)

    with repair_forward_mode():
        value, tangent = torch.func.jvp(model, (x,), (x,))
    exact = plain_attention(constant, constant, constant)
    expected = torch.func.jvp(lambda x: plain_attention(x, exact, exact), (x,), (x,))
    torch.testing.assert_close((value, tangent), expected)


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_leave_in_any_order(first_out: int) -> None:
    leave = [threading.Event(), threading.Event()]
    entered = threading.Barrier(3, timeout=30)

    def stay(number: int) -> None:
        with repair_forward_mode():
            entered.wait()
            assert leave[number].wait(30)

    threads = [threading.Thread(target=stay, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    entered.wait()
    for number in (first_out, 1 - first_out):
        assert F.scaled_dot_product_attention is scaled_dot_product_attention
        leave[number].set()
        threads[number].join(30)
    assert is_pytorch()


def test_many_threads() -> None:
    def enter_often() -> None:
        for _ in range(300):
            with repair_forward_mode():
                assert F.scaled_dot_product_attention is scaled_dot_product_attention

    errors: list[Any] = []
    hook, threading.excepthook = threading.excepthook, errors.append
    try:
        threads = [threading.Thread(target=enter_often) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not errors
    assert is_pytorch()


# Other people's models.


class Transformer(nn.Module):
    """Someone's own network of (x, t, s), in PyTorch's words alone."""

    def __init__(self, mask: Tensor | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.times = nn.Linear(2, 8)
        self.tokens = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, F.gelu, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.mask = mask

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        times = self.times(torch.stack([t, s], -1)).sin()
        return self.head(self.body(self.tokens(x) + times[:, None], mask=self.mask))


class Attention(nn.Module):
    """The same with `nn.MultiheadAttention`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.options = options

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        y = self.norm(torch.cat([x, x * (t + s.square())[:, None, None]], -1))
        return self.attention(y, y, y, need_weights=False, **self.options)[0][..., :3] * s[:, None, None]


CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
MASKS = {"no mask": None, "causal": CAUSAL, "added": torch.linspace(-2, 2, 16).double().reshape(4, 4)}
PADDING = torch.tensor([[False, False, False, True], [False, True, True, True]])


def models() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        name: partial(Transformer, mask) for name, mask in MASKS.items()
    }
    found["attention alone"] = Attention
    found["padding"] = partial(Attention, key_padding_mask=PADDING)
    return found


def inputs_of_models(
    dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    draws = generator(0, "drop-in models")
    x = torch.randn(2, 4, 3, generator=draws, dtype=torch.float64)
    t, s = torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.5])
    return x.to(device, dtype), t.to(device, dtype), s.to(device, dtype)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return randomize_(models()[name]()).to(dtype)


def in_direction_s(network: Callable[..., Any], x: Tensor, t: Tensor, s: Tensor) -> Dual:
    result = network(x, t, Dual(s, torch.ones_like(s)))
    assert isinstance(result, Dual)
    assert result.tangent is not None
    return result


def loss(network: Callable[..., Any], *inputs: Tensor) -> Tensor:
    """Of value and tangent, and in need of both."""
    value, tangent = in_direction_s(network, *inputs)
    assert tangent is not None
    return (value * tangent).sin().sum() + tangent.cos().sum()


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", models())
def test_tangent_of_a_transformer(name: str, training: bool, gradients: bool) -> None:
    """Without gradients, in eval mode, PyTorch has one operator for a layer, which has no forward mode."""
    module, (x, t, s) = build(name).train(training), inputs_of_models()
    with torch.set_grad_enabled(gradients):
        value, tangent = in_direction_s(JVPNetwork(module), x, t, s)
    assert tangent is not None
    module.train()  # PyTorch's one operator is NaN with added masks
    with torch.no_grad():
        torch.testing.assert_close(value, module(x, t, s), **DOUBLE)
        assert relative_error(tangent, central_difference(lambda h: module(x, t, s + h))) < 1e-9


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", models())
def test_gradients_through_the_tangent_of_a_transformer(name: str, training: bool) -> None:
    """Along a random direction in the space of parameters, against differences of the loss."""
    module, inputs = build(name).train(training), inputs_of_models()
    network, parameters = JVPNetwork(module), list(module.parameters())
    gradients = torch.autograd.grad(loss(network, *inputs), parameters)
    draws = generator(0, "direction")
    direction = [torch.randn(p.shape, generator=draws, dtype=torch.float64) for p in parameters]
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def moved(step: float) -> Tensor:
        for parameter, at, along in zip(parameters, start, direction, strict=True):
            parameter.copy_(at + step * along)
        return loss(network, *inputs)

    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    assert isinstance(slope, Tensor)
    # The fifth derivative of two layers along a step that moves all parameters is large.
    assert relative_error(slope, central_difference(moved, 1e-4)) < 1e-7


def value_tangent_and_gradients(network: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> Any:
    parameters = list(module.parameters())
    return *in_direction_s(network, *inputs), *torch.autograd.grad(loss(network, *inputs), parameters)


def test_a_transformer_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, against float64 without them."""
    exact = build("no mask")
    expected = value_tangent_and_gradients(JVPNetwork(exact), exact, *inputs_of_models())
    launches = force_kernels(monkeypatch)
    module = build("no mask", torch.float32).to(DEVICE)
    inputs = inputs_of_models(torch.float32, DEVICE)
    actual = value_tangent_and_gradients(JVPNetwork(module), module, *inputs)
    assert launches == ["forward"] * 4 + ["backward"] * 2  # two layers; value and tangent in one pass
    for part, right in zip(actual, expected, strict=True):
        assert relative_error(part.cpu().double(), right) < 1e-4  # 2 layers of float32, differentiated twice


def test_dropout_in_a_transformer() -> None:
    """The seed fixes what is dropped, and then the tangent is that of the value."""
    torch.manual_seed(0)
    module, (x, t, s) = randomize_(Transformer(dropout=0.2)).double(), inputs_of_models()

    def value(step: float) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return in_direction_s(JVPNetwork(module), x, t, s + step).value

    torch.manual_seed(1)
    tangent = in_direction_s(JVPNetwork(module), x, t, s).tangent
    assert tangent is not None
    assert relative_error(tangent, central_difference(value)) < 1e-9
    assert relative_error(tangent, central_difference(lambda h: module.eval()(x, t, s + h))) > 0.1


def test_fast_path_is_as_before_outside_forward_mode() -> None:
    with repair_forward_mode():
        assert torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        assert not torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(True)
        with forward_ad.dual_level():
            assert not torch.backends.mha.get_fastpath_enabled()


# Norms.


def norm_of(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    rows = x.flatten(-len(shape))
    deviation = rows.var(-1, correction=0, keepdim=True) + 1e-5
    y = ((rows - rows.mean(-1, keepdim=True)) / deviation.sqrt()).reshape(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("affine", [(), (3,), (3, 4)], ids=["none", "weight", "weight and bias"])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_layer_norm(shape: tuple[int, ...], affine: tuple[int, ...]) -> None:
    """PyTorch's tangent is right; its gradients through it, and its second tangents, are not."""
    draws = generator(0, "layer norm")
    shapes = [(2, 3, 4), *[shape for _ in affine]]
    values, tangents = ([torch.randn(s, generator=draws, dtype=torch.float64) for s in shapes] for _ in "12")

    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        with repair_forward_mode():
            return F.layer_norm(x, shape, weight, bias)

    def right(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return norm_of(x, shape, weight, bias)

    expected = derivatives(right, values, tangents)
    torch.testing.assert_close(derivatives(ours, values, tangents), expected, **DOUBLE)
    torch.testing.assert_close(ours(*values), right(*values), **DOUBLE)

    def second(function: Callable[..., Tensor]) -> Any:
        return jvp(lambda *x: jvp(function, x, tuple(tangents))[1], tuple(values), tuple(tangents))

    torch.testing.assert_close(second(ours), second(right), **DOUBLE)


def test_layer_norm_in_half_precision() -> None:
    x = torch.randn(2, 8, generator=generator(0, "layer norm")).bfloat16()
    weight = torch.linspace(0.5, 1, 8).bfloat16()
    with repair_forward_mode():
        actual = jvp(lambda x: F.layer_norm(x, (8,), weight), (x,), (x.flip(0),))
    exact = jvp(lambda x: norm_of(x, (8,), weight.double(), None), (x.double(),), (x.flip(0).double(),))
    for part, right in zip(actual, exact, strict=True):
        assert part.dtype == torch.bfloat16
        torch.testing.assert_close(part.double(), right, rtol=2**-8, atol=0)  # rounded once


@pytest.mark.parametrize(
    ("shape", "weight", "message"),
    [
        ((3,), None, r"input: .*\(3,\).*\(2, 4\)"),
        ((), None, "input"),
        ((4,), torch.ones(1), r"weight, bias: .*\(4,\)"),
    ],
)
def test_layer_norm_refuses(shape: tuple[int, ...], weight: Tensor | None, message: str) -> None:
    x = torch.randn(2, 4)
    with repair_forward_mode(), pytest.raises(ValueError, match=message):
        jvp(lambda y: F.layer_norm(y, shape, weight), (x,), (x,))


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_norms_without_right_gradients_are_refused(name: str) -> None:
    """Unless none are recorded."""
    norm = nn.BatchNorm1d(3, track_running_stats=False) if name == "batch" else nn.InstanceNorm1d(3)
    x, d = torch.randn(2, 2, 3, 5, generator=generator(0, "norm"), dtype=torch.float64).unbind()
    norm = norm.double()
    with repair_forward_mode():
        value = norm(x)
        with pytest.raises(NotImplementedError, match=rf"{name}_norm\(.*gradients through its tangent"):
            jvp(norm, (x,), (d,))
        with torch.no_grad():
            actual = jvp(norm, (x,), (d,))
    assert torch.equal(actual[0], value)
    with torch.no_grad():
        assert relative_error(actual[1], central_difference(lambda h: norm(x + h * d))) < 1e-9


def test_batch_norm_by_running_statistics_is_pytorchs() -> None:
    norm = nn.BatchNorm1d(3).eval()
    assert norm.running_var is not None
    norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x, d = torch.randn(2, 2, 3, 5, generator=generator(0, "norm")).unbind()
    with repair_forward_mode():
        actual = jvp(norm, (x,), (d,))
    assert torch.equal(actual[0], norm(x))
    torch.testing.assert_close(actual[1], d / (norm.running_var + 1e-5).sqrt()[:, None])


# Under `torch.compile`.


WRAPPED: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "the network": lambda module: compiler(JVPNetwork(module)),
    "the module inside": lambda module: JVPNetwork(compiler(module)),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("name", ["attention alone", "padding"])
def test_a_compiled_network(name: str, wrap: Callable[[nn.Module], Callable[..., Any]]) -> None:
    """The same code before, within and after a context around it."""
    module, inputs = build(name), inputs_of_models()
    expected = value_tangent_and_gradients(JVPNetwork(module), module, *inputs)
    network = wrap(module)
    torch.testing.assert_close(network(*inputs), module(*inputs), **DOUBLE)
    for around in (nullcontext, repair_forward_mode, nullcontext):
        with around():
            actual = value_tangent_and_gradients(network, module, *inputs)
        torch.testing.assert_close(actual, expected, **DOUBLE)


class Plain(nn.Module):
    """With attention as most write it today."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.project = nn.Linear(6, 18)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        y = self.norm(torch.cat([x, x * (t + s.square())[:, None, None]], -1))
        query, key, value = self.project(y).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).mean(1)


def test_a_network_compiled_as_one_graph() -> None:
    """Layer norm included, which PyTorch cannot compile in forward mode (seen with 2.11 and 2.13)."""
    torch.manual_seed(0)
    module, inputs = randomize_(Plain()).double(), inputs_of_models()
    expected = value_tangent_and_gradients(JVPNetwork(module), module, *inputs)
    network = compiler(JVPNetwork(module), fullgraph=True)
    actual = value_tangent_and_gradients(network, module, *inputs)
    torch.testing.assert_close(actual, expected, **DOUBLE)


def test_multi_head_attention_is_refused_in_one_graph() -> None:
    """The compiler does not look into it."""
    network = compiler(JVPNetwork(build("padding")), fullgraph=True)
    with pytest.raises(RuntimeError, match="forward AD with _scaled_dot_product"):
        in_direction_s(network, *inputs_of_models())
