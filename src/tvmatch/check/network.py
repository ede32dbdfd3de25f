"""Compare a network and its derivatives with float64 on the CPU and with finite differences."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.check.comparison import EXACT, Comparison, Setting, failure, perturbed, relative_error, tolerance
from tvmatch.condition import Condition
from tvmatch.data.spec import DataSpec
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.flow_map import Network
from tvmatch.models import DiT, DiTConfig
from tvmatch.objectives import TVM, Inputs, Objective
from tvmatch.seeds import RowDraws, generator
from tvmatch.trained_model import TrainedModel

# Multiplies the loss: a power of two causes no rounding, and small gradients do not underflow in float16.
LOSS_SCALE = 2.0**10
# Error of central differences in float64: usually 1e-11, but 1e-7 after a few training steps, of the loss.
DIFFERENCES = 1e-6


class Answer(NamedTuple):
    """F and ∂_s F (B, ...) at x = noise, and the gradient of the loss for each parameter."""

    value: Tensor
    tangent: Tensor
    gradients: list[Tensor]


def random_model(preset: str) -> TrainedModel:
    """A DiT of a preset for small images of ten classes, with random weights and no zero-initialised layers.

    Weights of linear layers are N(0, 1/fan-in), scales 1 + N(0, 0.3²) and biases N(0, 0.3²).
    """
    names = tuple("0123456789")
    spec = DataSpec("image", (4, 8, 8), names, (0.0,) * 4, (1.0,) * 4)
    with torch.device("meta"):  # skip the initial weights, which take long to draw for a large preset
        network = DiT(DiTConfig(preset=preset), spec.shape, spec.class_count)
    network.to_empty(device="cpu").fill_buffers()
    random = generator(0, "check", "weights")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale, mean = (0.3, float(name.endswith("weight")))
            if parameter.ndim == 2:
                scale, mean = 1 / math.sqrt(parameter.shape[1]), 0.0
            parameter.normal_(mean, scale, generator=random)
    return TrainedModel(network, spec, scaled=True, guidance=1.5)


def check_network(
    model: TrainedModel, setting: Setting, objective: Objective | None = None
) -> list[Comparison]:
    """Check F, ∂_s F and the gradient of the loss, with the model's weights.

    ∂_s F is compared with finite differences, the gradient with that of a float64 copy on the CPU, and the
    latter with finite differences of the loss. The target network is the network itself.

    Args:
        model: the model; its network is not changed.
        setting: device and precision.
        objective: computes the loss. Default: TVM in the model's parameterisation.

    Raises:
        InputError: if ∂_s F is zero everywhere, as in an untrained network.
    """
    try:
        return _compare(model, setting, objective or TVM(scaled=model.scaled))
    except InputError:
        raise
    except Exception as error:  # any exception is reported as a failed comparison
        return [failure("network", "F and its derivatives", error)]


def _compare(model: TrainedModel, setting: Setting, objective: Objective) -> list[Comparison]:
    inputs = _draw(model, objective)
    network = deepcopy(model.network).to(setting.device, setting.weights_dtype).requires_grad_()
    actual = _answer(network, objective, inputs, setting)
    del network  # to free its memory
    network = deepcopy(model.network).to(EXACT.device, EXACT.weights_dtype).requires_grad_()
    value, slope = _value_and_slope(network, objective, inputs)
    if not slope.any():
        raise InputError("model", "its ∂_s F is zero, as in an untrained network: nothing to compare")
    exact = _answer(network, objective, inputs, EXACT)
    product, difference = _slopes_of_loss(network, objective, inputs, exact.gradients)
    changed = _changed_answer(network, objective, inputs, setting)
    rows = (
        ("F", "value", [actual.value], [value], tolerance(setting, [changed.value], [exact.value])),
        (
            "∂_s F, by differences",
            "tangent",
            [actual.tangent],
            [slope],
            tolerance(setting, [changed.tangent], [exact.tangent]) + DIFFERENCES,
        ),
        (
            "gradient of the loss",
            "gradient",
            actual.gradients,
            exact.gradients,
            tolerance(setting, changed.gradients, exact.gradients),
        ),
        ("its float64, by differences", "gradient", [product], [difference], DIFFERENCES),
    )
    return [
        Comparison("network", name, part, relative_error(found, expected), allowed)
        for name, part, found, expected, allowed in rows
    ]


def _draw(model: TrainedModel, objective: Objective) -> Inputs:
    """Draw data and noise for two samples, the second with its label dropped and w = 1."""
    draws, rows, count = RowDraws(0, "check"), range(2), model.spec.class_count
    x0 = draws.normal("data", rows, model.spec.shape)
    inputs = objective.draw(x0, Condition(), count, draws, rows)
    weight = model.guidance[1] if isinstance(model.guidance, tuple) else model.guidance
    condition = Condition(
        labels=torch.tensor([0, count], device="cpu") if count else None,
        guidance_weight=None if weight == 1 else x0.new_tensor([weight, 1.0]),
    )
    return inputs._replace(condition=condition)


def _cast(inputs: Inputs, setting: Setting) -> Inputs:
    """Convert the inputs to the device and dtype of the setting; labels keep their dtype."""

    def cast(x: Any) -> Any:
        floating = x is not None and x.is_floating_point()
        return x if x is None else x.to(setting.device, setting.weights_dtype if floating else None)

    return Inputs(
        cast(inputs.x0),
        cast(inputs.noise),
        {name: cast(time) for name, time in inputs.times.items()},
        Condition(*map(cast, inputs.condition)),
    )


def _loss(network: Network, target: Network, objective: Objective, inputs: Inputs) -> Tensor:
    return LOSS_SCALE * objective.loss(network, target, inputs).loss


def _answer(network: nn.Module, objective: Objective, inputs: Inputs, setting: Setting) -> Answer:
    inputs = _cast(inputs, setting)
    parameters = list(network.parameters())
    with setting.autocast():
        with torch.no_grad():
            t, s = objective.network_times(inputs)
            labels, weight, *_ = inputs.condition
            output = network(inputs.noise, t, Dual(s, torch.ones_like(s)), labels, weight)
        loss = _loss(network, network, objective, inputs)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    tangent = torch.zeros_like(output.value) if output.tangent is None else output.tangent
    return Answer(output.value.cpu(), tangent.cpu(), [gradient.cpu() for gradient in gradients])


def _changed_answer(network: nn.Module, objective: Objective, inputs: Inputs, setting: Setting) -> Answer:
    """In float64, with data, noise and all layer outputs (value and tangent) randomly changed by u."""
    u, random = setting.unit_roundoff, generator(0, "check", "perturbation")

    def change(output: Any) -> Any:
        if isinstance(output, Dual):
            return Dual(change(output.value), change(output.tangent))
        if isinstance(output, tuple):
            return tuple(map(change, output))
        return None if output is None else perturbed(output, u, random)

    inputs = _cast(inputs, EXACT)
    inputs = inputs._replace(x0=change(inputs.x0), noise=change(inputs.noise))
    hooks = [
        module.register_forward_hook(lambda _module, _arguments, output: change(output))
        for module in network.modules()
    ]
    answer = _answer(network, objective, inputs, EXACT)
    for hook in hooks:
        hook.remove()
    return answer


def _central_difference(function: Callable[[float], Tensor], step: float) -> Tensor:
    """f′(0) to fourth order: [8 (f(h) − f(−h)) − (f(2h) − f(−2h))] / 12h."""
    near = function(step) - function(-step)
    far = function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


@torch.no_grad()
def _value_and_slope(network: nn.Module, objective: Objective, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """F, and ∂_s F by finite differences of F."""
    inputs = _cast(inputs, EXACT)
    t, s = objective.network_times(inputs)
    labels, weight, *_ = inputs.condition

    def value(step: float) -> Tensor:
        output: Tensor = network(inputs.noise, t, s + step, labels, weight)
        return output

    return value(0.0), _central_difference(value, 1e-3)


@torch.no_grad()
def _slopes_of_loss(
    network: nn.Module, objective: Objective, inputs: Inputs, gradients: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The derivative of the loss along its gradient, as a scalar product and by finite differences.

    Every parameter moves along its gradient by the same fraction of its norm. The target's outputs are
    recorded and kept fixed, since the objective's gradient treats them as constants.
    """
    inputs = _cast(inputs, EXACT)
    outputs: list[Any] = []

    def recording_target(*arguments: Any, **options: Any) -> Any:
        outputs.append(network(*arguments, **options))
        return outputs[-1]

    loss = float(_loss(network, recording_target, objective, inputs))
    pairs = list(zip(network.parameters(), gradients, strict=True))
    lengths = [
        float(weight.norm() / gradient.norm()) if gradient.any() else 0.0 for weight, gradient in pairs
    ]
    product = torch.stack(
        [length * gradient.square().sum() for length, (_, gradient) in zip(lengths, pairs, strict=True)]
    ).sum()
    at = 0.0

    def loss_at(step: float) -> Tensor:
        nonlocal at
        for length, (weight, gradient) in zip(lengths, pairs, strict=True):
            weight.add_(gradient, alpha=(step - at) * length)
        at, recorded = step, iter(outputs)
        return _loss(network, lambda *_, **__: next(recorded), objective, inputs)

    # Loss and parameters change by at most a fraction of 1e-4, which is far above rounding errors.
    difference = _central_difference(loss_at, 1e-4 / max(1.0, float(product) / loss))
    loss_at(0.0)
    return product, difference
