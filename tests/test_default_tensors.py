"""The dtype and the device that a user sets for new tensors change no bit of ours.

A device "meta" finds every tensor that does not say where it belongs, on a machine with a CPU alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize_, small_dit
from torch import Tensor, nn

import tvmatch
from tvmatch.attention import attention
from tvmatch.data import TensorDataset
from tvmatch.data.spec import DataSpec
from tvmatch.dual import Dual
from tvmatch.models import MLP, JVPNetwork, MLPConfig
from tvmatch.objectives import tvm_loss
from tvmatch.sampling import sample_noise
from tvmatch.trained_model import TrainedModel

SETTINGS: dict[str, Callable[[], None]] = {
    "float64": partial(torch.set_default_dtype, torch.float64),
    "bfloat16": partial(torch.set_default_dtype, torch.bfloat16),
    "meta": partial(torch.set_default_device, "meta"),
}


@contextmanager
def in_force(setting: str) -> Iterator[None]:
    SETTINGS[setting]()
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


SPECS = {
    "DiT": DataSpec("image", (1, 4, 4), ("a", "b", "c"), (0.5,), (0.5,)),
    "MLP": DataSpec("points", (2,), None, (0.0, 0.0), (1.0, 1.0)),
}


def model(kind: str) -> TrainedModel:
    torch.manual_seed(0)
    network = small_dit((1, 4, 4), 3) if kind == "DiT" else MLP(MLPConfig(12, 2, 8), (2,))
    return TrainedModel(randomize_(network), SPECS[kind], scaled=True, guidance=2.0)


def of_loading(kind: str, folder: Path) -> Sequence[Tensor]:
    again = tvmatch.load(folder / kind)
    drawn = again.sample(count=3, steps=2), again.trajectory(count=2, steps=1)
    return *drawn, *again.network.state_dict().values()


def of_loss(kind: str, folder: Path) -> Sequence[Tensor]:
    spec, network = SPECS[kind], tvmatch.load(folder / kind).network.requires_grad_()
    draws = [sample_noise(seed, range(3), spec.shape) for seed in range(2)]
    times = [sample_noise(seed, range(3), ()).sigmoid() for seed in range(3)]
    given = draws[0], draws[1], times[0], times[1], times[2], None, times[0] + 1
    result = tvm_loss(network, network, *given, scaled=True)
    return *result, *torch.autograd.grad(result.loss, list(network.parameters()))


class Network(nn.Module):
    """Of all that forward mode replaces."""

    def __init__(self) -> None:
        super().__init__()
        norms = [nn.GroupNorm(1, 3), nn.LayerNorm(4), nn.BatchNorm1d(3).eval()]
        self.norms = nn.ModuleList([norm.to("cpu", torch.float32) for norm in norms])

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x = x * (t + s)[:, None, None]
        for norm in self.norms:
            x = norm(x).sin()
        mask = x.new_zeros(3, 3, dtype=torch.bool).logical_not().tril()
        return F.scaled_dot_product_attention(x, x, x) + F.scaled_dot_product_attention(x, x, x, mask)


NETWORK = JVPNetwork(Network())


def of_any_network(kind: str, folder: Path) -> Sequence[Tensor]:
    x, s = sample_noise(0, range(2), (3, 4)), sample_noise(1, range(2), ()).sigmoid()
    result = NETWORK(x, s, Dual(s, torch.ones_like(s)))
    assert isinstance(result, Dual)
    assert result.tangent is not None
    return result.value, result.tangent


def of_attention(kind: str, folder: Path) -> Sequence[Tensor]:
    q, k, v = (sample_noise(seed, range(2), (2, 5, 4)) for seed in range(3))
    lengths = torch.tensor([5, 0], device="cpu")
    found = [attention(Dual(q, k), k, v, causal=causal, key_lengths=lengths) for causal in (False, True)]
    return [part for dual in found for part in dual if part is not None]


def of_data(kind: str, folder: Path) -> Sequence[Tensor]:
    values = sample_noise(0, range(6), (1, 4, 4)).sigmoid()
    images = TensorDataset(values, [0, 1, 0, 1, 1, 0], class_names=["a", "b"], horizontal_flip=True)
    return [
        part for batch in (images.batch(3, 4, 0), images.take(3, 0)) for part in batch if part is not None
    ]


CASES = {
    "loading": of_loading,
    "loss": of_loss,
    "networks": of_any_network,
    "attention": of_attention,
    "data": of_data,
}


def bits(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, bytes]]:
    assert all(x.device.type == "cpu" for x in tensors)
    return [(x.dtype, x.detach().contiguous().numpy().tobytes()) for x in tensors]


WITHOUT_A_MODEL = ("networks", "attention", "data")  # the same for every kind of model: once is enough


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in SPECS for case in CASES if kind != "MLP" or case not in WITHOUT_A_MODEL],
)
def test_the_same_bits(kind: str, case: str, setting: str, tmp_path: Path) -> None:
    (tmp_path / kind).mkdir()
    model(kind).save(tmp_path / kind)
    expected = bits(CASES[case](kind, tmp_path))
    with in_force(setting):
        actual = bits(CASES[case](kind, tmp_path))
    assert actual == expected


def trained(recipe: str, folder: Path) -> Sequence[Tensor]:
    config: Any = tvmatch.recipe(recipe)
    config.training.steps, config.training.batch_size, config.network.hidden_size = 2, 8, 16
    own = tvmatch.train(config, config.data.load(), out=folder)
    read = tvmatch.load(folder)
    return *own.network.state_dict().values(), *read.network.state_dict().values(), read.sample(count=3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recipe", ["digits", "checkerboard"])
def test_training(recipe: str, setting: str, tmp_path: Path) -> None:
    expected = bits(trained(recipe, tmp_path / "none"))
    with in_force(setting):
        actual = bits(trained(recipe, tmp_path / setting))
    assert actual == expected
