"""One optimiser step: the batch, the objective's inputs, new weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.config.schema import Config
from tvmatch.data.base import Batch, Dataset
from tvmatch.data.read_ahead import read_ahead
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.flow_map import Network
from tvmatch.objectives import Inputs, Loss
from tvmatch.seeds import RowDraws
from tvmatch.training.non_finite import NonFiniteError, describe


class StepResult(NamedTuple):
    """The loss with its terms per sample (B,), and the gradient norm before clipping."""

    loss: Loss
    gradient_norm: Tensor

    def scalars(self) -> dict[str, float]:
        """The loss, the mean of each term and the gradient norm."""
        terms = {name: values.mean().item() for name, values in self.loss.terms.items()}
        return {"loss": self.loss.loss.item(), **terms, "gradient_norm": self.gradient_norm.item()}


def step_batches(
    dataset: Dataset, config: Config, steps: Sequence[int], *, stopped: Callable[[], object] = bool
) -> AbstractContextManager[Iterator[Batch]]:
    """The batches of the given steps (from 0), read ahead by worker processes if there are any.

    The iterator ends early if `stopped()` is true while it waits for a worker. Raises: see `read_ahead`.
    """
    read = partial(_step_batch, dataset, config.training.batch_size, config.seed)
    return read_ahead(read, steps, config.training.data_workers, stopped=stopped)


def _step_batch(dataset: Dataset, size: int, seed: int, step: int) -> Batch:
    """The batch of a step; it does not depend on the process that reads it."""
    return dataset.batch(step, size, seed)


def draw_inputs(batch: Batch, spec: DataSpec, config: Config, step: int, device: torch.device) -> Inputs:
    """Draw the objective's inputs for an optimiser step; those of a row depend only on (seed, step, row).

    They are drawn on the CPU, so that they are the same for every device.

    Args:
        batch: data, not empty.
        spec: of the data.
        config: the run.
        step: number of the step, from 0.
        device: of the returned inputs.

    Raises:
        InputError: if the batch is empty.
    """
    rows = range(len(batch.values))
    if not rows:
        raise InputError("batch", "must not be empty")
    x0, draws = spec.normalize(batch.values), RowDraws(config.seed, "step", step)
    inputs = config.objective.draw(x0, batch.condition, spec.class_count, draws, rows).to(device)
    config.objective.check_inputs(inputs)
    return inputs


def training_step(
    network: nn.Module,
    target: Network,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    config: Config,
    step: int,
    autocast: torch.autocast,
) -> StepResult:
    """Compute loss and gradient, and do one AdamW step. Does not update the moving averages.

    With `training.accumulation` the batch is processed in several parts; the gradient is the same.

    Args:
        network: F_θ; its parameters are changed.
        target: F_θ*.
        optimizer: over the network's parameters; its learning rate is set here.
        inputs: of the objective, with at least one row.
        config: the run.
        step: number of the step, from 0.
        autocast: the precision of both networks.

    Raises:
        InputError: if there are no rows, or PyTorch cannot compile the network through `torch.func.jvp`.
        NonFiniteError: before any weight changes, if the loss or its gradient is not finite.
    """

    def loss_of_rows(which: slice | Tensor) -> Loss:
        part = inputs.rows(which)
        with autocast:
            loss = config.objective.loss(network, target, part)
        config.objective.check_loss(loss, len(part.x0))
        return loss

    optimizer.zero_grad(set_to_none=True)
    count = len(inputs.x0)
    if count == 0:
        raise InputError("inputs", "must not be empty")
    rows = math.ceil(count / config.training.accumulation)
    parts = []
    for start in range(0, count, rows):
        with _compilation_explained(network, config.training.compile):
            part = loss_of_rows(slice(start, start + rows))
            share = part.loss * (min(rows, count - start) / count)
            share.backward()
        parts.append(Loss(share.detach(), {name: values.detach() for name, values in part.terms.items()}))
    loss = Loss(
        torch.stack([part.loss for part in parts]).sum(),
        {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
    )
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    gradient_norm = nn.utils.get_total_norm(gradients)
    if not torch.isfinite(loss.loss + gradient_norm).item():
        # The search uses other batch sizes, for which compilation would take too long.
        with torch.compiler.set_stance("force_eager") if config.training.compile else nullcontext():
            found = describe(
                step + 1, inputs, loss, config.objective.term_times, network, loss_of_rows, rows_at_once=rows
            )
        raise NonFiniteError(found)

    if config.optimizer.gradient_clip is not None:
        nn.utils.clip_grads_with_norm_(network.parameters(), config.optimizer.gradient_clip, gradient_norm)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.rate_at(step, config.training.steps)
    optimizer.step()
    return StepResult(loss, gradient_norm)


@contextmanager
def _compilation_explained(network: nn.Module, compiled: bool) -> Iterator[None]:
    """Explain an error of PyTorch 2.13 in compiled code that contains `torch.func.jvp`."""
    try:
        yield
    except RuntimeError as error:
        if not compiled or "ZeroTensors are immutable" not in str(error):
            raise
        raise InputError(
            "training.compile",
            f"PyTorch {torch.__version__} cannot compile {type(network).__name__} through torch.func.jvp; "
            "train it with training.compile=false",
        ) from error
