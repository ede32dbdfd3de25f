"""One optimiser step, from a batch of data to new weights, read top to bottom."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.config.schema import Config
from tvmatch.data.base import Batch
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


def draw_inputs(
    batch: Batch,
    spec: DataSpec,
    config: Config,
    step: int,
    device: torch.device,
    rows: range | None = None,
) -> Inputs:
    """The objective's inputs in an optimiser step: a row's are a function of (seed, step, row) alone.

    They are drawn on the CPU, so that every device trains on the same numbers.

    Args:
        batch: data, not empty.
        spec: of the data.
        config: the run.
        step: number of the step, from 0.
        device: where the inputs are wanted.
        rows: which rows of the step's batch `batch` holds; by default the first.

    Raises:
        InputError: if the batch is empty.
    """
    rows = range(len(batch.values)) if rows is None else rows
    if not rows:
        raise InputError("batch", "there are no elements in it")
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
    """Loss, gradient and one AdamW step; the moving averages are the caller's.

    Args:
        network: F_θ, whose parameters change.
        target: F_θ*.
        optimizer: over the network's parameters; its learning rate is set here.
        inputs: of the objective, of any number of rows but none.
        config: the run.
        step: number of the step, from 0.
        autocast: the precision of both networks.

    The gradient is that of the mean over all rows, in however many parts they are taken.

    Raises:
        InputError: if there are no rows.
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
        raise InputError("inputs", "an empty batch has no loss")
    rows = math.ceil(count / config.training.accumulation)
    parts = []
    for start in range(0, count, rows):
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
        # Looking for the place takes batches of other sizes, which are not worth compiling for.
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
