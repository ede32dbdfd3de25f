"""Group norm, and norms by running statistics, in forward mode: any memory format, any precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forward_mode_tools import DOUBLE, derivatives
from helpers import central_difference, jvp, randomize_, relative_error
from torch import Tensor, nn

from tvmatch.attention import repair_forward_mode
from tvmatch.dual import Dual
from tvmatch.models import JVPNetwork
from tvmatch.seeds import generator

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def group_norm_by_hand(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(len(x), groups, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    return rows.reshape(x.shape) * weight.reshape(shape) + bias.reshape(shape)


def arguments(*sizes: int) -> tuple[list[Tensor], list[Tensor]]:
    draws = generator(0, "group norm")
    shapes = [(2, 6, *sizes), (6,), (6,)]
    values, tangents = ([torch.randn(s, generator=draws, dtype=torch.float64) for s in shapes] for _ in "12")
    return values, tangents


@pytest.mark.parametrize("tangent_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("value_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_in_any_memory_format(
    groups: int, value_format: torch.memory_format, tangent_format: torch.memory_format
) -> None:
    values, tangents = arguments(3, 4)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with repair_forward_mode():
            return F.group_norm(x, groups, weight, bias)

    def right(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_by_hand(x, groups, weight, bias)

    expected = derivatives(right, values, tangents)
    values[0] = values[0].contiguous(memory_format=value_format)
    tangents[0] = tangents[0].contiguous(memory_format=tangent_format)
    actual = derivatives(ours, values, tangents)
    torch.testing.assert_close(actual, expected, **DOUBLE)
    assert actual[0].is_contiguous(memory_format=value_format)


@pytest.mark.parametrize("sizes", [(), (5,), (2, 3, 4)])
def test_group_norm_of_other_shapes(sizes: tuple[int, ...]) -> None:
    values, tangents = arguments(*sizes)

    def ours(*x: Tensor) -> Tensor:
        with repair_forward_mode():
            return F.group_norm(x[0], 2, *x[1:])

    expected = derivatives(lambda *x: group_norm_by_hand(x[0], 2, *x[1:]), values, tangents)
    torch.testing.assert_close(derivatives(ours, values, tangents), expected, **DOUBLE)
    if len(sizes) == 3:
        values[0] = values[0].to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(derivatives(ours, values, tangents), expected, **DOUBLE)


@pytest.mark.parametrize(
    ("groups", "weight", "message"),
    [
        (4, None, r"input: .*num_groups=4.*\(2, 6, 3\)"),
        (0, None, "input"),
        (2, torch.ones(3), r"weight, bias: .*6"),
    ],
)
def test_group_norm_refuses(groups: int, weight: Tensor | None, message: str) -> None:
    x = torch.randn(2, 6, 3)
    with repair_forward_mode(), pytest.raises(ValueError, match=message):
        jvp(lambda y: F.group_norm(y, groups, weight), (x,), (x,))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, 6),
    "layer norm": lambda: nn.LayerNorm((6, 3, 4)),
    "batch norm": lambda: nn.BatchNorm2d(6).eval(),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(),
    "RMS norm": lambda: nn.RMSNorm((6, 3, 4)),
}


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", NORMS)
def test_half_precision_beside_single(name: str, memory_format: torch.memory_format) -> None:
    """As under autocast on a CPU: half an input, weights and statistics in float32."""
    norm = randomize_(NORMS[name]())
    if isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(torch.linspace(-1, 1, 6))
        norm.running_var.copy_(torch.linspace(0.5, 2, 6))
    (x, *_), (d, *_) = arguments(3, 4)
    x, d = (y.bfloat16().to(memory_format=memory_format) for y in (x, d))
    with repair_forward_mode():
        actual = jvp(norm, (x,), (d,))
        exact = jvp(norm.double(), (x.double(),), (d.double(),))
    for part, right in zip(actual, exact, strict=True):
        assert part.dtype == torch.bfloat16
        # Rounded once to 8 bits; PyTorch's RMS norm rounds its tangent in between.
        assert relative_error(part.double(), right) < (2**-6 if name == "RMS norm" else 2**-8)


class Unet(nn.Module):
    """Norms between convolutions, in the order of diffusers' residual blocks."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.times = nn.Linear(2, 6)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = norm()
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        times = self.times(torch.stack([t, s], -1)).sin()
        return self.last(F.silu(self.norm(self.first(x) + times[:, :, None, None])))


def value_tangent_and_gradients(module: nn.Module, x: Tensor, t: Tensor, s: Tensor) -> Any:
    output = JVPNetwork(module)(x, t, Dual(s, torch.ones_like(s)))
    assert isinstance(output, Dual)
    assert output.tangent is not None
    loss = (output.value.double() * output.tangent.double()).sin().sum()
    return *output, *torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["group norm", "batch norm"])
def test_a_network_under_autocast(name: str, memory_format: torch.memory_format) -> None:
    """Tangents and gradients differ from float64 by the rounding of two convolutions to bfloat16."""
    torch.manual_seed(0)
    network = randomize_(Unet(NORMS[name]))
    draws = generator(0, "u-net")
    x, t = torch.randn(2, 3, 4, 4, generator=draws), torch.tensor([0.9, 0.6])
    s = t / 2
    exact = value_tangent_and_gradients(network.double(), x.double(), t.double(), s.double())
    network = network.float().to(memory_format=memory_format)
    x = x.to(memory_format=memory_format)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            actual = value_tangent_and_gradients(network, x, t, s)
        assert actual[0].dtype == actual[1].dtype == dtype
        for part, right in zip(actual, exact, strict=True):
            assert relative_error(part.double(), right) < limit


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_diffusers_unet(memory_format: torch.memory_format) -> None:
    """`UNet2DModel` with attention, by the classes that diffusers writes with."""
    diffusers = pytest.importorskip("diffusers")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = diffusers.UNet2DModel(
                sample_size=4,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                layers_per_block=1,
                attention_head_dim=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )

        def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.model(x, 10 * t + s, return_dict=False)[0]

    torch.manual_seed(0)
    network = randomize_(Network()).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator(0, "u-net"))
    t = torch.tensor([0.9, 0.6], dtype=torch.float64)
    # diffusers computes the features of the times in float32 as its own constants say.
    expected = value_tangent_and_gradients(network, x, t, t / 2)
    moved = network.to(memory_format=memory_format)
    actual = value_tangent_and_gradients(moved, x.to(memory_format=memory_format), t, t / 2)
    for part, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(part, right, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        slope = central_difference(lambda h: moved(x, t, t / 2 + h), 1e-2)
        assert relative_error(actual[1], slope) < 1e-3  # float32 features
