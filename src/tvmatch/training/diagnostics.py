"""The quantities that blow up first: modulation activations and the derivative in s."""

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
    """`modulation_norm/<module>`: root mean square of each modulation's vectors before their norm.

    Args:
        network: what has no modulations has nothing to report.
        t: (B,) starting times.
        s: (B,) terminal times.
        condition: of the batch.
    """
    vectors = answers_of(network).modulations(t, s, condition.labels, condition.guidance_weight)
    return {f"modulation_norm/{name}": x.float().square().mean().sqrt().item() for name, x in vectors}


@contextmanager
def tangent_norms(network: nn.Module, t: Tensor) -> Iterator[dict[str, float]]:
    """`tangent_norm/<bin>`: root mean square of ∂_s F over the samples whose t lies in the bin.

    The dictionary is filled when the context closes, from the passes that carried a tangent meanwhile.

    Args:
        network: hooked while the context is open.
        t: (B,) starting times of the batch, in the order in which the passes see them.
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
        recorded |= _per_bin(torch.cat(tangents), t)


def _per_bin(mean_squares: Tensor, t: Tensor) -> dict[str, float]:
    """Root mean square over the samples of each bin of t that has any."""
    index = bin_of(t)
    norms = {}
    for i in range(TIME_BINS):
        inside = mean_squares[index == i]
        if len(inside):
            norms[f"tangent_norm/t {time_bin(i / TIME_BINS)}"] = inside.mean().sqrt().item()
    return norms
