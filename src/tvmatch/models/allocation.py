"""Build the network of a checkpoint on the meta device, and allocate its memory afterwards."""

from collections.abc import Callable

import torch

from tvmatch.models.base import BaseNetwork


def unallocated(build: Callable[[], BaseNetwork]) -> BaseNetwork:
    """Build a network on the meta device, without memory and without drawing initial weights.

    If the constructor reads values of tensors, which fails on the meta device, it is built on the CPU.

    Args:
        build: calls `build_network`.
    """
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):
        with torch.device("cpu"):
            return build()


def allocated(network: BaseNetwork, build: Callable[[], BaseNetwork]) -> BaseNetwork:
    """The network with memory on the CPU, and with the buffers that its state dict does not contain."""
    if not any(tensor.is_meta for tensor in network.state_dict().values()):
        return network
    network.to_empty(device="cpu")
    if network.fill_buffers():
        return network
    with torch.device("cpu"):
        rebuilt = build()
    rebuilt.knows_dropped_labels = network.knows_dropped_labels
    return rebuilt
