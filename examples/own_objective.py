"""An objective of your own: Flow Matching with larger weights for the times near the data.

    python examples/own_objective.py --out runs/own_objective

A module that registers an objective can also be named to the command line, `tvmatch train … --import MODULE`.
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import tvmatch
from tvmatch.condition import Condition
from tvmatch.data import Density
from tvmatch.flow_map import FlowMap, Network, interpolate
from tvmatch.objectives import Inputs, Loss, Objective, draw_condition, register_objective
from tvmatch.seeds import RowDraws


@register_objective("weighted_flow_matching")
@dataclass
class WeightedFlowMatching(Objective):
    """mean (1 + emphasis (1 − t)) ‖ F(x_t, t, t) − (x1 − x0) ‖².

    Attributes:
        emphasis: how much more the times near the data count.
    """

    term_times: ClassVar = {"velocity": "t"}  # the log and error reports name the term and its time

    emphasis: float = 1.0

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        """Noise and uniform times. `draws` makes a row's numbers a function of (seed, step, row) alone."""
        t = draws.uniform("t", rows).to(torch.float32)
        noise = draws.normal("noise", rows, x0.shape[1:])
        return Inputs(x0, noise, {"t": t}, draw_condition(condition, null_label, self, draws, rows))

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        """The loss and its one term per sample."""
        x0, noise, t = inputs.x0, inputs.noise, inputs.times["t"]
        velocity = FlowMap(network).velocity(interpolate(x0, noise, t), t, inputs.condition)
        squares = (velocity - (noise - x0)).square().flatten(1).mean(1)
        term = (1 + self.emphasis * (1 - t)) * squares
        return Loss(term.mean(), {"velocity": term})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (1,000 take 20 seconds)")
    options = parser.parse_args()

    config = tvmatch.recipe("gaussians")
    config.objective = WeightedFlowMatching(emphasis=2.0)
    config.training.steps = options.steps
    config.training.sample_every = 0
    model = tvmatch.train(config, Density("gaussians"), options.out)

    points = model.sample(count=1000, steps=32)  # the network was trained on t = s alone: many small steps
    print(f"distance from the origin: {points.norm(dim=1).mean():.2f} (the data's: 1.5)")


if __name__ == "__main__":
    main()
