"""Recomputation and compilation, applied to a network from outside: the models know of neither.

The order is recomputation, then compilation (then sharding), so that the compiler sees what is recomputed.
Both replace a module's `forward` by a bound method: parameters, names in the state dict and its own hooks
do not change, and a `copy.deepcopy` of the module has its own forward. Hooks on the parts of a compiled
module are not called.
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

# Networks of so many blocks are compiled whole, deeper ones block by block: all blocks share one piece of
# code, and compiling 28 copies of it takes minutes. On one CPU core, a step of the digits' network of four
# blocks takes 52 ms compiled whole and 58 ms block by block, and compiling takes 60 s and 43 s.
WHOLE_UP_TO = 8

_MATRIX_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "_scaled_mm"})


def accelerate(
    network: nn.Module, *, recompute: Recompute = "none", compiled: bool = False, backend: str | None = None
) -> None:
    """Make training steps of a network smaller or faster, in place.

    Args:
        network: recomputed block by block where it has `BaseNetwork.dual_blocks`.
        recompute: what the backward pass computes again instead of keeping it: nothing; the pointwise parts
            of the blocks (norms, modulation, activations), keeping the results of matrix products and of
            attention; or everything within a block, keeping its inputs alone.
        compiled: `torch.compile` the network, without graph breaks and for one shape of its inputs.
        backend: of `torch.compile`, by default Inductor, which needs a compiler of C++ on a CPU.

    Raises:
        InputError: if something is to be recomputed and the network has no blocks, or there is no compiler.
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
            compiled_forward = torch.compile(
                module.forward.__func__, fullgraph=True, dynamic=False, **options
            )
            _replace_forward(module, compiled_forward)


def _replace_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """As a method and not a closure over the module, so that a deepcopy binds it to the copy."""
    module.forward = MethodType(function, module)


def _require_compiler(network: nn.Module) -> None:
    """On a CPU, PyTorch's compiler writes C++; what it says when there is no compiler fills a screen."""
    for device in {parameter.device for parameter in network.parameters()}:
        reason = obstacle(device)
        if reason is not None:
            raise InputError("training.compile", reason)


@functools.cache  # one function for all blocks, which so share one compilation
def _recomputing(forward: Callable[..., Dual], what: Recompute) -> Callable[[nn.Module, Dual, Dual], Dual]:
    """A block's forward pass, of which the backward pass repeats what it needs."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    options: dict[str, Any] = {"context_fn": contexts} if what == "pointwise" else {}

    def recomputing(block: nn.Module, x: Dual, activated: Dual) -> Dual:
        if not torch.is_grad_enabled():
            return forward(block, x, activated)

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
            value, tangent = forward(block, Dual(*tensors[:2]), Dual(*tensors[2:]))
            return value, tangent

        # Nothing in a block is random, so there is no generator to wind back.
        options_ = {"use_reentrant": False, "preserve_rng_state": False, **options}
        with _casts_not_remembered():
            return Dual(*checkpoint(of_tensors, *x, *activated, **options_))

    return recomputing


@contextmanager
def _casts_not_remembered() -> Iterator[None]:
    """Disable autocast's cache of cast weights: recomputation could not repeat a cast from another pass.

    `checkpoint` takes the setting along to the backward pass. A compiled graph has no such memory.
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
    """Keep what costs much to compute and little to store: results of matrix products and of attention.

    Nothing may change such a result in place afterwards: what is kept is the tensor itself.
    """
    name = operator.overloadpacket.__name__
    kept = name in _MATRIX_PRODUCTS or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
