"""Networks in SiT's layout: the first velocity is theirs, with time reversed."""

import math

import pytest
import torch
from helpers import random_inputs, randomize_, relative_error, small_dit
from torch import Tensor
from torch.nn import functional as F

from tvmatch.errors import InputError
from tvmatch.interop import network_to_authors
from tvmatch.interop.checkpoints.sit import is_sit, network_from_sit, sit_heads

HEADS, CLASSES = 2, 5
WITHOUT = dict.fromkeys(("rms_norm", "qk_norm", "modulation_norm", "guidance_embedding"), False)


def sit_state(*, variance: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in SiT's names, float64; with a variance the head has twice the channels."""
    network = randomize_(small_dit((3, 4, 4), CLASSES, **WITHOUT), seed).double()
    state = network_to_authors(network)
    state = {name.removeprefix("model."): x for name, x in state.items() if ".s_embedder." not in name}
    if variance:
        for name in ("weight", "bias"):
            rows = state[f"final_layer.linear.{name}"].unflatten(0, (4, 3))
            state[f"final_layer.linear.{name}"] = torch.cat([rows, torch.randn_like(rows)], 1).flatten(0, 1)
    return state


def sit_velocity(state: dict[str, Tensor], x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    """A SiT straight from its paper's figure, with plain functions: an independent forward pass."""

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulate(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal = F.layer_norm(value, value.shape[-1:], eps=1e-6)
        return normal * (1 + scale[:, None]) + shift[:, None]

    count = state["t_embedder.mlp.0.weight"].shape[1] // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(count, dtype=torch.float64) / count)
    angles = time[:, None] * frequencies
    features = torch.cat([angles.cos(), angles.sin()], 1)
    condition = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    condition = condition + state["y_embedder.embedding_table.weight"][labels]
    kernel = state["x_embedder.proj.weight"]
    tokens = F.conv2d(x, kernel, state["x_embedder.proj.bias"], stride=2).flatten(2).mT + state["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for block in (f"blocks.{i}" for i in range(depth)):
        six = linear(f"{block}.adaLN_modulation.1", F.silu(condition)).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", modulate(tokens, six[0], six[1]))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        mixed = linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        tokens = tokens + six[2][:, None] * mixed
        hidden = F.gelu(linear(f"{block}.mlp.fc1", modulate(tokens, six[3], six[4])), approximate="tanh")
        tokens = tokens + six[5][:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(condition)).chunk(2, 1)
    patches = linear("final_layer.linear", modulate(tokens, shift, scale))
    side = x.shape[-1] // 2
    image = patches.unflatten(-1, (2, 2, -1)).unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return image.flatten(4, 5).flatten(2, 3)[:, :3]


@pytest.mark.parametrize("variance", [False, True], ids=["velocity", "velocity and variance"])
def test_the_first_velocity_is_the_teachers(variance: bool) -> None:
    state = sit_state(variance=variance)
    network = network_from_sit(state, heads=HEADS)
    x, t, s, labels, _ = random_inputs((3, 4, 4), CLASSES)
    assert labels is not None
    wanted = -sit_velocity(state, x, 1 - t, labels)
    for end in (t, s, torch.zeros_like(s)):
        actual = network(x, t, end, labels)
        assert isinstance(actual, Tensor)
        # Rounding of two float64 passes through two blocks; the rotation of the features rounds once more.
        assert relative_error(actual, wanted) < 1e-12


def test_the_duration_can_be_learned() -> None:
    """What is zero at first has a gradient."""
    network = network_from_sit(sit_state(), heads=HEADS)
    x, t, s, labels, _ = random_inputs((3, 4, 4), CLASSES)
    output = network(x, t, s, labels)
    assert isinstance(output, Tensor)
    output.square().sum().backward()
    duration = network.conditioning.duration.project.weight
    assert not duration.any()
    assert duration.grad is not None
    assert duration.grad.any()


def test_layouts_are_told_apart() -> None:
    assert is_sit(sit_state())
    assert is_sit({f"model.{name}": x for name, x in sit_state().items()})
    assert not is_sit(network_to_authors(small_dit((3, 4, 4), 2)))


@pytest.mark.parametrize(("hidden_size", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_sizes(hidden_size: int, heads: int) -> None:
    """Table 1 of arXiv 2212.09748, for S, B, L and XL. Another number is another network, without a word."""
    assert sit_heads({"x_embedder.proj.weight": torch.empty(hidden_size, 4, 2, 2)}) == heads


@pytest.mark.parametrize(
    "name", ["final_layer.linear.weight", "t_embedder.mlp.0.weight", "blocks.1.mlp.fc1.bias"]
)
def test_a_missing_tensor_is_named(name: str) -> None:
    state = sit_state()
    del state[name]
    with pytest.raises(InputError, match=name):
        network_from_sit(state, heads=HEADS)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("t_embedder.mlp.0.weight", (16,)),
        ("t_embedder.mlp.0.weight", (16, 7)),
        ("t_embedder.mlp.0.weight", (16, 8, 1)),
        ("t_embedder.mlp.0.weight", (16, 0)),
        ("t_embedder.mlp.2.weight", ()),
        ("x_embedder.proj.weight", (16, 3, 0, 0)),
        ("x_embedder.proj.weight", (16, 12)),
        ("final_layer.linear.weight", ()),
        ("final_layer.linear.bias", ()),
    ],
)
def test_tensors_of_other_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=name):
        network_from_sit(sit_state() | {name: torch.ones(shape)}, heads=HEADS)


def test_other_tensors_are_named() -> None:
    with pytest.raises(InputError, match="unexpected tensors \\['extra'\\]"):
        network_from_sit(sit_state() | {"extra": torch.ones(1)}, heads=HEADS)
    wrong = sit_state() | {"final_layer.linear.weight": torch.ones(13, 16)}
    with pytest.raises(InputError, match=r"final_layer.linear has 13 rows"):
        network_from_sit(wrong, heads=HEADS)
