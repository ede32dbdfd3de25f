"""Norms for the log that show instabilities early: modulations and the derivative in s."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tvmatch.condition import Condition
from tvmatch.dual import Dual
from tvmatch.models.base import answers_of
from tvmatch.training.non_finite import TIME_BINS, bin_of, time_bin


@torch.no_grad()
def modulation_norms(network: nn.Module, t: Tensor, s: Tensor, condition: Condition) -> dict[str, float]:
    """Compute the root mean square of each modulation's vectors, before their norm.

    Args:
        network: the trained network.
        t: (B,) starting times.
        s: (B,) terminal times.
        condition: of the batch.

    Returns:
        By name `modulation_norm/<module>`; empty for a network without modulations.
    """
    vectors = answers_of(network).modulations(t, s, condition.labels, condition.guidance_weight)
    return {f"modulation_norm/{name}": x.float().square().mean().sqrt().item() for name, x in vectors}


@contextmanager
def tangent_norms(network: nn.Module, t: Tensor) -> Iterator[dict[str, float]]:
    """Record the root mean square of ∂_s F for each bin of t.

    A forward hook records the tangent of every pass in this context that has one. It is filled at the end.

    Args:
        network: the trained network.
        t: (B,) starting times of the batch, in the order of the passes.

    Yields:
        A dictionary with the names `tangent_norm/t <bin>`.
    """
    recorded: dict[str, float] = {}
    tangents: list[Tensor] = []

    def record(module: nn.Module, arguments: object, output: object) -> None:
        if isinstance(output, Dual) and output.tangent is not None:
            tangents.append(output.tangent.detach().float().square().flatten(1).mean(1))

    handle = network.register_forward_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()
    if tangents:
        mean_squares, bins = torch.cat(tangents), bin_of(t)
        for i in bins.unique().tolist():
            name = f"tangent_norm/t {time_bin(i / TIME_BINS)}"
            recorded[name] = mean_squares[bins == i].mean().sqrt().item()
