"""What the design of the networks promises: sizes, first weights, bounded activations, layouts, precision."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import NETWORKS, Inputs, in_direction_s, random_inputs, randomize_, relative_error, small_dit
from torch import nn

from tvmatch.dual import Dual
from tvmatch.models import MLP, PRESETS, DiT, DiTConfig
from tvmatch.models.init import spectral_
from tvmatch.models.layers import FeedForward, Linear, Modulation, TimeEmbedding, position_table


def parameter_count(size: tuple[int, int, int, int], channels: int, class_count: int) -> int:
    """Weights and biases by the layer, with C the width, written from DiT's and TVM's papers."""
    width, depth, heads, patch = size
    times = 3 * (256 * width + width + width * width + width)
    labels = (class_count + 1) * width
    patches = channels * patch**2
    attention = 3 * width * (width + 1) + width * (width + 1) + 2 * width // heads
    mlp = 4 * width * (width + 1) + width * (4 * width + 1)
    modulation = 6 * width * (width + 1)
    head = 2 * width * (width + 1) + (width + 1) * patches
    return times + labels + (patches + 1) * width + depth * (attention + mlp + modulation) + head


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    with torch.device("meta"):
        network = DiT(DiTConfig(preset=preset), (4, 32, 32), 1000)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == parameter_count(PRESETS[preset], 4, 1000)
    if preset == "XL/2":
        assert round(count / 1e6) == 678


def test_a_network_from_the_meta_device_can_be_initialised() -> None:
    with torch.device("meta"):
        deferred = small_dit((1, 4, 4), 3)
    deferred.to_empty(device="cpu")
    for tensor in itertools.chain(deferred.parameters(), deferred.buffers()):
        tensor.detach().fill_(math.nan)  # what memory may hold
    for network in (deferred, direct := small_dit((1, 4, 4), 3)):
        torch.manual_seed(3)
        network.init_weights()
    pairs = zip(deferred.named_parameters(), direct.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for (_, mine), theirs in pairs)
    assert torch.equal(deferred.positions, direct.positions)


def zero_at_the_start(network: DiT) -> list[Linear]:
    return [network.head, *(part.project for part in network.modules() if isinstance(part, Modulation))]


@pytest.mark.parametrize("switches", [{}, {"time_embedding_init": "normal"}, {"spectral_init": False}])
def test_initial_weights(switches: dict[str, Any]) -> None:
    network = small_dit((3, 4, 6), 200, hidden_size=32, time_frequencies=16, **switches)
    zeroed = zero_at_the_start(network)
    assert len(zeroed) == 1 + 3
    times = [
        layer
        for embedding in network.modules()
        if isinstance(embedding, TimeEmbedding)
        for layer in (embedding.expand, embedding.project)
    ]
    assert len(times) == 6
    for layer in network.modules():
        if not isinstance(layer, nn.Linear):
            continue
        assert not layer.bias.any()
        fan = sum(layer.weight.shape)
        if any(layer is other for other in zeroed):
            assert not layer.weight.any()
        elif "time_embedding_init" in switches and any(layer is other for other in times):
            # Of 1024 draws the std is known to 1/√2048 = 2.2 %, here within four of those.
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.09)
        elif "spectral_init" in switches:
            # Uniform on ±√(6/fan): the largest of hundreds of draws is close to the end.
            assert 0.95 < layer.weight.abs().max().item() / math.sqrt(6 / fan) <= 1
        else:
            # Two float32 routes to one singular value: SVD here, the Gram matrix there.
            assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-5)
    labels = network.conditioning.label
    assert labels is not None
    assert labels.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4)])
def test_spectral_normalisation(shape: tuple[int, int]) -> None:
    weight = torch.empty(shape, dtype=torch.float64)
    spectral_(weight, torch.Generator().manual_seed(0))
    assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(1, abs=1e-12)
    assert weight.std() > 0


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_output_is_zero_at_the_start(build: Callable[[], DiT | MLP]) -> None:
    network = build()
    inputs = random_inputs(network.shape, network.class_count, dtype=torch.float32)
    value, tangent = in_direction_s(network, inputs)
    assert not value.any()
    assert not tangent.any()


def largest_activation(network: DiT, inputs: Inputs) -> float:
    """Largest root mean square of a token after any block."""
    seen = []
    handles = [
        block.register_forward_hook(lambda *call: seen.append(call[2].value)) for block in network.blocks
    ]
    with torch.no_grad():
        network(*inputs)
    for handle in handles:
        handle.remove()
    return max(float(tokens.square().mean(-1).sqrt().max()) for tokens in seen)


def test_normalised_modulation_bounds_activations() -> None:
    """With adaLN weights 10, 100 and 1000 times as large; the plain network grows with them."""
    inputs = random_inputs((1, 4, 4), 3, batch=16)
    growth: dict[bool, list[float]] = {}
    for normalised in (True, False):
        activations: list[float] = []
        for scale in (1, 10, 100, 1000):
            torch.manual_seed(0)
            network = randomize_(small_dit((1, 4, 4), 3, modulation_norm=normalised).double())
            with torch.no_grad():
                for layer in zero_at_the_start(network)[1:]:
                    layer.weight.mul_(scale)
                    layer.bias.mul_(scale)
            activations.append(largest_activation(network, inputs))
        growth[normalised] = [activation / activations[0] for activation in activations[1:]]
    # The norm makes the vectors independent of the scale, but for its ε.
    assert all(abs(ratio - 1) < 1e-3 for ratio in growth[True])
    # A gate times a branch that the scale and shift before it have grown: quadratic in the end.
    assert growth[False][0] > 2
    assert growth[False][1] > 100
    assert growth[False][2] > 1000


def test_normalised_modulation_vectors_have_bounded_size() -> None:
    modulation = randomize_(Modulation(8, 6, normalized=True).double())
    for size in (1e-8, 1e-3, 1.0, 1e6):
        activated = size * torch.randn(5, 8, dtype=torch.float64)
        for vector in modulation(Dual(activated)):
            assert vector.value.shape == (5, 1, 8)
            assert vector.value.square().mean(-1).max().item() <= 1 + 1e-14  # rounding


def test_positions_by_a_loop() -> None:
    rows, columns, width = 2, 3, 8
    table = position_table(rows, columns, width)
    for row, column, pair in itertools.product(range(rows), range(columns), range(width // 4)):
        token, frequency = table[row * columns + column], 10000 ** (-pair / (width / 4))
        expected = {
            pair: math.sin(column * frequency),
            width // 4 + pair: math.cos(column * frequency),
            width // 2 + pair: math.sin(row * frequency),
            3 * width // 4 + pair: math.cos(row * frequency),
        }
        for channel, number in expected.items():
            assert token[channel].item() == pytest.approx(number, abs=1e-7)  # float32
    assert table.dtype == torch.float32


def test_patches_by_a_loop() -> None:
    """Inwards a patch is (channel, row, column), outwards (row, column, channel)."""
    channels, height, width, p = 3, 4, 6, 2
    network = small_dit((channels, height, width), 0)
    image = torch.arange(channels * height * width).view(1, channels, height, width)
    inwards = torch.zeros(1, height // p * (width // p), channels * p * p, dtype=torch.int64)
    outwards = torch.zeros_like(inwards)
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        token, row, column = y // p * (width // p) + x // p, y % p, x % p
        inwards[0, token, (c * p + row) * p + column] = image[0, c, y, x]
        outwards[0, token, (row * p + column) * channels + c] = image[0, c, y, x]
    assert torch.equal(network._patchify(image), inwards)
    assert torch.equal(network._unpatchify(outwards), image)


def test_time_features_and_their_tangent() -> None:
    embedding = TimeEmbedding(4, 128)
    time = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float32)
    features = embedding.features(Dual(time, torch.tensor([-1.0, 2.0, 1.0])))
    assert features.tangent is not None
    assert features.value.dtype == features.tangent.dtype == torch.float64
    for row, speed in enumerate((-1.0, 2.0, 1.0)):
        tau = time[row].item()  # of float32, so that 0.3 is the same number for both
        for i in (0, 1, 64, 127):
            frequency = 10_000 ** (-i / 128)
            assert features.value[row, i].item() == pytest.approx(math.cos(tau * frequency), abs=1e-14)
            assert features.value[row, 128 + i].item() == pytest.approx(math.sin(tau * frequency), abs=1e-14)
            cosine, sine = (features.tangent[row, j].item() for j in (i, 128 + i))
            assert cosine == pytest.approx(-speed * frequency * math.sin(tau * frequency), abs=1e-14)
            assert sine == pytest.approx(speed * frequency * math.cos(tau * frequency), abs=1e-14)


def test_condition_by_the_parts() -> None:
    """c = E₁(t) + E₂(t − s) + E₃(1/w) + label, its tangent in s that of E₂ times −1."""
    network = randomize_(small_dit((3, 4, 4), 5).double())
    _, t, s, labels, weight = random_inputs((3, 4, 4), 5)
    conditioning = network.conditioning
    assert conditioning.label is not None
    assert conditioning.guidance is not None
    parts = [conditioning.time(Dual(t)), conditioning.guidance(Dual(1 / weight))]
    duration = conditioning.duration(Dual(t - s, -torch.ones_like(s)))
    actual = conditioning(Dual(t), Dual(s, torch.ones_like(s)), labels, weight)
    expected = sum((part.value for part in parts), conditioning.label(labels) + duration.value)
    assert relative_error(actual.value, expected) < 1e-14
    assert torch.equal(actual.tangent, duration.tangent)


def test_hidden_width_of_the_mlp_is_rounded() -> None:
    """28 · (61 / 28) is just below 61 in floating point."""
    network = small_dit((1, 2, 2), 0, hidden_size=28, mlp_ratio=61 / 28)
    (width,) = {part.expand.out_features for part in network.modules() if isinstance(part, FeedForward)}
    assert width == 61


@pytest.mark.parametrize("name", ["DiT", "DiT without everything", "MLP"])
def test_bfloat16_autocast(name: str) -> None:
    """The time path stays in float32, value and tangent share a precision in every layer."""
    torch.manual_seed(0)
    network = randomize_(NETWORKS[name]())
    inputs = random_inputs(network.shape, network.class_count, dtype=torch.float32)
    expected = in_direction_s(network, inputs)
    seen: dict[str, Dual] = {}
    for part, module in network.named_modules():
        module.register_forward_hook(
            lambda module, arguments, output, part=part: seen.update(
                {part: output[0] if isinstance(module, Modulation) else output}
            )
        )
    with torch.autocast("cpu", torch.bfloat16):
        actual = in_direction_s(network, inputs)

    times = [part for part, module in network.named_modules() if isinstance(module, TimeEmbedding)]
    assert len(times) >= 2
    for part in times:
        for layer in (part, f"{part}.expand", f"{part}.project"):
            assert seen[layer].value.dtype == torch.float32
    matrix_products = [
        output for part, output in seen.items() if part.startswith("blocks.0") and "expand" in part
    ]
    assert matrix_products[0].value.dtype == torch.bfloat16
    for part, output in seen.items():
        if isinstance(output, Dual) and output.tangent is not None:
            assert output.tangent.dtype == output.value.dtype, part
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.float32
        assert mine.isfinite().all()
        # 2⁻⁹ = 0.2 % for each rounding to bfloat16, through some ten layers whose slopes are of order 1.
        assert relative_error(mine, theirs) < 0.05


def test_tangents_pass_through_hooks() -> None:
    """Hooks and sharding work at `__call__`, so the tangent must pass through it."""
    layer = randomize_(Linear(3, 2))
    calls: list[Any] = []
    layer.register_forward_hook(lambda module, arguments, output: calls.append((arguments, output)))
    x = Dual(torch.ones(1, 3), torch.ones(1, 3))
    output = layer(x)
    ((arguments, seen),) = calls
    assert arguments[0] is x
    assert seen is output
    assert output.tangent is not None
    assert relative_error(output.tangent, layer.weight.sum(1)[None]) < 1e-6  # float32
