"""Networks in the authors' tensor names: other sizes and switches than the reference case, and bad input."""

from typing import Any

import pytest
import torch
from helpers import random_inputs, randomize_, small_dit
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.interop import network_from_authors, network_to_authors
from tvmatch.models import DiT


def dit(shape: tuple[int, int, int] = (3, 4, 4), class_count: int = 5, **switches: Any) -> DiT:
    return randomize_(small_dit(shape, class_count, **({"heads": 4} | switches)).double())


@pytest.mark.parametrize(
    ("shape", "class_count", "switches"),
    [
        ((3, 4, 4), 5, {}),
        ((1, 4, 4), 0, {}),
        ((4, 8, 8), 1, {"patch_size": 4, "depth": 3, "heads": 2}),
        ((2, 6, 6), 2, {"qk_norm": False}),
        ((2, 6, 6), 2, {"modulation_norm": False}),
        ((2, 6, 6), 2, {"qk_norm": False, "modulation_norm": False, "guidance_embedding": False}),
        ((1, 2, 2), 2, {"hidden_size": 28, "mlp_ratio": 61 / 28, "time_frequencies": 3}),
    ],
)
def test_round_trip(shape: tuple[int, int, int], class_count: int, switches: dict[str, Any]) -> None:
    network = dit(shape, class_count, **switches)
    options = {name: switches.get(name, True) for name in ("qk_norm", "modulation_norm")}
    again = network_from_authors(network_to_authors(network), heads=switches.get("heads", 4), **options)
    inputs = random_inputs(shape, class_count)
    assert torch.equal(again(*inputs), network(*inputs))
    assert again.state_dict().keys() == network.state_dict().keys()


def test_exports_are_copies() -> None:
    network = dit()
    exported = network_to_authors(network)
    before = network.head.bias.detach().clone()
    for tensor in exported.values():
        tensor.zero_()
    assert torch.equal(network.head.bias, before)


def test_precision_is_kept() -> None:
    for dtype in (torch.float32, torch.float64):
        again = network_from_authors(network_to_authors(dit().to(dtype)), heads=4)
        assert again.head.weight.dtype == dtype


def without(name: str) -> dict[str, Tensor]:
    tensors = network_to_authors(dit())
    del tensors[name]
    return tensors


def changed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return network_to_authors(dit()) | {name: tensor}


def test_the_positions_of_the_file_are_used() -> None:
    theirs = network_to_authors(dit())
    theirs["model.pos_embed"] = theirs["model.pos_embed"] + 1e-4
    again = network_to_authors(network_from_authors(theirs, heads=4))
    assert torch.equal(again["model.pos_embed"], theirs["model.pos_embed"])


def test_mixed_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"precision: torch\.float16, torch\.float(32|64)"):
        network_from_authors(changed("model.pos_embed", dit().positions.half()[None]), heads=4)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "missing tensor x_embedder.proj.weight"),
        ({"blocks.x": torch.zeros(1)}, "missing tensor"),
        (without("model.x_embedder.proj.weight"), "missing tensor x_embedder.proj.weight"),
        (without("model.pos_embed"), "missing tensor pos_embed"),
        (without("model.blocks.1.attn.qkv.bias"), "missing tensors.*blocks.1.attn.qkv.bias"),
        (changed("model.extra", torch.zeros(1)), "unexpected tensors.*extra"),
        (changed("model.blocks.last.attn", torch.zeros(1)), "names and shapes"),
        (changed("model.pos_embed", torch.zeros(16)), "names and shapes"),
        (changed("model.pos_embed", torch.zeros(1, 4, 16)), "pos_embed is not the fixed"),
        (changed("model.x_embedder.proj.weight", torch.zeros(16, 12)), "x_embedder.proj.weight"),
        (
            changed("model.final_layer.linear.bias", torch.zeros(3)),
            r"final_layer.linear.bias.*\(3,\).*\(12,\)",
        ),
        (
            changed("model.final_layer.linear.bias", torch.zeros(12, dtype=torch.int64)),
            "final_layer.linear.bias.*int64",
        ),
    ],
)
def test_foreign_state_dicts(state_dict: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        network_from_authors(state_dict, heads=4)
    assert "\n" not in str(caught.value)


def test_wrong_number_of_heads() -> None:
    with pytest.raises(InputError, match=r"heads.*3"):
        network_from_authors(network_to_authors(dit()), heads=3)
    with pytest.raises(InputError, match="q_norm"):  # of the wrong head width
        network_from_authors(network_to_authors(dit()), heads=2)
