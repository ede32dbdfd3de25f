"""Exponential moving averages of a network's parameters."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ParameterAverage:
    """θ̄ ← r θ̄ + (1 − r) θ after every optimiser step, started at the initial parameters.

    Args:
        network: the network to follow.
        rate: r in [0, 1).
        warmup: bound r by (1 + n) / (10 + n) after n updates, so that a short run forgets its start.

    Attributes:
        network: a frozen copy of the network that holds the average.
    """

    def __init__(self, network: nn.Module, rate: float, *, warmup: bool) -> None:
        # Buffers are cloned: deepcopy fails for those of a dry run, which have no memory.
        cloned: dict[int, Any] = {id(buffer): buffer.clone() for buffer in network.buffers()}
        self.network = copy.deepcopy(network, cloned).requires_grad_(False).eval()
        self.rate = rate
        self.warmup = warmup

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Take in `network` after its optimiser step number `updates` (from 1)."""
        rate = min(self.rate, (1 + updates) / (10 + updates)) if self.warmup else self.rate
        averages: list[Tensor] = list(self.network.parameters())
        current: list[Tensor] = list(network.parameters())
        torch._foreach_lerp_(averages, current, 1 - rate)
        for copied, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)  # running statistics, which are averages themselves
