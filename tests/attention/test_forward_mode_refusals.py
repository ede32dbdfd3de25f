"""What PyTorch's forward mode gets wrong without a word is refused, by every name, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forward_mode_tools import compiler, through_level
from helpers import central_difference, jvp, relative_error
from torch import Tensor, nn
from torch.linalg import det as taken_det
from torch.nn.functional import batch_norm as taken_batch_norm
from torch.nn.functional import layer_norm as taken_layer_norm

from tvmatch.attention import repair_forward_mode
from tvmatch.dual import Dual
from tvmatch.models import JVPNetwork
from tvmatch.seeds import generator

Function = Callable[[Tensor], Tensor]
aten = torch.ops.aten
EYE = torch.eye(3, dtype=torch.float64)
EYES = EYE.expand(2, 3, 3)
FIRST = torch.zeros(2, 3, 3, dtype=torch.int64)


def matrices(count: int = 2) -> Tensor:
    draws = generator(0, "refusals")
    return torch.randn(count, 3, 3, generator=draws, dtype=torch.float64) + 3 * EYE


WRONG_GRADIENTS: dict[str, Function] = {
    "torch.det": torch.det,
    "torch.linalg.det": torch.linalg.det,
    "a name that was taken": taken_det,
    "Tensor.det": lambda A: A.det(),
    "aten.linalg_det": lambda A: aten.linalg_det(A),
    "aten.linalg_det.default": lambda A: aten.linalg_det.default(A),
    "aten._linalg_det": lambda A: aten._linalg_det(A)[0],
    "torch.logdet": lambda A: torch.logdet(A @ A.mT),
    "Tensor.logdet": lambda A: (A @ A.mT).logdet(),
    "torch.slogdet": lambda A: torch.slogdet(A)[1],
    "torch.linalg.slogdet": lambda A: torch.linalg.slogdet(A).logabsdet,
    "torch.linalg.solve": lambda A: torch.linalg.solve(A, EYE),
    "of the right side, with named arguments": lambda A: torch.linalg.solve(A=A, B=A.sin()),
    "left=False": lambda A: torch.linalg.solve(A, EYE, left=False),
    "torch.linalg.solve_ex": lambda A: torch.linalg.solve_ex(A, EYE)[0],
    "torch.linalg.tensorsolve": lambda A: torch.linalg.tensorsolve(A[0].reshape(3, 1, 3), EYE[:, :1]),
    "torch.linalg.householder_product": lambda A: torch.linalg.householder_product(A, A[..., 0]),
    "torch.orgqr": lambda A: torch.orgqr(A, A[..., 0]),
    "a batch norm's own name": lambda A: taken_batch_norm(A, None, None, training=True),
    "torch.batch_norm": lambda A: torch.batch_norm(A, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.instance_norm": lambda A: torch.instance_norm(A, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.native_layer_norm": lambda A: torch.native_layer_norm(A, [3], None, None, 1e-5)[0],
}
WRONG_TANGENT: dict[str, Function] = {
    "cholesky_inverse": lambda A: torch.cholesky_inverse(A.tril()),
    "Tensor.cholesky_inverse": lambda A: A.tril().cholesky_inverse(),
    "triangular_solve": lambda A: torch.triangular_solve(EYE, A)[0],
}
ZERO_TANGENT: dict[str, Function] = {
    "bessel_j0": torch.special.bessel_j0,
    "aten.special_bessel_y1": lambda A: aten.special_bessel_y1(A.abs()),
    "modified_bessel_k0": lambda A: torch.special.modified_bessel_k0(A.exp()),
    "airy_ai": torch.special.airy_ai,
    "scatter_reduce": lambda A: A.scatter_reduce(0, FIRST, A, "prod"),
}
WRONG = WRONG_TANGENT | ZERO_TANGENT
REFUSED = WRONG_GRADIENTS | WRONG


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_refused(function: Function) -> None:
    A = matrices()
    with repair_forward_mode(), pytest.raises(NotImplementedError, match="PyTorch"):
        jvp(function, (A,), (A.cos(),))


def gradient_along(function: Function, A: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The slope of a function of the tangent along a direction: by reverse mode, and by differences."""

    def loss(x: Tensor) -> Tensor:
        return jvp(function, (x,), (A.cos(),))[1].sin().sum()

    leaf = A.clone().requires_grad_()
    value = loss(leaf)  # may not even know that it depends on the leaf
    gradient = torch.autograd.grad(value, leaf)[0] if value.requires_grad else torch.zeros_like(A)
    with torch.no_grad():
        return (gradient * direction).sum(), central_difference(lambda h: loss(A + h * direction), 1e-4)


@pytest.mark.parametrize("function", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_refused_because_the_gradients_are_wrong(function: Function) -> None:
    """If this fails, PyTorch has mended its rule, and there is no reason to refuse any longer."""
    A = matrices()
    actual, expected = gradient_along(function, A, A.sin())
    assert relative_error(actual, expected) > 1e-3


@pytest.mark.parametrize("function", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_without_gradients_the_tangent_is_right(function: Function) -> None:
    A = matrices()
    with repair_forward_mode(), torch.no_grad():
        actual = jvp(function, (A,), (A.cos(),))[1]
        assert relative_error(actual, central_difference(lambda h: function(A + h * A.cos()), 1e-4)) < 1e-8
        with pytest.raises(NotImplementedError):  # a second tangent
            torch.func.jvp(lambda x: jvp(function, (x,), (A.cos(),))[1], (A,), (A.sin(),))


@pytest.mark.parametrize(
    "function", (WRONG_TANGENT | ZERO_TANGENT).values(), ids=WRONG_TANGENT | ZERO_TANGENT
)
def test_refused_because_the_tangent_is_wrong(function: Function) -> None:
    A = matrices()
    with torch.no_grad():
        tangent = jvp(function, (A,), (A.cos(),))[1]
        expected = central_difference(lambda h: function(A + h * A.cos()), 1e-4)
        assert relative_error(tangent, expected) > 1e-3
        with repair_forward_mode(), pytest.raises(NotImplementedError):
            jvp(function, (A,), (A.cos(),))


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_outside_forward_mode_and_of_constants_nothing_is_refused(function: Function) -> None:
    """A weight made by `linalg.solve`, as in `parametrizations.orthogonal`, does not move."""
    A = matrices()
    with repair_forward_mode():
        value = function(A)
        actual, tangent = jvp(lambda x: x.sin().sum() * function(A), (A,), (A,))
    assert torch.equal(value, function(A))
    torch.testing.assert_close(actual, A.sin().sum() * value)
    torch.testing.assert_close(tangent, (A * A.cos()).sum() * value)


def test_refused_through_forward_ad_as_well() -> None:
    with repair_forward_mode(), pytest.raises(NotImplementedError, match=r"det.*lu_factor"):
        through_level(torch.linalg.det, [matrices()], [matrices()])


RIGHT: dict[str, Function] = {
    "what is advised for solve": lambda A: torch.linalg.lu_solve(*torch.linalg.lu_factor(A), EYES),
    "what is advised for det": lambda A: torch.linalg.lu_factor(A)[0].diagonal(0, -2, -1).prod(-1),
    "a factor of Cholesky": lambda A: torch.linalg.cholesky(A @ A.mT).diagonal(0, -2, -1).log().sum(-1),
    "what is advised for cholesky_inverse": lambda A: torch.cholesky_solve(EYES, A.tril()),
    "what is advised for triangular_solve": lambda A: torch.linalg.solve_triangular(A, EYE, upper=True),
    "inv": torch.linalg.inv,
    "qr": lambda A: torch.linalg.qr(A).Q,
    "svd": lambda A: torch.linalg.svd(A).S,
    "eigvalsh": lambda A: torch.linalg.eigvalsh(A + A.mT),
    "pinv": torch.linalg.pinv,
    "matrix_exp": torch.linalg.matrix_exp,
    "lstsq": lambda A: torch.linalg.lstsq(A, EYES).solution,
    "scatter_reduce, amax": lambda A: A.scatter_reduce(0, FIRST, A.sin(), "amax"),
    "layer norm by a name that was taken": lambda A: taken_layer_norm(A, (3,)),
    "torch.layer_norm": lambda A: torch.layer_norm(A, (3,), cudnn_enable=False),
    "torch.group_norm": lambda A: torch.group_norm(A, 1),
    "attention by the name of the C++ function": lambda A: torch._C._nn.scaled_dot_product_attention(A, A, A),
    "GRU": nn.GRU(3, 2).double(),
}


@pytest.mark.parametrize("function", RIGHT.values(), ids=RIGHT)
def test_right_with_gradients(function: Function) -> None:
    def first(A: Tensor) -> Tensor:
        result: Any = function(A)
        return result[0] if isinstance(result, tuple) else result

    A = matrices()
    with repair_forward_mode():
        tangent = jvp(first, (A,), (A.cos(),))[1].detach()
        actual, expected = gradient_along(first, A, A.sin())
    with torch.no_grad():
        assert relative_error(tangent, central_difference(lambda h: first(A + h * A.cos()), 1e-4)) < 1e-8
    assert relative_error(actual.detach(), expected) < 1e-6


# Operators registered with `torch.library`.


@torch.library.custom_op("tvmatch_tests::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("tvmatch_tests::bins", mutates_args=())
def bins(x: Tensor) -> Tensor:
    return (x > 0).long()


torch.library.define("tvmatch_tests::double", "(Tensor x) -> Tensor")
torch.library.impl("tvmatch_tests::double", "CompositeImplicitAutograd", lambda x: 2 * x)

CUSTOM: dict[str, Function] = {
    "the function": sine,
    "the operator": lambda x: torch.ops.tvmatch_tests.sine(x),
    "its overload": lambda x: torch.ops.tvmatch_tests.sine.default(x),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("function", CUSTOM.values(), ids=CUSTOM)
def test_an_operator_that_loses_the_tangent_is_refused(function: Function, gradients: bool) -> None:
    x = matrices()
    assert not jvp(function, (x,), (x,))[1].any()  # without a word
    with (
        repair_forward_mode(),
        torch.set_grad_enabled(gradients),
        pytest.raises(NotImplementedError, match=r"tvmatch_tests\.sine.*torch\.library"),
    ):
        jvp(function, (x,), (x,))


def test_operators_that_lose_no_tangent_are_let_through() -> None:
    x = matrices()

    def function(x: Tensor) -> Tensor:
        kept = torch.ops.tvmatch_tests.double(x) * bins(x)
        return kept + sine(x.detach())

    with repair_forward_mode():
        assert torch.equal(sine(x), x.sin())
        value, tangent = jvp(function, (x,), (x.cos(),))
    positive = (x > 0).double()
    torch.testing.assert_close(value, 2 * x * positive + x.sin())
    torch.testing.assert_close(tangent, 2 * x.cos() * positive)


# Layers that change themselves.


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "without running statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "the same in eval mode": lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(3),
    "InstanceNorm1d with running statistics": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
}


@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_norms_by_statistics_of_the_batch(build: Callable[[], nn.Module]) -> None:
    norm, x = build().double(), matrices()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    with repair_forward_mode(), pytest.raises(NotImplementedError, match=r"_norm\(.*gradients through"):
        jvp(norm, (x,), (x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_batch_norm_of_images_in_a_network() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())

        def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.body(x + (t - s)[:, None, None, None])

    network, x, t = JVPNetwork(Network()), torch.randn(2, 3, 5, 5), torch.rand(2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image = x.to(memory_format=memory_format)
        with pytest.raises(NotImplementedError, match=r"batch_norm.*group_norm"):
            network(image, t, Dual(t, torch.ones(2)))
    network(x, t, t)  # without a tangent it is PyTorch's


@pytest.mark.parametrize("build", [Counting, lambda: nn.BatchNorm1d(3)])
def test_a_layer_that_changes_a_buffer(build: Callable[[], nn.Module]) -> None:
    """Also without gradients, where the tangent of batch norm would be right."""
    layer, x = build(), matrices().float()
    with repair_forward_mode(), torch.no_grad(), pytest.raises(NotImplementedError, match="changed in place"):
        jvp(layer, (x,), (x,))


# Under `torch.compile`.


@pytest.mark.parametrize("wrap", ["the network", "the module inside"])
def test_refused_in_compiled_code(wrap: str) -> None:
    torch._dynamo.reset()

    class Network(nn.Module):
        def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return x * torch.linalg.det(x * s[:, None, None])[:, None, None]

    network = compiler(JVPNetwork(Network())) if wrap == "the network" else JVPNetwork(compiler(Network()))
    x, t = matrices(), torch.rand(2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="lu_factor"):
        network(x, t, Dual(t, torch.ones_like(t)))
    assert torch.linalg.det.__module__ == "torch._C._linalg"
    assert F.layer_norm.__module__ == "torch.nn.functional"


# Where no name is looked up: in TorchScript, and under other transforms.


def _determinant(A: Tensor) -> Tensor:
    return torch.det(A) if bool(A.sum() > 1e3) else torch.det(A).sin()


class _Determinant(nn.Module):
    def forward(self, A: Tensor) -> Tensor:
        return _determinant(A)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("way", ["script", "trace", "module"])
def test_torchscript_is_refused(way: str) -> None:
    A = matrices()
    if way == "script":
        scripted = torch.jit.script(_determinant)
    else:
        scripted = torch.jit.trace(_determinant if way == "trace" else _Determinant(), A, check_trace=False)
    actual, expected = gradient_along(scripted, A, A.sin())
    assert relative_error(actual, expected) > 1e-4  # right to 1e-7, if it were
    with repair_forward_mode():
        with pytest.raises(NotImplementedError, match="TorchScript: its operators"):
            jvp(scripted, (A,), (A.cos(),))
        assert scripted(A).equal(_determinant(A))  # without a tangent
        assert jvp(lambda x: x * scripted(A), (A[0, 0, 0],), (A[0, 0, 1],))[0].equal(
            A[0, 0, 0] * _determinant(A)
        )


def test_refused_under_other_transforms() -> None:
    A, by_row = matrices(), torch.func.vmap(torch.det)
    for function in (by_row, torch.func.vmap(torch.func.grad(torch.det))):
        with repair_forward_mode(), pytest.raises(NotImplementedError, match=r"^det: "):
            jvp(function, (A,), (A.cos(),))
    with repair_forward_mode(), torch.no_grad():
        tangent = jvp(by_row, (A,), (A.cos(),))[1]
    assert relative_error(tangent, central_difference(lambda h: by_row(A + h * A.cos()), 1e-4)) < 1e-6
    with repair_forward_mode():
        constant = jvp(lambda x: x * by_row(A), (A[0, 0, 0],), (A[0, 0, 1],))[1]
    assert relative_error(constant, by_row(A) * A[0, 0, 1]) < 1e-12
