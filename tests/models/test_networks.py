"""DiT, MLP and the wrapper as functions: derivatives against independent ones, and their arguments."""

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import (
    NETWORKS,
    Inputs,
    central_difference,
    in_direction_s,
    jvp,
    random_inputs,
    randomize_,
    relative_error,
    small_dit,
    value_and_tangent,
)
from torch import Tensor, nn

from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models import MLP, DiT, DiTConfig, JVPNetwork, MLPConfig

# Sums of a few hundred float64 numbers in another order, through a dozen layers.
EXACT = 1e-10
# `central_difference` is good to about 1e-13 times a fifth derivative.
DIFFERENCES = 1e-7

Case = tuple[DiT | MLP, Inputs]


@pytest.fixture(params=list(NETWORKS.values()), ids=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> Case:
    """A network in float64 with nothing zero in it, and inputs."""
    torch.manual_seed(0)
    network = randomize_(request.param().double())
    return network, random_inputs(network.shape, network.class_count)


def test_derivative_in_s(case: Case) -> None:
    network, inputs = case
    x, t, s, labels, weight = inputs
    value, tangent = in_direction_s(network, inputs)
    plain = network(x, t, s, labels, weight)
    _, by_jvp = jvp(lambda s: network(x, t, s, labels, weight), (s,), (torch.ones_like(s),))
    difference = central_difference(lambda step: network(x, t, s + step, labels, weight))
    assert value.shape == tangent.shape == x.shape
    assert relative_error(value, plain) < EXACT
    assert relative_error(tangent, by_jvp) < EXACT
    assert relative_error(tangent, difference) < DIFFERENCES


@pytest.mark.parametrize("carried", list(itertools.product([False, True], repeat=3))[1:])
def test_derivative_in_x_t_and_s(carried: tuple[bool, bool, bool]) -> None:
    network = randomize_(small_dit((3, 4, 4), 5).double())
    x, t, s, labels, weight = random_inputs((3, 4, 4), 5)
    draws = torch.Generator().manual_seed(1)
    tangents = [torch.randn(y.shape, generator=draws, dtype=y.dtype) for y in (x, t, s)]
    duals = [Dual(y, dy if has else None) for y, dy, has in zip((x, t, s), tangents, carried, strict=True)]
    _, tangent = value_and_tangent(network, *duals, labels, weight)

    given = tuple(dy * has for dy, has in zip(tangents, carried, strict=True))
    _, by_jvp = jvp(lambda *y: network(*y, labels, weight), (x, t, s), given)
    difference = central_difference(
        lambda step: network(*(y + step * dy for y, dy in zip((x, t, s), given, strict=True)), labels, weight)
    )
    assert relative_error(tangent, by_jvp) < EXACT
    assert relative_error(tangent, difference) < DIFFERENCES


def scalar(value: Tensor, tangent: Tensor) -> Tensor:
    """A function of both that is linear in neither."""
    return (value * tangent).mean() + tangent.square().mean() + value.sin().mean()


def test_gradients_through_the_tangent(case: Case) -> None:
    """Of a scalar of (F, ∂_s F) in every parameter, against autograd through the JVP of the plain forward."""
    network, inputs = case
    x, t, s, labels, weight = inputs
    parameters = dict(network.named_parameters())
    actual = torch.autograd.grad(scalar(*in_direction_s(network, inputs)), list(parameters.values()))
    through_jvp = jvp(lambda s: network(x, t, s, labels, weight), (s,), (torch.ones_like(s),))
    expected = torch.autograd.grad(scalar(*through_jvp), list(parameters.values()))
    largest = max(gradient.norm().item() for gradient in expected)
    for name, mine, theirs in zip(parameters, actual, expected, strict=True):
        # Relative to the largest: a bias ahead of LayerNorm's centring or a softmax has a gradient near 0.
        assert (mine - theirs).norm().item() < EXACT * largest, name
        assert theirs.any(), name

    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def along(step: float) -> Tensor:
        moved = {name: parameter + step * direction[name] for name, parameter in parameters.items()}
        dual_s = Dual(s, torch.ones_like(s))
        output = torch.func.functional_call(network, moved, (x, t, dual_s, labels, weight))
        return scalar(*output)

    slope = sum((gradient * direction[name]).sum() for name, gradient in zip(parameters, actual, strict=True))
    with torch.no_grad():
        # A step of 1e-3 in thousands of parameters at once would be a large one.
        difference = central_difference(along, step=1e-4)
    assert float((torch.as_tensor(slope) - difference).abs() / difference.abs()) < 1e-5


def test_constant_duals_give_a_constant(case: Case) -> None:
    network, (x, t, s, labels, weight) = case
    output = network(Dual(x), Dual(t), Dual(s), labels, weight)
    assert isinstance(output, Dual)
    assert output.tangent is None
    assert torch.equal(output.value, network(x, t, s, labels, weight))


def test_labels_none_means_dropped_and_guidance_none_means_one(case: Case) -> None:
    network, (x, t, s, _, weight) = case
    dropped = torch.full((len(x),), network.class_count) if network.class_count else None
    expected = network(x, t, s, dropped, torch.ones_like(t))
    assert torch.equal(network(x, t, s), expected)
    if dropped is not None:
        assert not torch.allclose(network(x, t, s, torch.zeros_like(dropped)), expected)
    sees_guidance = network.conditioning.guidance is not None
    assert torch.allclose(network(x, t, s, None, weight), expected) != sees_guidance


def test_samples_do_not_mix(case: Case) -> None:
    network, inputs = case
    whole = network(*inputs)
    for i in range(len(whole)):
        one = [None if argument is None else argument[i : i + 1] for argument in inputs]
        assert relative_error(network(*one), whole[i : i + 1]) < EXACT


def test_wrong_arguments() -> None:
    network, points = small_dit((1, 4, 6), 0), MLP(MLPConfig(8, 1, 4), (2,))
    x, t, s, _, _ = random_inputs((1, 6, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\(3, 1, 6, 4\).*\(B, 1, 4, 6\)"):
        network(x, t, s)
    with pytest.raises(ValueError, match="labels"):
        network(x.mT, t, s, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(B, 2\)"):
        points(torch.zeros(3, 3), t, s)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preset": "XXL/2"}, "network.preset: no preset 'XXL/2'"),
        ({"hidden_size": None}, "network.hidden_size"),
        ({"depth": 0}, "network.depth"),
        ({"heads": 3}, "network.heads: 3"),
        ({"hidden_size": 6}, "network.hidden_size.*6"),
        ({"patch_size": 3}, "network.patch_size: 3"),
        ({"mlp_ratio": 0}, "network.mlp_ratio.*0"),
        ({"mlp_ratio": math.nan}, "network.mlp_ratio.*nan"),
        ({"time_frequencies": 0}, "network.time_frequencies.*0"),
        ({"time_embedding_init": "spectal"}, "network.time_embedding_init.*'spectal'"),
    ],
)
def test_wrong_sizes_of_a_dit(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        small_dit((1, 4, 4), 0, **changes)


def test_data_of_another_kind() -> None:
    with pytest.raises(InputError, match=r"images.*\(2,\)"):
        DiT(DiTConfig(preset="tiny/2"), (2,))
    with pytest.raises(InputError, match=r"points.*\(1, 8, 8\)"):
        MLP(MLPConfig(), (1, 8, 8))


@pytest.mark.parametrize("name", ["hidden_size", "depth", "time_frequencies"])
def test_wrong_sizes_of_an_mlp(name: str) -> None:
    with pytest.raises(InputError, match=f"network.{name}.*0"):
        MLPConfig(**{name: 0})


def test_own_sizes_override_the_presets() -> None:
    config = DiTConfig(preset="S/2", depth=3, heads=4)
    assert tuple(config.size()) == (384, 3, 4, 2)


class Wave(nn.Module):
    """A user's own network: F = a sin(x + b t) (1 + s)², so ∂_s F = 2 a sin(x + b t) (1 + s)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.a * torch.sin(x + self.b * t[:, None]) * (1 + s[:, None]) ** 2


def test_wrapper_of_a_known_function() -> None:
    wave = Wave().double()
    x, t, s, _, weight = random_inputs((2,))
    value, tangent = value_and_tangent(JVPNetwork(wave), x, t, Dual(s, torch.ones_like(s)), None, weight)
    sine = torch.sin(x + wave.b * t[:, None])
    assert relative_error(value, wave.a * sine * (1 + s[:, None]) ** 2) < EXACT
    assert relative_error(tangent, 2 * wave.a * sine * (1 + s[:, None])) < EXACT
    gradients = torch.autograd.grad(scalar(value, tangent), list(wave.parameters()))
    closed = scalar(wave(x, t, s), 2 * wave.a * sine * (1 + s[:, None]))
    for mine, theirs in zip(gradients, torch.autograd.grad(closed, list(wave.parameters())), strict=True):
        assert relative_error(mine, theirs) < EXACT
    assert torch.equal(JVPNetwork(wave)(x, t, s), wave(x, t, s))
    with pytest.raises(TypeError, match="labels"):
        JVPNetwork(wave)(x, t, s, torch.zeros(3, dtype=torch.int64))


def test_wrapper_agrees_with_the_native_path(case: Case) -> None:
    network, inputs = case
    if network.class_count == 0:
        inputs = inputs._replace(labels=None)
    native, wrapped = in_direction_s(network, inputs), in_direction_s(JVPNetwork(network), inputs)
    parameters = list(network.parameters())
    gradients = [torch.autograd.grad(scalar(*pair), parameters) for pair in (native, wrapped)]
    for mine, theirs in zip((*wrapped, *gradients[1]), (*native, *gradients[0]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=EXACT, atol=EXACT)
    plain = JVPNetwork(network)(*inputs)
    assert torch.equal(plain, network(*inputs))
    constant = JVPNetwork(network)(inputs.x, inputs.t, Dual(inputs.s), *inputs[3:])
    assert constant.tangent is None
