"""Counts memory and floating-point operations of a training step.

The trackers in PyTorch (`torch.distributed._tools.MemTracker`, `torch.utils.flop_counter`) do not support
compilation, and do not distinguish the parts of this step.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvmatch.dry_run.flops import operations
from tvmatch.dual import Dual
from tvmatch.training.state import TrainingState

FORWARD_DUAL = "forward with the tangent"
FORWARD = "forward"
FORWARD_TARGET = "forward, target"
FORWARD_UNCONDITIONAL = "forward, target without label"
BACKWARD = "backward"
PARTS = (FORWARD_DUAL, FORWARD, FORWARD_TARGET, FORWARD_UNCONDITIONAL, BACKWARD)


class StepTracker(TorchDispatchMode):
    """Counts the bytes of live storages and the FLOPs of the operators that are called while it is active.

    Attributes:
        live: bytes of storages that were allocated while it is active and are not freed.
        gradients: bytes of gradients among them.
        peak: maximum of `live`.
        gradients_at_peak: `gradients` when `live` was largest.
        peak_of_rest: maximum of `live` − `gradients`.
        held: maximum of `live` − `gradients` at the end of a forward pass: what the backward pass reads.
        flops: of each part of the step.
    """

    supports_higher_order_operators = True

    def __init__(self, state: TrainingState) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.gradients = self.gradients_at_peak = self.peak_of_rest = self.held = 0
        self.flops: Counter[str] = Counter()
        self._part = BACKWARD
        self._storages: dict[int, weakref.ref[Any] | None] = {}
        for tensor in _state_tensors(state):
            self._storages[tensor.untyped_storage()._cdata] = None
        self._with_gradient: set[Tensor] = set()
        for parameter in state.network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        for network in {state.network, state.network if state.target is None else state.target.network}:
            network.register_forward_pre_hook(self._enter_network)
            network.register_forward_hook(self._leave_network)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """The compiler runs only within such modes."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True  # the loss is finite; the tensor has no memory
        options = kwargs or {}
        if func is run_and_save_rng_state:  # the compiler calls PyTorch's attention by it
            operator, *rest = args
            return torch.empty(0, dtype=torch.uint8, device="cpu"), self.__torch_dispatch__(
                operator, types, rest, options
            )
        if func is run_with_rng_state:
            _, operator, *rest = args
            return self.__torch_dispatch__(operator, types, rest, options)
        result = func(*args, **options)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.watch(tensor)
        if isinstance(func, torch._ops.OpOverload):
            self.flops[self._part] += operations(func, args, options, result)
        return result

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        self.peak_of_rest = max(self.peak_of_rest, self.live - self.gradients)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter not in self._with_gradient:
            self._with_gradient.add(parameter)
            self.gradients += size_of(parameter)

    def _enter_network(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, _, s, labels, weight = arguments
        if isinstance(s, Dual):
            self._part = FORWARD_DUAL
        elif torch.is_grad_enabled():
            self._part = FORWARD
        else:
            self._part = FORWARD_TARGET if labels is not None or weight is None else FORWARD_UNCONDITIONAL

    def _leave_network(self, *_: Any) -> None:
        self._part = BACKWARD
        self.held = max(self.held, self.live - self.gradients)


def _state_tensors(state: TrainingState) -> Iterator[Tensor]:
    averages = [average.network for average in (state.target, state.evaluation) if average is not None]
    for network in (state.network, *averages):
        yield from network.parameters()
        yield from network.buffers()
    for moments in state.optimizer.state.values():
        yield from moments.values()


def size_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
