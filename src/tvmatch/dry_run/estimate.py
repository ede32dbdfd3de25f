"""Parameters, FLOPs and memory of a training step, counted without data and without a GPU.

The training step of a run is executed with tensors without memory (PyTorch's `FakeTensorMode`): networks,
recomputation, compilation, objective, backward pass and AdamW. A dispatch mode counts all operators and
storages. DiT-XL/2 takes a few seconds.

The device type is the CPU, with three corrections for a GPU: attention with a tangent calls the operators of
the fused kernels, `addcmul` under autocast follows CUDA's rule, and compilation partitions forward and
backward pass as for a GPU, without generating code. One difference remains: on a GPU `dual.linear` stacks
value and tangent, so that a step without compilation and recomputation needs 2 % more (XL/2).

The count includes tensors in PyTorch's allocator. It does not include fragmentation, memory of CUDA and its
libraries, and communication. For compiled steps, temporaries are counted before fusion. Compared with real
steps on a CPU, the error of the peak was 0.3 % in eager execution, 1 to 12 % for compiled blocks, and −11 to
22 % for a shallow network compiled as a whole (`benchmarks/memory_estimate.py`).
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tvmatch.attention import attention, operators
from tvmatch.config.schema import Config
from tvmatch.data.base import Batch
from tvmatch.data.spec import DataSpec
from tvmatch.dry_run.tracker import PARTS, StepTracker, size_of
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models import layers
from tvmatch.models.base import answers_of
from tvmatch.training.state import TrainingState, accelerate_training, initial_state
from tvmatch.training.step import draw_inputs, training_step

_addcmul = torch.addcmul
# The whole compiler except code generation; it decides which tensors are saved for the backward pass.
PARTITION = "aot_eager_decomp_partition"


@dataclass(frozen=True)
class Estimate:
    """Cost of a training step on one device. Memory is in bytes.

    Attributes:
        parameters: of the network, by part.
        has_blocks: whether the network has blocks that can be recomputed.
        rows: elements that the network processes at a time.
        weights: of the network.
        gradients: of the weights.
        moments: of AdamW.
        target: of the target average or the teacher; 0 if there is none.
        evaluation: of the evaluation average.
        held: activations and inputs between a forward pass and its backward pass.
        peak: maximum memory during the step.
        gradients_at_peak: gradients at this maximum.
        flops: on this device, by part of the step.
    """

    parameters: dict[str, int]
    has_blocks: bool
    rows: int
    weights: int
    gradients: int
    moments: int
    target: int
    evaluation: int
    held: int
    peak: int
    gradients_at_peak: int
    flops: dict[str, int]

    @property
    def state(self) -> int:
        """Memory between two steps."""
        return self.weights + self.moments + self.target + self.evaluation

    @property
    def activations(self) -> int:
        """Activations and temporaries at the peak."""
        return self.peak - self.state - self.gradients_at_peak


def rows_at_a_time(config: Config, world_size: int) -> int:
    """Elements that the network of one device processes at a time.

    Raises:
        InputError: if it is not a whole number.
    """
    batch, parts = config.training.batch_size, config.training.accumulation
    if world_size < 1:
        raise InputError("world_size", f"must be at least 1, got {world_size}")
    if batch % (world_size * parts):
        raise InputError(
            "world_size",
            f"{world_size} × training.accumulation {parts} does not divide training.batch_size {batch}",
        )
    return batch // (world_size * parts)


def estimate(config: Config, spec: DataSpec, *, world_size: int = 1, on_gpu: bool = True) -> Estimate:
    """Count the cost of a training step.

    Args:
        config: the run. A precision of "auto" is bfloat16 on a GPU and float32 on a CPU; a teacher is assumed
            to have the size of the network.
        spec: of the data; only shape and number of classes are used.
        world_size: number of devices that share a batch. Each has all weights and the whole optimiser state.
        on_gpu: count for a GPU with the fused attention, otherwise for this CPU.

    Raises:
        InputError: if the batch size is not divisible, or the configuration does not fit the data.
    """
    rows, parts = rows_at_a_time(config, world_size), config.training.accumulation
    objective = copy(config.objective)
    if objective.teacher is not None:
        objective.teacher, objective.target_ema = None, objective.target_ema or 0.99
    training = replace(config.training, batch_size=rows, accumulation=1)
    config = replace(config, objective=objective, training=training, initial=None)

    with ExitStack() as stack:
        stack.enter_context(_without_memory())
        state = _initial_state(config, spec)
        if training.compile:
            stack.enter_context(_quiet_compiler())
        if on_gpu:
            stack.enter_context(_as_on_a_gpu(compiled=training.compile))
        accelerate_training(state, training, backend=PARTITION)
        inputs = draw_inputs(_batch(spec, rows), spec, config, 0, torch.device("cpu"))
        tracker = StepTracker(state)
        for tensor in tree_leaves(tuple(inputs)):
            if tensor is not None:
                tracker.watch(tensor)
        target = state.network if state.target is None else state.target.network
        with tracker:
            autocast = _autocast(config, on_gpu)
            training_step(state.network, target, state.optimizer, inputs, config, 0, autocast)
            for average in (state.target, state.evaluation):
                if average is not None:
                    average.update(state.network, 1)
    weights = size_of(*state.network.parameters(), *state.network.buffers())
    gradients = size_of(*_trained(state.network))
    moments = size_of(*(x for moments in state.optimizer.state.values() for x in moments.values()))
    target_size = 0 if state.target is None else weights
    # From the second part of a batch on, the gradients of all weights are already allocated.
    peak, gradients_then = tracker.peak, tracker.gradients_at_peak
    if parts > 1:
        peak, gradients_then = tracker.peak_of_rest + gradients, gradients
    return Estimate(
        parameters=parameter_counts(state.network),
        has_blocks=bool(answers_of(state.network).dual_blocks()),
        rows=rows,
        weights=weights,
        gradients=gradients,
        moments=moments,
        target=target_size,
        evaluation=weights,
        held=tracker.held,
        peak=peak + 2 * weights + moments + target_size,
        gradients_at_peak=gradients_then,
        flops={name: tracker.flops[name] * parts for name in PARTS if tracker.flops[name]},
    )


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """Numbers of parameters of embeddings, blocks and head; without blocks, of each attribute."""
    has_blocks = bool(answers_of(network).dual_blocks())
    counts = dict.fromkeys(("embeddings", "blocks", "head") if has_blocks else (), 0)
    for name, parameter in network.named_parameters():
        part = name.partition(".")[0]
        if has_blocks and part not in counts:
            part = "head" if part.startswith("head") else "embeddings"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _initial_state(config: Config, spec: DataSpec) -> TrainingState:
    """The state of a `Trainer`, with the moments that AdamW creates in its first step."""
    state = initial_state(config, spec, None)  # PyTorch cannot move fake tensors
    for parameter in _trained(state.network):
        parameter.grad = torch.empty_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _batch(spec: DataSpec, count: int) -> Batch:
    labels = torch.zeros(count, dtype=torch.int64, device="cpu") if spec.class_count else None
    return Batch(torch.empty(count, *spec.shape, dtype=torch.float32, device="cpu"), labels)


def _autocast(config: Config, on_gpu: bool) -> torch.autocast:
    wanted = config.training.precision
    precision = ("bfloat16" if on_gpu else "float32") if wanted == "auto" else wanted
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


class _FakeTensors(FakeTensorMode):
    """A mode that `deepcopy` does not copy, since the averages are deep copies of the network."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FakeTensors":
        return self


@contextmanager
def _without_memory() -> Iterator[None]:
    """Context in which new tensors have no memory."""
    with warnings.catch_warnings(), _FakeTensors():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a module in this context."""
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


@contextmanager
def _as_on_a_gpu(*, compiled: bool) -> Iterator[None]:
    with (
        _replaced(layers, "attention", _kernel_attention),
        _replaced(operators, "unusable", lambda device, dtype: None),
        nullcontext() if compiled else _replaced(torch, "addcmul", _addcmul_of_cuda),
    ):
        yield


def _kernel_attention(q: Dual, k: Dual, v: Dual) -> Dual:
    """Attention with a tangent by the operators of the kernels, without a tangent by PyTorch."""
    has_tangent = any(x.tangent is not None for x in (q, k, v))
    return attention(q, k, v, backend="triton" if has_tangent else "auto")


def _addcmul_of_cuda(*operands: Tensor, value: float = 1) -> Tensor:
    """`addcmul` as under CUDA's autocast, which converts the operands to their widest precision.

    A `TorchFunctionMode` is not possible: it is not active during recomputation in the backward pass.
    """
    if torch.is_autocast_enabled("cpu"):
        widest = reduce(torch.promote_types, (x.dtype for x in operands))
        operands = tuple(x.to(widest) for x in operands)
    return _addcmul(*operands, value=value)


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Context without the compiler's warnings, and without its caches before and after."""
    disabled = logging.root.manager.disable
    torch.compiler.reset()
    try:
        logging.disable(logging.WARNING)
        yield
    finally:
        logging.disable(disabled)
        torch.compiler.reset()
