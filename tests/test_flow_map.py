"""Flow map and objectives: derivatives, limits, and the loss written a second time, sample by sample."""

import copy
from typing import NamedTuple

import pytest
import torch
from helpers import Inputs, central_difference, jvp, random_inputs, randomize_, relative_error
from torch import Tensor, nn

from tvmatch.dual import Dual
from tvmatch.flow_map import FlowMap, interpolate
from tvmatch.models import MLP, DiT, DiTConfig, JVPNetwork, MLPConfig
from tvmatch.objectives import TVMLoss, flow_matching_loss, tvm_loss

# Two float64 computations of the same formula, through a small network; rounding is 1e-13.
EXACT = 1e-10
SHAPE, CLASSES, BATCH = (2, 4, 4), 3, 6


def network(seed: int = 0) -> DiT:
    config = DiTConfig(hidden_size=8, depth=1, heads=2, patch_size=2, time_frequencies=4)
    torch.manual_seed(seed)
    return randomize_(DiT(config, SHAPE, CLASSES).double(), seed)


@pytest.fixture
def online() -> DiT:
    return network(0)


@pytest.fixture
def target() -> DiT:
    return network(1)


@pytest.fixture
def inputs() -> Inputs:
    return random_inputs(SHAPE, CLASSES, batch=BATCH)


def test_interpolation_runs_from_data_to_noise() -> None:
    x0, noise = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    path = interpolate(x0, noise, t)
    for i in range(3):
        assert relative_error(path[i], (1 - t[i]) * x0[i] + t[i] * noise[i]) < EXACT


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_flow_map_of_a_known_network(scaled: bool, weighted: bool) -> None:
    """F = x + t s², so f = k (s − t)(x + t s²), u = k (x + s³), df/ds = k [x + t s² + (s − t) 2 t s]."""

    def known(
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual:
        assert isinstance(x, Tensor)
        assert isinstance(t, Tensor)
        if isinstance(s, Tensor):
            return x + (t * s**2)[:, None]
        assert s.tangent is not None
        return Dual(x + (t * s.value**2)[:, None], (2 * t * s.value * s.tangent)[:, None].expand_as(x))

    x, t, s, _, weight = random_inputs((2,))
    k = weight[:, None] if scaled and weighted else 1.0
    t_, s_ = t[:, None], s[:, None]
    flow_map, w = FlowMap(known, scaled), weight if weighted else None
    jump = flow_map.displacement_and_terminal_velocity(x, t, s, None, w)
    displacement = k * (s_ - t_) * (x + t_ * s_**2)
    assert relative_error(flow_map.displacement(x, t, s, None, w), displacement) < EXACT
    assert relative_error(jump.displacement, displacement) < EXACT
    assert relative_error(flow_map.velocity(x, s, None, w), k * (x + s_**3)) < EXACT
    terminal = k * (x + t_ * s_**2 + (s_ - t_) * 2 * t_ * s_)
    assert relative_error(jump.terminal_velocity, terminal) < EXACT


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("detach_jvp", [False, True])
def test_terminal_velocity_is_the_derivative_of_the_displacement(
    online: DiT, inputs: Inputs, scaled: bool, detach_jvp: bool
) -> None:
    x, t, s, labels, weight = inputs
    flow_map = FlowMap(online, scaled)
    jump = flow_map.displacement_and_terminal_velocity(x, t, s, labels, weight, detach_jvp=detach_jvp)
    difference = central_difference(lambda h: flow_map.displacement(x, t, s + h, labels, weight))
    assert relative_error(jump.terminal_velocity, difference) < 1e-8  # what the difference is good for
    assert relative_error(jump.displacement, flow_map.displacement(x, t, s, labels, weight)) < EXACT


def test_terminal_velocity_on_the_diagonal_is_the_velocity(online: DiT, inputs: Inputs) -> None:
    x, t, _, labels, weight = inputs
    flow_map = FlowMap(online, scaled=True)
    jump = flow_map.displacement_and_terminal_velocity(x, t, t, labels, weight)
    assert not jump.displacement.any()
    assert relative_error(jump.terminal_velocity, flow_map.velocity(x, t, labels, weight)) < EXACT


def test_scaled_parameterisation_multiplies_by_w(online: DiT, inputs: Inputs) -> None:
    x, t, s, labels, weight = inputs
    k = weight.view(-1, 1, 1, 1)
    plain, scaled = FlowMap(online), FlowMap(online, scaled=True)
    pairs = [
        (scaled.displacement(*inputs), plain.displacement(*inputs)),
        (scaled.velocity(x, s, labels, weight), plain.velocity(x, s, labels, weight)),
        *zip(
            scaled.displacement_and_terminal_velocity(*inputs),
            plain.displacement_and_terminal_velocity(*inputs),
            strict=True,
        ),
    ]
    for mine, unscaled in pairs:
        assert relative_error(mine, k * unscaled) < EXACT
    without = scaled.displacement(x, t, s, labels)
    assert torch.equal(without, scaled.displacement(x, t, s, labels, torch.ones_like(t)))


class Terms(NamedTuple):
    """Arguments of the objective."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    s: Tensor
    s_prime: Tensor
    labels: Tensor | None
    guidance_weight: Tensor | None


def terms(*, tied: bool = False, equal: bool = False) -> Terms:
    """Random ones: the last label is dropped, the first sample has t = s if `equal`."""
    x0, t, s, labels, weight = random_inputs(SHAPE, CLASSES, batch=BATCH)
    noise, _, s_prime, _, _ = random_inputs(SHAPE, batch=BATCH, seed=1)
    if equal:
        t[0] = s[0]
    return Terms(x0, noise, t, s, s if tied else s_prime, labels, weight)


def gradients(loss: Tensor, module: nn.Module) -> Tensor:
    """The gradient of all parameters as one vector."""
    parts = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([part.flatten() for part in parts])


def slow_loss(online: DiT, target: DiT, arguments: Terms, scaled: bool, detach_jvp: bool) -> TVMLoss:
    """The docstring of `tvm_loss` once more, one sample at a time, with `torch.func.jvp`."""
    terminal, flow = [], []
    for i in range(BATCH):
        one = slice(i, i + 1)
        x0, noise, t, s, s_prime = (argument[one] for argument in arguments[:5])
        labels = None if arguments.labels is None else arguments.labels[one]
        weight = None if arguments.guidance_weight is None else arguments.guidance_weight[one]
        w = 1.0 if weight is None else weight.item()
        k = w if scaled else 1.0
        x_t, x_s_prime = (1 - t) * x0 + t * noise, (1 - s_prime) * x0 + s_prime * noise

        def output_at(
            s: Tensor,
            x: Tensor = x_t,
            t: Tensor = t,
            labels: Tensor | None = labels,
            weight: Tensor | None = weight,
        ) -> Tensor:
            output = online(x, t, s, labels, weight)
            assert isinstance(output, Tensor)
            return output

        output, derivative = jvp(output_at, (s,), (torch.ones_like(s),))
        if detach_jvp:
            derivative = derivative.detach()
        jump = k * (s - t) * output
        terminal_velocity = k * (output + (s - t) * derivative)
        aim = k * target((x_t + jump).detach(), s, s, labels, weight).detach()
        terminal.append((terminal_velocity - aim).square().mean() / w**2 if t != s else jump.sum() * 0)

        unconditional = target(x_s_prime, s_prime, s_prime, torch.tensor([CLASSES]), torch.ones(1).double())
        guided = w * (noise - x0) + (1 - w) * unconditional.detach()
        velocity = k * online(x_s_prime, s_prime, s_prime, labels, weight)
        flow.append((velocity - guided).square().mean() / w**2)
    total = sum(terminal, torch.zeros(())) + sum(flow, torch.zeros(()))
    return TVMLoss(total / BATCH, torch.stack(terminal), torch.stack(flow))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("detach_jvp", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plain", [False, True], ids=["labels and w", "neither"])
def test_loss_sample_by_sample(
    online: DiT, target: DiT, scaled: bool, detach_jvp: bool, tied: bool, plain: bool
) -> None:
    arguments = terms(tied=tied, equal=True)
    if plain:
        arguments = arguments._replace(labels=None, guidance_weight=None)
    actual = tvm_loss(online, target, *arguments, scaled=scaled, detach_jvp=detach_jvp)
    expected = slow_loss(online, target, arguments, scaled, detach_jvp)
    assert actual.terminal.shape == actual.flow.shape == (BATCH,)
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine, theirs) < EXACT
    assert relative_error(gradients(actual.loss, online), gradients(expected.loss, online)) < EXACT


def test_terminal_term_is_zero_exactly_where_t_equals_s(online: DiT, target: DiT) -> None:
    terminal = tvm_loss(online, target, *terms(equal=True), scaled=True).terminal
    assert terminal[0].item() == 0
    assert (terminal[1:] > 0).all()


@pytest.mark.parametrize("detach_jvp", [False, True])
def test_equal_times_reduce_to_flow_matching(online: DiT, target: DiT, detach_jvp: bool) -> None:
    arguments = terms()
    arguments = arguments._replace(
        t=arguments.s, s_prime=arguments.s, guidance_weight=torch.ones_like(arguments.s)
    )
    tvm = tvm_loss(online, target, *arguments, scaled=True, detach_jvp=detach_jvp).loss
    flow_matching = flow_matching_loss(online, arguments.x0, arguments.noise, arguments.s, arguments.labels)
    assert relative_error(tvm, flow_matching) < EXACT
    assert relative_error(gradients(tvm, online), gradients(flow_matching, online)) < EXACT


def test_flow_matching_by_its_formula(online: DiT) -> None:
    x0, noise, t, _, _, labels, _ = terms()
    total = 0.0
    for i in range(BATCH):
        assert labels is not None
        time, x_t = t[i : i + 1], (1 - t[i]) * x0[i : i + 1] + t[i] * noise[i : i + 1]
        error = online(x_t, time, time, labels[i : i + 1]) - (noise[i] - x0[i])
        total += error.square().sum().item() / error.numel() / BATCH
    assert flow_matching_loss(online, x0, noise, t, labels).item() == pytest.approx(total, rel=EXACT)


@pytest.mark.parametrize("detach_jvp", [False, True])
def test_target_never_receives_gradient(online: DiT, target: DiT, detach_jvp: bool) -> None:
    loss = tvm_loss(online, target, *terms(), scaled=True, detach_jvp=detach_jvp).loss
    loss.backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(parameter.grad is not None for parameter in online.parameters())


def test_a_network_as_its_own_target_is_frozen_there(online: DiT) -> None:
    arguments = terms()
    own = tvm_loss(online, online, *arguments, scaled=True)
    copied = tvm_loss(online, copy.deepcopy(online), *arguments, scaled=True)
    assert torch.equal(own.loss, copied.loss)
    assert torch.equal(gradients(own.loss, online), gradients(copied.loss, online))


def test_detached_jvp_changes_gradients_but_not_the_value(online: DiT, target: DiT) -> None:
    arguments = terms()
    full = tvm_loss(online, target, *arguments, scaled=True)
    detached = tvm_loss(online, target, *arguments, scaled=True, detach_jvp=True)
    for mine, theirs in zip(detached, full, strict=True):
        assert relative_error(mine, theirs) < EXACT
    # The term left out is no rounding error.
    assert relative_error(gradients(detached.loss, online), gradients(full.loss, online)) > 0.01


def test_guidance_none_is_one(online: DiT, target: DiT) -> None:
    arguments = terms()
    ones = arguments._replace(guidance_weight=torch.ones_like(arguments.t))
    none = arguments._replace(guidance_weight=None)
    explicit, implicit = (tvm_loss(online, target, *x, scaled=True) for x in (ones, none))
    for mine, theirs in zip(implicit, explicit, strict=True):
        assert relative_error(mine, theirs) < EXACT
    assert relative_error(gradients(implicit.loss, online), gradients(explicit.loss, online)) < EXACT


def test_loss_is_a_function_of_a_callable(online: DiT, target: DiT) -> None:
    """The objective asks for the Dual interface alone: the same through `torch.func.jvp`."""
    arguments = terms()
    native = tvm_loss(online, target, *arguments, scaled=True)
    wrapped = tvm_loss(JVPNetwork(online), JVPNetwork(target), *arguments, scaled=True)
    for mine, theirs in zip(wrapped, native, strict=True):
        assert relative_error(mine, theirs) < EXACT
    assert relative_error(gradients(wrapped.loss, online), gradients(native.loss, online)) < EXACT


def test_loss_of_points() -> None:
    """Vectors in the place of images; each sample's terms are its own."""
    mlp = randomize_(MLP(MLPConfig(hidden_size=8, depth=1, time_frequencies=4), (2,)).double())
    x0, t, s, _, _ = random_inputs((2,), batch=BATCH)
    noise, _, s_prime, _, _ = random_inputs((2,), batch=BATCH, seed=1)
    whole = tvm_loss(mlp, mlp, x0, noise, t, s, s_prime, None, None, scaled=False)
    one = tvm_loss(mlp, mlp, x0[:1], noise[:1], t[:1], s[:1], s_prime[:1], None, None, scaled=False)
    assert one.terminal.item() == pytest.approx(whole.terminal[0].item(), rel=EXACT)
    assert one.flow.item() == pytest.approx(whole.flow[0].item(), rel=EXACT)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_values_are_not_hidden(online: DiT, target: DiT, number: float) -> None:
    arguments = terms()
    arguments.x0[2, 0, 0, 0] = number
    result = tvm_loss(online, target, *arguments, scaled=True)
    broken = torch.arange(BATCH) == 2
    assert torch.equal(~result.terminal.isfinite(), broken)
    assert torch.equal(~result.flow.isfinite(), broken)
    assert not result.loss.isfinite()


def test_non_finite_weights_are_not_hidden(online: DiT, target: DiT) -> None:
    with torch.no_grad():
        online.head.bias[0] = float("nan")
    assert tvm_loss(online, target, *terms(), scaled=True).loss.isnan()
    assert tvm_loss(target, online, *terms(), scaled=True).loss.isnan()
