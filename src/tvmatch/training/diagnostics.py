"""The quantities that blow up first: modulation activations and the derivative in s, seen by hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tvmatch.dual import Dual
from tvmatch.models.layers import Modulation
from tvmatch.training.non_finite import TIME_BINS, bin_of, time_bin


@contextmanager
def record_norms(network: nn.Module, t: Tensor) -> Iterator[dict[str, float]]:
    """Record norms of the pass that carries a tangent, while the context is open.

    Fills the dictionary, when the context closes, with
    `modulation_norm/<module>`: root mean square of each modulation's vectors before their norm, and
    `tangent_norm/<bin>`: root mean square of ∂_s F over the samples whose t lies in the bin.

    Args:
        network: hooked while the context is open; other networks than the DiT and MLP record what they have.
        t: (B,) starting times of the batch, in the order in which the passes see them.
    """
    recorded: dict[str, float] = {}
    squares: dict[str, list[Tensor]] = {}
    tangents: list[Tensor] = []
    handles = []

    def record_modulation(name: str, output: Dual) -> None:
        if output.tangent is not None:
            squares.setdefault(name, []).append(output.value.detach().float().square().mean())

    def record_tangent(module: nn.Module, arguments: object, output: object) -> None:
        if isinstance(output, Dual) and output.tangent is not None:
            tangents.append(output.tangent.detach().float().square().flatten(1).mean(1))

    for name, module in network.named_modules():
        if isinstance(module, Modulation):
            handles.append(
                module.project.register_forward_hook(
                    lambda module, arguments, output, name=name: record_modulation(name, output)
                )
            )
    handles.append(network.register_forward_hook(record_tangent))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    for name, values in squares.items():
        short = name.removesuffix(".modulation").removesuffix("_modulation").replace("blocks.", "block ")
        recorded[f"modulation_norm/{short}"] = torch.stack(values).mean().sqrt().item()
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
