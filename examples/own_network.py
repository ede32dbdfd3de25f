"""A network of your own, any `nn.Module` of (x, t, s): trained, saved, loaded again and sampled.

    python examples/own_network.py --out runs/own_network

Its derivative in s comes through `torch.func.jvp`. A process that loads the checkpoint imports this module
first; on the command line that is `tvmatch sample runs/own_network --import own_network`, in this folder.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tvmatch
from tvmatch.data import Density
from tvmatch.models import register_network


@dataclass
class ResidualConfig:
    """Size of a `Residual`.

    Attributes:
        width: of the hidden layers.
        depth: number of residual blocks.
    """

    width: int = 64
    depth: int = 3


@register_network("residual", ResidualConfig)
class Residual(nn.Module):
    """A residual network on the coordinates and both times, for points (B, D) without classes."""

    def __init__(
        self, config: ResidualConfig, shape: tuple[int, ...], class_count: int, *, seed: int | None = None
    ) -> None:
        super().__init__()
        (coordinates,) = shape
        self.enter = nn.Linear(coordinates + 2, config.width)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.leave = nn.Linear(config.width, coordinates)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """F(x, t, s), (B, D)."""
        h = self.enter(torch.cat([x, t[:, None], s[:, None]], dim=1))
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.leave(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the run folder")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps (1,500 take 15 seconds)")
    options = parser.parse_args()

    config = tvmatch.recipe("gaussians")
    config.network = ResidualConfig()
    config.training.steps = options.steps
    config.training.sample_every = 0
    tvmatch.train(config, Density("gaussians"), options.out)

    model = tvmatch.load(options.out)
    points = model.sample(count=1000, steps=1)  # (1000, 2)
    print(f"distance from the origin: {points.norm(dim=1).mean():.2f} (the data's: 1.5)")


if __name__ == "__main__":
    main()
