"""Flow Matching (arXiv 2210.02747), which TVM reduces to at t = s."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tvmatch.condition import Condition
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap, Network, interpolate
from tvmatch.objectives.base import Inputs, Loss, Objective, draw_condition
from tvmatch.objectives.registry import register_objective
from tvmatch.option_checks import check_fields, require
from tvmatch.seeds import RowDraws


def flow_matching_loss(
    network: Network, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | Condition | None = None
) -> Tensor:
    """Mean of ‖ F_θ(x_t, t, t, c) − (x1 − x0) ‖² over batch and pixels.

    Args:
        network: F_θ.
        x0: data (B, ...) in the network's units.
        noise: x1 ~ N(0, I) of the same shape.
        t: (B,) times in [0, 1].
        labels: int64 (B,), the class count for a dropped label; None drops all. Or a `Condition`.

    Raises:
        InputError: if an argument or an output of the network has a wrong shape, dtype or device.
    """
    return _squares(network, x0, noise, t, labels).mean()


def _squares(
    network: Network, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | Condition | None
) -> Tensor:
    velocity = FlowMap(network).velocity(interpolate(x0, noise, t), t, labels)
    return (velocity - (noise - x0)).square()


@register_objective("flow_matching")
@dataclass
class FlowMatching(Objective):
    """Flow Matching: trains only the velocity F(x, t, t), so sampling needs many steps.

    Attributes:
        t: mean and standard deviation of the logit of t, which is logit-normal.
        label_dropout: probability of dropping a label.
    """

    term_times: ClassVar = {"velocity": "t"}

    t: tuple[float, float] = (0.0, 1.0)
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self, "objective")
        mean, std = self.t
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise InputError("objective.t", f"must be a finite mean and a positive finite std, got {self.t}")
        p = self.label_dropout
        require("objective.label_dropout", p, 0 <= p <= 1, "in [0, 1]")

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        """Draw noise, t and dropped labels; see `Objective.draw`."""
        mean, std = self.t
        t = torch.sigmoid(mean + std * draws.normal("t", rows, dtype=torch.float64)).to(torch.float32)
        noise = draws.normal("noise", rows, x0.shape[1:])
        return Inputs(x0, noise, {"t": t}, draw_condition(condition, null_label, self, draws, rows))

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        """`flow_matching_loss`; the target network is not used."""
        squares = _squares(network, inputs.x0, inputs.noise, inputs.times["t"], inputs.condition)
        velocity = squares.flatten(1).mean(1)
        return Loss(velocity.mean(), {"velocity": velocity})
