"""What a training step needs, counted without data and without a GPU: parameters, FLOPs, memory.

The real step runs on tensors that have a shape and no memory (PyTorch's `FakeTensorMode`): the network and
both averages as a run makes them, recomputation and compilation as a run applies them, the objective, its
backward pass, AdamW. A dispatch mode sees every operator and every storage that comes and goes. So there is
no formula here that could go out of date, and DiT-XL/2 takes a few seconds.

The step runs on the CPU's device type, with three corrections for a GPU: attention with a tangent runs as the
fused kernels' operators, `addcmul` under autocast follows CUDA's rule, and the compiler's partition into
forward and backward pass is the one for a GPU's, without generating code. One difference is left: there
`dual.linear` multiplies value and tangent as one stack, by which a step that is neither compiled nor
recomputed needs 2 % more (XL/2).

Counted are the tensors in PyTorch's allocator. Not counted are its fragmentation, what CUDA itself and the
workspaces of its libraries take, and communication between GPUs. When compiling, temporaries count as single
operators make them, before fusion. Beside real steps on a CPU the peak was off by 0.3 % eagerly, by 1 to 12 %
compiled block by block, and by −11 to 22 % where a shallow network is compiled whole
(`benchmarks/memory_estimate.py`).
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
# All of the compiler but code generation: what is kept for the backward pass is decided by then.
PARTITION = "aot_eager_decomp_partition"


@dataclass(frozen=True)
class Estimate:
    """What one training step on one device needs. Memory is in bytes.

    Attributes:
        parameters: of the network, by part.
        has_blocks: whether the network has blocks that can be recomputed.
        rows: elements that go through the network at a time.
        weights: of the network.
        gradients: of the weights.
        moments: AdamW's.
        target: the average that is the target, or the teacher; 0 without.
        evaluation: the average that is sampled and saved.
        held: activations between a forward pass and its backward pass, the inputs among them.
        peak: largest memory use during the step.
        gradients_at_peak: the gradients held at the peak.
        flops: of all the step's passes on this device, by part of the step.
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
        """What is there between two steps."""
        return self.weights + self.moments + self.target + self.evaluation

    @property
    def activations(self) -> int:
        """Activations and temporaries at the peak."""
        return self.peak - self.state - self.gradients_at_peak


def rows_at_a_time(config: Config, world_size: int) -> int:
    """Elements that one device's network takes at a time: of the batch, its share, in the run's parts.

    Raises:
        InputError: if it is no whole number.
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
    """Count a training step.

    Args:
        config: the run. A precision of "auto" is bfloat16 on a GPU and float32 on a CPU; a teacher counts as
            a network like the one that is trained.
        spec: of its data, of which the shape and the number of classes matter.
        world_size: devices that share a batch. Each has all of the weights and of the optimiser's state.
        on_gpu: count for a GPU with the fused attention, else for this CPU.

    Raises:
        InputError: if the batch cannot be shared so, or the configuration does not fit the data.
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
    # From the second part of a batch on, there are gradients of all weights from the start.
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
    """Parameters of embeddings, blocks and head; of a network without blocks, of each of its attributes."""
    has_blocks = bool(answers_of(network).dual_blocks())
    counts = dict.fromkeys(("embeddings", "blocks", "head") if has_blocks else (), 0)
    for name, parameter in network.named_parameters():
        part = name.partition(".")[0]
        if has_blocks and part not in counts:
            part = "head" if part.startswith("head") else "embeddings"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


# --- a step without memory ---------------------------------------------------------------------------------


def _initial_state(config: Config, spec: DataSpec) -> TrainingState:
    """As `Trainer` makes it, and with AdamW's moments, which it makes in its first step."""
    state = initial_state(config, spec, None)  # PyTorch cannot move tensors without memory
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
    """A mode that copies of its tensors share: the averages are deep copies of the network."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FakeTensors":
        return self


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors made here have a shape and no memory."""
    with warnings.catch_warnings(), _FakeTensors():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Another value in a module, for as long as the context lasts."""
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
    """The kernels' operators say of which shapes their results are; a plain pass is PyTorch's own."""
    has_tangent = any(x.tangent is not None for x in (q, k, v))
    return attention(q, k, v, backend="triton" if has_tangent else "auto")


def _addcmul_of_cuda(*operands: Tensor, value: float = 1) -> Tensor:
    """CUDA's autocast brings the operands to their widest precision first; a CPU's does not.

    A `TorchFunctionMode` cannot do this: it is not active where the backward pass computes again.
    """
    if torch.is_autocast_enabled("cpu"):
        widest = reduce(torch.promote_types, (x.dtype for x in operands))
        operands = tuple(x.to(widest) for x in operands)
    return _addcmul(*operands, value=value)


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """The compiler without its warnings, which the run itself will give, and without what it remembers."""
    disabled = logging.root.manager.disable
    torch.compiler.reset()
    try:
        logging.disable(logging.WARNING)
        yield
    finally:
        logging.disable(disabled)
        torch.compiler.reset()
