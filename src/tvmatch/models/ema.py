"""Exponential moving averages of a network's parameters."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ParameterAverage:
    """θ̄ ← r θ̄ + (1 − r) θ after every optimiser step, starting from the initial parameters.

    Buffers, such as the running statistics of batch norm, are not averaged but copied.

    Args:
        network: the trained network.
        rate: r in [0, 1).
        warmup: bound r by (1 + n) / (10 + n) after n updates, to forget the initial parameters.

    Attributes:
        network: a frozen copy of the network that holds the average.
    """

    def __init__(self, network: nn.Module, rate: float, *, warmup: bool) -> None:
        # Buffers are cloned, since deepcopy fails for the fake tensors of a dry run.
        cloned: dict[int, Any] = {id(buffer): buffer.clone() for buffer in network.buffers()}
        self.network = copy.deepcopy(network, cloned).requires_grad_(False).eval()
        self.rate = rate
        self.warmup = warmup

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Update the average after optimiser step number `updates` (from 1) of `network`."""
        rate = min(self.rate, (1 + updates) / (10 + updates)) if self.warmup else self.rate
        averages: list[Tensor] = list(self.network.parameters())
        current: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(averages, current, 1 - rate)
        for copied, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)
