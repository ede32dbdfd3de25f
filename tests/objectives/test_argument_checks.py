"""What would be another loss by broadcasting is refused by name; the caller's tensors are left alone."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from helpers import random_inputs, randomize_, relative_error, small_dit
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

import tvmatch
from tvmatch.data.spec import DataSpec
from tvmatch.dual import Dual
from tvmatch.flow_map import FlowMap, interpolate, per_sample
from tvmatch.models import JVPNetwork
from tvmatch.objectives import flow_matching_loss, tvm_loss
from tvmatch.sampling import sample_trajectory
from tvmatch.trained_model import TrainedModel
from tvmatch.training.distillation import GuidedTeacher

InputError = tvmatch.InputError
BATCH, SHAPE, CLASSES = 4, (3, 2, 2), 3


class Network(nn.Module):
    """Of `channels` outputs, which may be too few."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, channels, 1).double()

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.body(x) * (t + s.square()).reshape(-1, 1, 1, 1)


def arguments() -> dict[str, Any]:
    x0, t, s, labels, weight = random_inputs(SHAPE, CLASSES, batch=BATCH)
    noise, _, s_prime, _, _ = random_inputs(SHAPE, CLASSES, batch=BATCH, seed=1)
    return {
        "x0": x0,
        "noise": noise,
        "t": t,
        "s": s,
        "s_prime": s_prime,
        "labels": labels,
        "guidance_weight": weight,
    }


def loss(**changes: Any) -> Tensor:
    network = JVPNetwork(Network())
    network.accepted = set()
    given = arguments() | {"labels": None} | changes
    return tvm_loss(network, network, **given, scaled=True).loss


COLUMN: Callable[[Tensor], Tensor] = lambda x: x[:, None]  # noqa: E731
WRONG: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "w (B, 1)": ("guidance_weight", COLUMN, r"\(4,\).*\(4, 1\)"),
    "w (1,)": ("guidance_weight", lambda w: w[:1], r"\(1,\)"),
    "w ()": ("guidance_weight", lambda w: w[0], r"\(\)"),
    "w of integers": ("guidance_weight", lambda w: w.long(), "int64"),
    "w of another batch": ("guidance_weight", lambda w: w[:3], r"\(3,\)"),
    "t (B, 1, 1, 1)": ("t", lambda t: t.reshape(-1, 1, 1, 1), r"\(4, 1, 1, 1\)"),
    "t (B, 1)": ("t", COLUMN, r"\(4, 1\)"),
    "t (1,)": ("t", lambda t: t[:1], r"\(1,\)"),
    "s (B, 1, 1, 1)": ("s", lambda s: s.reshape(-1, 1, 1, 1), r"\(4, 1, 1, 1\)"),
    "s ()": ("s", lambda s: s[0], r"\(\)"),
    "s of another device": ("s", lambda s: s.to("meta"), "cpu.*meta"),
    "s of integers": ("s", lambda s: s.long(), "int64"),
    "s' (B, 1)": ("s_prime", COLUMN, r"\(4, 1\)"),
    "s' of another batch": ("s_prime", lambda s: s[:2], r"\(2,\)"),
    "one noise for all": ("noise", lambda x: x[:1], r"\(4, 3, 2, 2\).*\(1, 3, 2, 2\)"),
    "noise of one channel": ("noise", lambda x: x[:, :1], r"\(4, 1, 2, 2\)"),
    "noise in float32": ("noise", lambda x: x.float(), "float64.*float32"),
    "noise of another device": ("noise", lambda x: x.to("meta"), "meta"),
    "bytes for data": ("x0", lambda x: x.byte(), "uint8"),
    "data without a batch": ("x0", lambda x: x[0, 0, 0], "shape"),
    "labels (B, 1)": ("labels", COLUMN, r"\(4, 1\)"),
    "complex s'": ("s_prime", lambda s: s.to(torch.complex128), "floating-point.*complex128"),
    "w of truth values": ("guidance_weight", lambda w: w > 0, "floating-point.*bool"),
    "one number for t": ("t", lambda t: 0.5, "a tensor .*float"),
    "noise in NumPy": ("noise", lambda x: x.numpy(), "a tensor .*ndarray"),
    "labels in bytes": ("labels", lambda x: x.byte(), "int64.*uint8"),
    "labels in floating point": ("labels", lambda x: x.double(), "float64"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_tvm_loss_names_the_argument(name: str, change: Callable[[Tensor], Any], message: str) -> None:
    assert loss().isfinite()
    with pytest.raises(InputError, match=f"^{name}: .*{message}"):
        loss(**{name: change(arguments()[name])})


@pytest.mark.parametrize("role", ["network", "target"])
@pytest.mark.parametrize("detach_jvp", [False, True])
def test_a_network_of_another_shape(role: str, detach_jvp: bool) -> None:
    """One channel for three would broadcast in every difference of the loss."""
    networks: dict[str, nn.Module] = {"network": JVPNetwork(Network()), "target": JVPNetwork(Network())}
    networks[role] = JVPNetwork(Network(1))
    given = arguments() | {"labels": None}
    with pytest.raises(InputError, match=r"must return the shape \(4, 3, 2, 2\) of x, got \(4, 1, 2, 2\)"):
        tvm_loss(**networks, **given, scaled=False, detach_jvp=detach_jvp)
    with pytest.raises(InputError, match="must return the shape"):
        flow_matching_loss(JVPNetwork(Network(1)), given["x0"], given["noise"], given["t"])


def test_times_and_weights_of_numpy() -> None:
    """In float64, beside a network and data in float32."""
    given, network = arguments(), randomize_(small_dit(SHAPE, CLASSES))
    narrow = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
    wide = {name: narrow[name].double() for name in ("t", "s", "s_prime", "guidance_weight")}
    expected = tvm_loss(network, network, **narrow, scaled=True).loss
    actual = tvm_loss(network, network, **narrow | wide, scaled=True).loss
    assert relative_error(actual, expected) < 1e-4  # rounding of s − t
    assert FlowMap(network).displacement(narrow["x0"], wide["t"], wide["s"]).dtype == torch.float32


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [(lambda y: (y, y), "a tuple"), (lambda y: {"sample": y}, "a dict"), (lambda y: y.long(), "torch.int64")],
)
def test_a_network_of_another_output(outputs: Callable[[Tensor], Any], kind: str) -> None:
    class Other(Network):
        def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return outputs(super().forward(x, t, s))

    flow_map = FlowMap(JVPNetwork(Other()))
    for call in (flow_map.displacement, flow_map.displacement_and_terminal_velocity):
        with pytest.raises(InputError, match=f"must return one floating-point tensor, got {kind}"):
            call(x, t, s)


def test_a_network_without_duals() -> None:
    given = arguments() | {"labels": None}
    plain: Any = Network()
    network: Any = lambda x, t, s, labels, w: plain(x, t, s.value if isinstance(s, Dual) else s)  # noqa: E731
    with pytest.raises(InputError, match=r"must return a Dual.*Tensor.*JVPNetwork"):
        tvm_loss(network, network, **given, scaled=False)


x, t, s, labels, w = random_inputs(SHAPE, CLASSES, batch=BATCH)
FLOW_MAP = FlowMap(JVPNetwork(Network()), scaled=True)
TEACHER = partial(
    GuidedTeacher,
    TrainedModel(
        Network(), DataSpec("image", SHAPE, None, (0.5,) * 3, (0.5,) * 3), scaled=False, guidance=1.0
    ),
    scaled=True,
)
CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "interpolate": ("t", lambda: interpolate(x, x, t[:, None])),
    "flow matching": ("t", lambda: flow_matching_loss(FLOW_MAP.network, x, x, t[:1])),
    "flow matching noise": ("noise", lambda: flow_matching_loss(FLOW_MAP.network, x, x[:1], t)),
    "displacement t": ("t", lambda: FLOW_MAP.displacement(x, t[:, None], s)),
    "displacement s": ("s", lambda: FLOW_MAP.displacement(x, t, s[0])),
    "displacement w": ("guidance_weight", lambda: FLOW_MAP.displacement(x, t, s, None, w[:, None])),
    "velocity": ("s", lambda: FLOW_MAP.velocity(x, s[:, None])),
    "velocity labels": ("labels", lambda: FLOW_MAP.velocity(x, s, torch.zeros(1, dtype=torch.int64))),
    "terminal velocity": ("s", lambda: FLOW_MAP.displacement_and_terminal_velocity(x, t, s[:, None])),
    "sampling": ("labels", lambda: sample_trajectory(FLOW_MAP, x, [1, 0], labels=torch.tensor(1))),
    "times that rise": ("times", lambda: sample_trajectory(FLOW_MAP, x, [0, 1])),
    "times above one": ("times", lambda: sample_trajectory(FLOW_MAP, x, [1.5, 0])),
    "per sample": ("numbers", lambda: per_sample(t[:, None], x)),
    "teacher": ("guidance_weight|numbers", lambda: TEACHER()(x, t, s, None, w[:, None])),
}


@pytest.mark.parametrize(("name", "call"), CALLS.values(), ids=CALLS)
def test_every_function_names_the_argument(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=f"^({name}): "):
        call()


def polynomial(x: Tensor, t: Tensor, s: Tensor | Dual, *_: Tensor | None) -> Tensor | Dual:
    """F = x (t + s²)."""
    end = s.value if isinstance(s, Dual) else s
    value = x * per_sample(t + end.square(), x)
    return Dual(value, x * per_sample(2 * end * s.tangent, x)) if isinstance(s, Dual) else value


def test_the_checked_loss_compiles_as_one_graph() -> None:
    """Without a host synchronisation, which a meta tensor could not give."""
    torch._dynamo.reset()
    network: Any = polynomial
    function = partial(tvm_loss, network, network, scaled=True)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments()).loss, function(**arguments()).loss)
    assert function(**{name: value.to("meta") for name, value in arguments().items()}).loss.is_meta


# Arguments that a network changes in place.


class InPlace(nn.Module):
    """Written as many write it: times times a thousand, in the caller's memory."""

    def __init__(self, changed: str) -> None:
        super().__init__()
        self.changed = changed

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        given = {"x": x, "t": t, "s": s, "guidance_weight": guidance_weight}
        changed = given[self.changed]
        assert changed is not None
        changed.view(-1).mul_(2)
        return x * (t + s).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("changed", ["x", "t", "s", "guidance_weight"])
def test_the_callers_tensors_stay(changed: str) -> None:
    given = (x.clone(), t.clone(), s.clone(), None, w.clone())
    wrapped = FlowMap(JVPNetwork(InPlace(changed)), scaled=True)
    # Within the transform, changing what does not take part in it is an error.
    with suppress(NotImplementedError) if changed == "guidance_weight" else nullcontext():
        wrapped.displacement_and_terminal_velocity(*given)
    wrapped.displacement(*given)
    for after, before in zip(given, (x, t, s, None, w), strict=True):
        assert after is before is None or torch.equal(after, before)  # type: ignore[arg-type]
    network: Any = InPlace(changed)
    with pytest.raises(InputError, match=f"InPlace changes its argument {changed} in place"):
        FlowMap(network).displacement(*given)


# Duals are no tuples.


@pytest.mark.parametrize(
    "use",
    [
        lambda d: 2 * d,
        lambda d: d * 2,
        lambda d: d + d,
        lambda d: sum([d, d]),
        lambda d: (1,) + d,  # noqa: RUF005
        lambda d: torch.ones(2) * d,
        lambda d: torch.ones(2) + d,
        lambda d: d - d,
        lambda d: d / 2,
        lambda d: d @ d,
        lambda d: -d,
        lambda d: d < d,
        lambda d: d >= (0,),
        lambda d: max(d, d),
        lambda d: sorted([d, d]),
    ],
)
def test_arithmetic_of_duals_as_tuples_is_refused(use: Callable[[Dual], Any]) -> None:
    with pytest.raises(TypeError):
        use(Dual(torch.ones(1), torch.ones(1)))


# Wrapped modules.


class Wrapper(nn.Module):
    """As DDP, averaged models and hooks do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "a wrapper": Wrapper,
    "nested": lambda module: Wrapper(compiled(Wrapper(module))),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_module_gets_the_arguments_that_it_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch._dynamo.reset()
    network = Network()
    dual = Dual(s, torch.ones_like(s))
    actual, expected = (
        JVPNetwork(wrap(network))(x, t, dual, None, w),
        JVPNetwork(network)(x, t, dual, None, w),
    )
    torch.testing.assert_close(tuple(actual), tuple(expected))
    assert JVPNetwork(wrap(small_dit((3, 2, 2), 3))).accepted == {"labels", "guidance_weight"}


def test_data_parallelism_belongs_around() -> None:
    network = nn.DataParallel(Network())
    assert torch.equal(JVPNetwork(network)(x, t, s), Network.forward(network.module, x, t, s))
    with pytest.raises(InputError, match=r"DataParallel\(JVPNetwork\(network\)\)"):
        JVPNetwork(network)(x, t, Dual(s, torch.ones_like(s)))


class Checkpointed(Network):
    """With the function as its module took it, or as it stands in PyTorch's."""

    def __init__(self, call: Callable[..., Any], reentrant: bool) -> None:
        super().__init__()
        self.call, self.reentrant = call, reentrant

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.call(super().forward, x, t, s, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "call", [torch_checkpoint.checkpoint, lambda *a, **b: torch_checkpoint.checkpoint(*a, **b)]
)
def test_checkpoints_inside_are_refused_in_one_sentence(call: Callable[..., Any], reentrant: bool) -> None:
    network = JVPNetwork(Checkpointed(call, reentrant))
    with pytest.raises(NotImplementedError, match=r"checkpoint does not work inside torch\.func\.jvp"):
        network(x, t, Dual(s, torch.ones_like(s)))
    leaf = x.clone().requires_grad_()
    network(leaf, t, s).sum().backward()  # without a tangent they are PyTorch's
    assert leaf.grad is not None
    if not reentrant:
        with torch.no_grad():
            assert network(x, t, Dual(s, torch.ones_like(s))).tangent.any()


# Precision of a trained model.


def test_a_trained_model_in_another_precision() -> None:
    spec = DataSpec("image", (1, 4, 4), ("a", "b", "c"), (0.5,), (0.5,))
    model = TrainedModel(randomize_(small_dit((1, 4, 4), 3)), spec, scaled=False, guidance=1.0)
    expected = model.sample(count=3, steps=2)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(InputError, match=r"device: .*float32.*autocast"):
            model.to(dtype)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):  # as the message says
        assert 0 < relative_error(model.sample(count=3, steps=2), expected) < 0.1
    model.network.bfloat16()
    with pytest.raises(InputError, match=r"network: .*bfloat16.*autocast"):
        model.sample(count=1)
