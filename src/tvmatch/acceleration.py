"""Recomputation and compilation, applied to a network from outside.

Recomputation comes first, so that it is part of the compiled graph. Both replace a module's `forward` by a
bound method: parameters, names in the state dict and hooks of the module do not change, and `copy.deepcopy`
of the module works. Hooks on submodules of a compiled module are not called.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tvmatch.compilation import obstacle
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models.base import answers_of

Recompute = Literal["none", "pointwise", "blocks"]
"""What the backward pass computes again."""

# Up to this number of blocks the whole network is compiled, otherwise one block, whose code all blocks share:
# compiling 28 blocks takes minutes. On one CPU core, a step of the digits' network of four blocks takes 52 ms
# (whole) and 58 ms (block by block), and compiling it 60 s and 43 s.
WHOLE_UP_TO = 8

_MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "_scaled_mm"})


def accelerate(
    network: nn.Module, *, recompute: Recompute = "none", compiled: bool = False, backend: str | None = None
) -> None:
    """Reduce memory or time of a network's training steps; changes the network in place.

    Args:
        network: its blocks are `BaseNetwork.dual_blocks`.
        recompute: "none"; "pointwise" stores results of matrix products and attention, and computes norms,
            modulations and activation functions again; "blocks" stores only the inputs of blocks.
        compiled: `torch.compile` the network, without graph breaks and for one shape of its inputs.
        backend: of `torch.compile`. Default: Inductor, which needs a C++ compiler on a CPU.

    Raises:
        InputError: for recomputation in a network without blocks, or if there is no C++ compiler.
    """
    blocks = answers_of(network).dual_blocks()
    if recompute != "none":
        if not blocks:
            name = type(network).__name__
            raise InputError("training.recompute", f"{recompute} needs a network of blocks, {name} has none")
        for block in blocks:
            _replace_forward(block, _recomputing(type(block).forward, recompute))
    if compiled:
        if backend is None:
            _require_compiler(network)
        options: dict[str, Any] = {} if backend is None else {"backend": backend}
        for module in blocks if len(blocks) > WHOLE_UP_TO else [network]:
            assert isinstance(module.forward, MethodType)
            function = torch.compile(module.forward.__func__, fullgraph=True, dynamic=False, **options)
            _replace_forward(module, function)


def _replace_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Replace `forward` by a method rather than a closure, so that `deepcopy` binds it to the copy."""
    module.forward = MethodType(function, module)


def _require_compiler(network: nn.Module) -> None:
    """Raise a short InputError if the compiler of `compilation.obstacle` is missing."""
    for device in {parameter.device for parameter in network.parameters()}:
        reason = obstacle(device)
        if reason is not None:
            raise InputError("training.compile", reason)


@functools.cache  # one function for all blocks, so that they share one compilation
def _recomputing(forward: Callable[..., Dual], what: Recompute) -> Callable[[nn.Module, Dual, Dual], Dual]:
    """The forward pass of a block with recomputation in the backward pass."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    options: dict[str, Any] = {"context_fn": contexts} if what == "pointwise" else {}

    def recomputing(block: nn.Module, x: Dual, activated: Dual) -> Dual:
        if not torch.is_grad_enabled():
            return forward(block, x, activated)

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
            value, tangent = forward(block, Dual(*tensors[:2]), Dual(*tensors[2:]))
            return value, tangent

        # Blocks draw no random numbers, so no generator state is restored.
        options_ = {"use_reentrant": False, "preserve_rng_state": False, **options}
        with _without_cast_cache():
            return Dual(*checkpoint(of_tensors, *x, *activated, **options_))

    return recomputing


@contextmanager
def _without_cast_cache() -> Iterator[None]:
    """Disable autocast's cache of cast weights, since recomputation must repeat the same operations.

    `checkpoint` restores the setting in the backward pass. Compiled graphs do not use the cache.
    """
    if torch.compiler.is_compiling():
        yield
        return
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Save the results of matrix products and attention, which must not be changed in place afterwards."""
    name = operator.overloadpacket.__name__
    kept = name in _MATRIX_PRODUCTS or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
