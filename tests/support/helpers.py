"""Shared by the tests: small networks, inputs, derivatives."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvmatch.dual import Dual
from tvmatch.models import MLP, DiT, DiTConfig, MLPConfig
from tvmatch.seeds import generator

M = TypeVar("M", bound=nn.Module)


class Inputs(NamedTuple):
    """Arguments of a network: x (B, *shape), s < t and w ≥ 1 of shape (B,), labels int64 (B,) or None."""

    x: Tensor
    t: Tensor
    s: Tensor
    labels: Tensor | None
    guidance_weight: Tensor


class NothingLarger(TorchDispatchMode):
    """No operation gives a tensor of more than `most` numbers."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, Tensor) or tensor.numel() <= self.most, (function, tensor.shape)
        return result


@torch.no_grad()
def randomize_(network: M, seed: int = 0) -> M:
    """Add noise to every parameter, in place: behind zero-initialised layers a test compares 0 with 0."""
    draws = generator(seed, "randomize")
    for parameter in network.parameters():
        std = 0.3 if parameter.ndim == 1 else 0.5 / math.sqrt(parameter.shape[1])
        noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        parameter.add_((std * noise).to(parameter))
    return network


def random_inputs(
    shape: tuple[int, ...],
    class_count: int = 0,
    *,
    batch: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """One label is the dropped one (where there are classes), and its w is 1."""
    draws = generator(seed, "inputs")
    x = torch.randn(batch, *shape, generator=draws, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(batch, generator=draws, dtype=torch.float64)
    s = t * torch.rand(batch, generator=draws, dtype=torch.float64)
    weight = 1 + torch.rand(batch, generator=draws, dtype=torch.float64)
    labels = None
    if class_count:
        labels = torch.randint(class_count, (batch,), generator=draws)
        labels[-1] = class_count
        weight[-1] = 1
    return Inputs(x.to(dtype), t.to(dtype), s.to(dtype), labels, weight.to(dtype))


def central_difference(function: Callable[[float], Tensor], step: float = 1e-3) -> Tensor:
    """f′(0) to fourth order: [8 (f(h) − f(−h)) − (f(2h) − f(−2h))] / 12h.

    In float64 the truncation error h⁴ f⁽⁵⁾/30 and the rounding error 1e-16 f/h are near 1e-13 each.
    """
    near = function(step) - function(-step)
    far = function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def jvp(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Value and tangent of a plain function by PyTorch's forward mode."""
    result = torch.func.jvp(function, inputs, tangents)
    return result[0], result[1]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; infinite if shapes differ or what is expected is zero."""
    if actual.shape != expected.shape or not expected.any():
        return math.inf
    return float(((actual - expected).norm() / expected.norm()).detach())


def value_and_tangent(network: nn.Module, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The two parts of a Dual output."""
    output = network(*arguments)
    assert isinstance(output, Dual)
    assert output.tangent is not None
    return output.value, output.tangent


def in_direction_s(network: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """F and ∂_s F."""
    return value_and_tangent(network, *inputs._replace(s=Dual(inputs.s, torch.ones_like(inputs.s))))  # type: ignore[arg-type]


def small_dit(shape: tuple[int, int, int], class_count: int, **switches: Any) -> DiT:
    """A DiT of two blocks, its switches as given; always the same weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "depth": 2, "heads": 2, "patch_size": 2, "time_frequencies": 8}
    return DiT(DiTConfig(**(sizes | switches)), shape, class_count)


OFF = ("rms_norm", "qk_norm", "modulation_norm", "spectral_init", "guidance_embedding")
# Every switch of the DiT, 1 to 4 channels, square and rectangular images, with classes and without.
NETWORKS: dict[str, Callable[[], DiT | MLP]] = {
    "DiT": lambda: small_dit((3, 4, 4), 5),
    "DiT unconditional, rectangular": lambda: small_dit((1, 4, 6), 0),
    "DiT of 4 channels, upright, whole patches of 4": lambda: small_dit((4, 8, 4), 2, patch_size=4),
    "DiT without everything": lambda: small_dit((1, 4, 4), 3, **dict.fromkeys(OFF, False)),
    **{f"DiT without {name}": partial(small_dit, (1, 2, 4), 3, **{name: False}) for name in OFF},
    "DiT with normal time embeddings": lambda: small_dit((1, 4, 2), 3, time_embedding_init="normal"),
    "DiT with a narrow MLP": lambda: small_dit((1, 2, 4), 0, mlp_ratio=0.5, heads=4),
    "MLP": lambda: MLP(MLPConfig(hidden_size=12, depth=2, time_frequencies=8), (2,)),
    "MLP of classes, in three dimensions": lambda: MLP(MLPConfig(12, 2, 8), (3,), 4),
}
