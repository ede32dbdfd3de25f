"""Build the network of a checkpoint on the meta device, and allocate its memory afterwards."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from tvmatch.models.base import BaseNetwork


def unallocated(build: Callable[[], BaseNetwork], tensor_count: int) -> BaseNetwork:
    """Build a network on the meta device, without memory and without drawing initial weights.

    If the constructor reads values of tensors, which fails on the meta device, it is built on the CPU.

    Args:
        build: `build_network` of a configuration.
        tensor_count: of the file.

    Raises:
        ValueError: for a network with far more modules than the file has tensors.
    """
    with _bounded_depth(tensor_count):
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
        anew = build()
    anew.knows_dropped_labels = network.knows_dropped_labels
    return anew


@contextmanager
def _bounded_depth(tensor_count: int) -> Iterator[None]:
    """Stop the building of a network, in this thread, that has far more modules than a file has tensors.

    A description may name any depth, and building a network of it could take hours.

    Raises:
        ValueError: from the constructor of the network.
    """
    thread, most, count = threading.get_ident(), 1_000 + 10 * tensor_count, 0

    def counted(*_: Any) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > most:
                raise ValueError(f"a depth of more than {most} modules for {tensor_count} tensors")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
