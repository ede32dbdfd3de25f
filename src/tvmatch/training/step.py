"""One optimiser step, from a batch of data to new weights, read top to bottom."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.data.base import Batch
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.flow_map import Network
from tvmatch.objectives import TVMLoss, tvm_loss
from tvmatch.seeds import RowDraws
from tvmatch.times import Times, sample_times
from tvmatch.training.config import Config, ObjectiveConfig
from tvmatch.training.non_finite import NonFiniteError, describe


class Conditions(NamedTuple):
    """Labels (B,), the class count where dropped, and guidance weights (B,); None: no classes, or w = 1."""

    labels: Tensor | None
    guidance_weight: Tensor | None


class Draws(NamedTuple):
    """All the inputs of one step's loss, each with B rows."""

    x0: Tensor
    noise: Tensor
    times: Times
    conditions: Conditions

    def part(self, rows: slice | Tensor) -> "Draws":
        """Some of the rows."""
        labels, weight = self.conditions
        conditions = Conditions(
            None if labels is None else labels[rows], None if weight is None else weight[rows]
        )
        times = Times(*(time[rows] for time in self.times))
        return Draws(self.x0[rows], self.noise[rows], times, conditions)


class StepResult(NamedTuple):
    """Loss terms per sample (B,), the times they belong to, and the gradient norm before clipping."""

    loss: TVMLoss
    times: Times
    gradient_norm: Tensor


def draw_conditions(
    labels: Tensor | None, null_label: int, config: ObjectiveConfig, draws: RowDraws, rows: range
) -> Conditions:
    """Drop labels and draw guidance weights: w of the configuration, 1 where the label is dropped.

    Args:
        labels: int64 (len(rows),), or None without classes.
        null_label: the number of a dropped label.
        config: the probability of dropping, and w.
        draws: where the random numbers come from.
        rows: which rows of the batch.
    """
    if isinstance(config.guidance_weight, tuple):
        low, high = config.guidance_weight
        inverse = 1 / high + draws.uniform("guidance weight", rows) * (1 / low - 1 / high)
        weight = (1 / inverse).to(torch.float32)
    elif config.guidance_weight == 1:
        weight = None
    else:
        weight = torch.full((len(rows),), config.guidance_weight, dtype=torch.float32, device="cpu")
    if labels is None:
        return Conditions(None, weight)
    dropped = draws.uniform("dropped label", rows) < config.label_dropout
    labels = torch.where(dropped, null_label, labels)
    return Conditions(labels, None if weight is None else torch.where(dropped, 1.0, weight))


def draw_inputs(
    batch: Batch,
    spec: DataSpec,
    config: Config,
    step: int,
    device: torch.device,
    rows: range | None = None,
) -> Draws:
    """Noise, times and conditions of an optimiser step: a row's are a function of (seed, step, row) alone.

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
    draws = RowDraws(config.seed, "step", step)
    x0 = spec.normalize(batch.values)
    noise = draws.normal("noise", rows, x0.shape[1:])
    times = sample_times(config.times, draws, rows)
    labels, weight = draw_conditions(batch.labels, spec.class_count, config.objective, draws, rows)
    return Draws(
        x0.to(device),
        noise.to(device),
        Times(*(time.to(device) for time in times)),
        Conditions(
            None if labels is None else labels.to(device), None if weight is None else weight.to(device)
        ),
    )


def training_step(
    network: nn.Module,
    target: Network,
    optimizer: torch.optim.Optimizer,
    draws: Draws,
    config: Config,
    step: int,
    autocast: torch.autocast,
) -> StepResult:
    """Loss, gradient and one AdamW step; the moving averages are the caller's.

    Args:
        network: F_θ, whose parameters change.
        target: F_θ*.
        optimizer: over the network's parameters; its learning rate is set here.
        draws: the step's inputs, of any number of rows but none.
        config: the run.
        step: number of the step, from 0.
        autocast: the precision of both networks.

    The gradient is that of the mean over all rows, in however many parts they are taken.

    Raises:
        InputError: if there are no rows.
        NonFiniteError: before any weight changes, if the loss or its gradient is not finite.
    """

    def loss_of_rows(which: slice | Tensor) -> TVMLoss:
        part = draws.part(which)
        with autocast:
            return tvm_loss(
                network,
                target,
                part.x0,
                part.noise,
                *part.times,
                *part.conditions,
                scaled=config.objective.scaled,
                detach_jvp=config.objective.detach_jvp,
            )

    optimizer.zero_grad(set_to_none=True)
    count = len(draws.x0)
    if count == 0:
        raise InputError("draws", "an empty batch has no loss")
    rows = math.ceil(count / config.training.accumulation)
    parts = []
    for start in range(0, count, rows):
        part = loss_of_rows(slice(start, start + rows))
        share = part.loss * (min(rows, count - start) / count)
        share.backward()
        parts.append(TVMLoss(share.detach(), part.terminal.detach(), part.flow.detach()))
    loss = TVMLoss(
        torch.stack([part.loss for part in parts]).sum(),
        torch.cat([part.terminal for part in parts]),
        torch.cat([part.flow for part in parts]),
    )
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    gradient_norm = nn.utils.get_total_norm(gradients)
    if not torch.isfinite(loss.loss + gradient_norm).item():
        # Looking for the place takes batches of other sizes, which are not worth compiling for.
        with torch.compiler.set_stance("force_eager") if config.training.compile else nullcontext():
            found = describe(step + 1, draws.x0, loss, draws.times, network, loss_of_rows, rows_at_once=rows)
        raise NonFiniteError(found)

    if config.optimizer.gradient_clip is not None:
        nn.utils.clip_grads_with_norm_(network.parameters(), config.optimizer.gradient_clip, gradient_norm)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.rate_at(step, config.training.steps)
    optimizer.step()
    return StepResult(loss, draws.times, gradient_norm)
