"""Training steps of one network by several ways: ours, and PyTorch's own `torch.func.jvp`."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tvmatch.acceleration import accelerate
from tvmatch.attention import attention_reference
from tvmatch.dual import Dual
from tvmatch.models import DiT, DiTConfig, layers
from tvmatch.models.ema import ParameterAverage
from tvmatch.objectives import tvm_loss
from tvmatch.objectives.times import TimesConfig, sample_times
from tvmatch.seeds import RowDraws


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
        config: of the DiT.
        shape: of an image.
        class_count: number of classes.
        batch: images a step.
        guidance_weight: w of all images, or None for 1.
        learning_rate: of AdamW.
        evaluation_ema: rate of the evaluation average.
    """

    config: DiTConfig
    shape: tuple[int, int, int]
    class_count: int
    batch: int
    guidance_weight: float | None
    learning_rate: float = 1e-4
    evaluation_ema: float = 0.9999

    @property
    def forward_equivalents(self) -> int:
        """Passes of the plain network that a step is worth: a tangent is one more, a backward pass two.

        The pass with the tangent 6, the flow term 3, the target 1 and, with guidance, once more.
        """
        return 10 if self.guidance_weight is None else 11


DIGITS = Case(DiTConfig(preset="tiny/2", mlp_ratio=2.0), (1, 8, 8), 10, 64, None, 3e-3, 0.999)
IMAGENET = Case(DiTConfig(preset="XL/2"), (4, 32, 32), 1000, 32, 2.0)


class Way(NamedTuple):
    """One way to do the step.

    Attributes:
        name: in the tables.
        jvp: by `torch.func.jvp` of the network on plain tensors instead of Duals.
        attention: for `jvp`, what stands for attention: the plain "reference", or PyTorch's "math".
        compiled: by `torch.compile`; for `jvp` the whole loss, with the jvp inside, else as training does it.
        recompute: of `tvmatch.acceleration.accelerate`.
    """

    name: str
    jvp: bool = False
    attention: str = ""
    compiled: bool = False
    recompute: str = "none"


OURS, OURS_COMPILED = "ours, eager", "ours, compiled"
CPU_WAYS = (
    Way(OURS),
    Way(OURS_COMPILED, compiled=True),
    Way("jvp, plain attention, eager", jvp=True, attention="reference"),
    Way("jvp, math SDPA, eager", jvp=True, attention="math"),
    Way("jvp, plain attention, compiled", jvp=True, attention="reference", compiled=True),
    Way("jvp, math SDPA, compiled", jvp=True, attention="math", compiled=True),
)
# Compiling the whole loss with its jvp takes longer here than all the rest: it is measured on the CPU alone.
GPU_WAYS = (
    Way(OURS_COMPILED, compiled=True),
    Way("jvp, math SDPA, eager", jvp=True, attention="math"),
    Way(OURS),
    Way("ours, compiled, recompute pointwise", compiled=True, recompute="pointwise"),
)


class JVPOfS(nn.Module):
    """The network on plain tensors, and `torch.func.jvp` in its argument s alone, which is the least work."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, s: Tensor | Dual, *conditions: Tensor | None) -> Tensor | Dual:
        if not isinstance(s, Dual):
            return self.network(x, t, s, *conditions)
        result = torch.func.jvp(lambda y: self.network(x, t, y, *conditions), (s.value,), (s.tangent,))
        return Dual(*result)


def _plain_attention(q: Dual, k: Dual, v: Dual) -> Dual:
    return attention_reference(q, k, v)


def _math_attention(q: Dual, k: Dual, v: Dual) -> Dual:
    with sdpa_kernel(SDPBackend.MATH):
        return Dual(F.scaled_dot_product_attention(q.value, k.value, v.value))


@contextmanager
def attention_is(name: str) -> Iterator[None]:
    """The networks' attention is replaced meanwhile; an empty name leaves it."""
    own = layers.attention
    if name:
        layers.attention = _plain_attention if name == "reference" else _math_attention  # type: ignore
    try:
        yield
    finally:
        layers.attention = own


def make_zeros_dense() -> None:
    """Let PyTorch's compiler compile a jvp; to be called before anything is compiled.

    A jvp has zeros without memory in it, and the backward pass that is compiled of them fails (seen with
    2.13): "ZeroTensors are immutable". Making them ordinary zeros is the least that lets it work.
    """
    from torch._inductor.decomposition import decompositions

    def zeros(size: Any, **options: Any) -> Tensor:
        return torch.zeros(size, dtype=options.get("dtype"), device=options.get("device"))

    decompositions[torch.ops.aten._efficientzerotensor.default] = zeros


def make_network(case: Case, device: torch.device) -> DiT:
    """Always the same weights, none of them zero: behind a zero-initialised layer all gradients are zero."""
    torch.manual_seed(0)
    # The spectral initialisation finds largest singular values: minutes for a large network.
    with torch.device(device):
        network = DiT(replace(case.config, spectral_init=False), case.shape, case.class_count)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor | None, ...]:
    """x0, noise, t, s, s', labels and guidance weights, all of random numbers."""
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(case.batch, *case.shape, generator=random) for _ in range(2))
    labels = torch.randint(case.class_count, (case.batch,), generator=random)
    w = case.guidance_weight
    weights = None if w is None else torch.full((case.batch,), w)
    inputs = (x0, noise, *sample_times(TimesConfig(), RowDraws(0), range(case.batch)), labels, weights)
    return tuple(None if x is None else x.to(device) for x in inputs)


class Step:
    """A full training step: target, both terms, gradients, AdamW, both moving averages.

    Args:
        way: how the loss is computed.
        case: network and batch.
        device: where.
        autocast: precision of the networks, or None for float32.
    """

    def __init__(self, way: Way, case: Case, device: torch.device, autocast: torch.dtype | None) -> None:
        self.way, self.case, self.device, self.autocast = way, case, device, autocast
        self.inputs = make_inputs(case, device)
        self.network = make_network(case, device)
        self.target = ParameterAverage(self.network, 0.99, warmup=False)
        self.evaluation = ParameterAverage(self.network, case.evaluation_ema, warmup=False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=case.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.loss: Callable[..., Any] = tvm_loss
        self.online: nn.Module = self.network
        if way.jvp:
            self.online = JVPOfS(self.network)
            self.loss = torch.compile(tvm_loss) if way.compiled else tvm_loss
        else:
            accelerate(self.network, recompute=way.recompute, compiled=way.compiled)
            accelerate(self.target.network, compiled=way.compiled)
        self.steps = 0

    def gradients(self) -> Tensor:
        """The loss; its gradients are in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with attention_is(self.way.attention):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss = self.loss(self.online, self.target.network, *self.inputs, scaled=True).loss
            loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    def __call__(self, _: object = None) -> None:
        """As `tvmatch.training.step.training_step` does it, and the averages."""
        loss = self.gradients()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self.network.parameters()])  # type: ignore
        if not torch.isfinite(loss + norm).item():
            raise RuntimeError(
                f"{self.way.name}: the loss is {loss.item()}, its gradient's norm {norm.item()}"
            )
        self.optimizer.step()
        self.steps += 1
        for average in (self.target, self.evaluation):
            average.update(self.network, self.steps)


def forward_flops(case: Case) -> float:
    """FLOPs of one plain pass of the batch, as PyTorch counts products; nothing is computed."""
    with FakeTensorMode():
        network = DiT(case.config, case.shape, case.class_count)
        x, t = torch.empty(case.batch, *case.shape), torch.empty(case.batch)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_is("reference"):
            network(x, t, t)
    return float(counter.get_total_flops())


def float64_gradients(case: Case, device: torch.device) -> tuple[float, list[Tensor]]:
    """The loss and its gradients at the first weights, in float64; blocks are recomputed to save memory."""
    network = make_network(case, device).double()
    inputs = [x.double() if x is not None and x.is_floating_point() else x for x in make_inputs(case, device)]
    target = make_network(case, device).double().requires_grad_(False)
    accelerate(network, recompute="blocks")
    loss = tvm_loss(network, target, *inputs, scaled=True).loss  # type: ignore[arg-type]
    loss.backward()
    return loss.item(), [parameter.grad for parameter in network.parameters()]  # type: ignore[misc]


def errors(step: Step, reference: tuple[float, list[Tensor]]) -> tuple[float, float]:
    """Relative errors of the loss and of the whole gradient, at the first weights."""
    loss = step.gradients().item()
    squares = [0.0, 0.0]
    for parameter, expected in zip(step.network.parameters(), reference[1], strict=True):
        assert parameter.grad is not None
        squares[0] += (parameter.grad.double() - expected).square().sum().item()
        squares[1] += expected.square().sum().item()
    return abs(loss - reference[0]) / abs(reference[0]), math.sqrt(squares[0] / squares[1])
