"""Numbers of an independent implementation in float64: every output and every gradient of `data/case_a`.

The case was computed with the TVM authors' public code (see `data/README.md`); data only.
"""

from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file
from torch import Tensor

from tvmatch.dual import Dual
from tvmatch.flow_map import FlowMap, interpolate
from tvmatch.interop import network_from_authors, network_to_authors
from tvmatch.models import DiT
from tvmatch.objectives import tvm_loss
from tvmatch.sampling import sample_trajectory, time_grid

# Two float64 implementations of the same sums differ by rounding only, 1e-12 here; 1e-8 is what we promise.
TOLERANCE = 1e-8


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "files" / "case_a.safetensors")


def part(case: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in case.items() if name.startswith(prefix)}


@pytest.fixture
def network(case: dict[str, Tensor]) -> DiT:
    return network_from_authors(part(case, "net."), heads=2)


@pytest.fixture
def target(case: dict[str, Tensor]) -> DiT:
    return network_from_authors(part(case, "target."), heads=2)


def test_network_and_flow_map(case: dict[str, Tensor], network: DiT, target: DiT) -> None:
    inputs = part(case, "in.")
    t, s, s_prime, labels, w = (
        inputs["t"],
        inputs["s"],
        inputs["s_prime"],
        inputs["labels_index"],
        1 / inputs["beta"],
    )
    x_t = interpolate(inputs["x0"], inputs["noise"], t)
    x_s_prime = interpolate(inputs["x0"], inputs["noise"], s_prime)
    output = network(x_t, t, Dual(s, torch.ones_like(s)), labels, w)
    assert isinstance(output, Dual)
    online, frozen = FlowMap(network, scaled=True), FlowMap(target, scaled=True)
    jump = online.displacement_and_terminal_velocity(x_t, t, s, labels, w)
    unconditional = frozen.velocity(x_s_prime, s_prime)
    weight = w.view(-1, 1, 1, 1)
    actual = {
        "F": output.value,
        "dF_ds": output.tangent,
        "f": x_t + jump.displacement,
        "df_ds": jump.terminal_velocity,
        "target_velocity": frozen.velocity(x_t + jump.displacement, s, labels, w),
        "F_uncond": unconditional,
        "F_ss": online.velocity(x_s_prime, s_prime, labels, w),
        "v_cfg_target": weight * (inputs["noise"] - inputs["x0"]) + (1 - weight) * unconditional,
    }
    assert relative_error(x_t, inputs["xt"]) < TOLERANCE
    assert relative_error(x_s_prime, inputs["xs_prime"]) < TOLERANCE
    for name, tensor in actual.items():
        assert tensor is not None
        assert relative_error(tensor, case[f"out.{name}"]) < TOLERANCE, name


def test_loss_and_gradients(case: dict[str, Tensor], network: DiT, target: DiT) -> None:
    inputs = part(case, "in.")
    result = tvm_loss(
        network,
        target,
        inputs["x0"],
        inputs["noise"],
        inputs["t"],
        inputs["s"],
        inputs["s_prime"],
        inputs["labels_index"],
        1 / inputs["beta"],
        scaled=True,
    )
    result.loss.backward()  # type: ignore[no-untyped-call]
    assert relative_error(result.terminal, case["out.terminal_loss"]) < TOLERANCE
    assert relative_error(result.flow, case["out.fm_loss"]) < TOLERANCE
    assert relative_error(result.loss, case["out.loss"]) < TOLERANCE
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.grad)
    gradients, expected = network_to_authors(network), part(case, "grad.")
    del gradients["model.pos_embed"]
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < TOLERANCE, name
    assert all(parameter.grad is None for parameter in target.parameters())


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_round_trip(case: dict[str, Tensor], prefix: str) -> None:
    theirs = {prefix + name: x for name, x in part(case, "net.model.").items()}
    exported = network_to_authors(network_from_authors(theirs, heads=2))
    assert exported.keys() == part(case, "net.").keys()
    for name, tensor in part(case, "net.").items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples(case: dict[str, Tensor], network: DiT, steps: int) -> None:
    states = sample_trajectory(
        FlowMap(network, scaled=True),
        case["in.noise"],
        time_grid(steps),
        labels=case["in.labels_index"],
        guidance_weight=2.0,
    )
    assert relative_error(states[-1], case[f"out.sample_{steps}"]) < TOLERANCE
