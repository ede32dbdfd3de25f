"""One optimiser step, from a batch of data to new weights, read top to bottom."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvmatch.data.base import Batch
from tvmatch.data.spec import DataSpec
from tvmatch.flow_map import Network
from tvmatch.objectives import TVMLoss, tvm_loss
from tvmatch.seeds import generator
from tvmatch.times import Times, sample_times
from tvmatch.training.config import Config, ObjectiveConfig

TIME_BINS = 4


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

    def part(self, rows: slice) -> "Draws":
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


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; the message names the step, the time bin and the term."""


def draw_conditions(
    labels: Tensor | None, count: int, null_label: int, config: ObjectiveConfig, random: torch.Generator
) -> Conditions:
    """Drop labels and draw guidance weights: w of the configuration, 1 where the label is dropped.

    Args:
        labels: int64 (count,), or None without classes.
        null_label: the number of a dropped label.
    """
    dropped = torch.rand(count, generator=random) < config.label_dropout
    if isinstance(config.guidance_weight, tuple):
        low, high = config.guidance_weight
        inverse = torch.empty(count).uniform_(1 / high, 1 / low, generator=random)
        weight = inverse.reciprocal()
    elif config.guidance_weight == 1:
        weight = None
    else:
        weight = torch.full((count,), config.guidance_weight)
    if labels is None:
        return Conditions(None, weight)
    labels = torch.where(dropped, null_label, labels)
    return Conditions(labels, None if weight is None else torch.where(dropped, 1.0, weight))


def draw_inputs(batch: Batch, spec: DataSpec, config: Config, step: int, device: torch.device) -> Draws:
    """Noise, times and conditions of optimiser step `step`, a function of (seed, step) alone.

    They are drawn on the CPU, so that every device trains on the same numbers.
    """
    random = generator(config.seed, "step", step)
    x0 = spec.normalize(batch.values)
    noise = torch.randn(x0.shape, generator=random)
    times = sample_times(config.times, len(x0), random)
    labels, weight = draw_conditions(batch.labels, len(x0), spec.class_count, config.objective, random)
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

    Raises:
        NonFiniteError: before any weight changes, if the loss or its gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    rows = len(draws.x0) // config.training.accumulation
    losses = []
    for start in range(0, len(draws.x0), rows):
        x0, noise, times, (labels, weight) = draws.part(slice(start, start + rows))
        with autocast:
            loss = tvm_loss(
                network,
                target,
                x0,
                noise,
                *times,
                labels,
                weight,
                scaled=config.objective.scaled,
                detach_jvp=config.objective.detach_jvp,
            )
        (loss.loss / config.training.accumulation).backward()
        losses.append(loss)
    loss = TVMLoss(
        torch.stack([part.loss.detach() for part in losses]).mean(),
        torch.cat([part.terminal.detach() for part in losses]),
        torch.cat([part.flow.detach() for part in losses]),
    )
    largest = config.optimizer.gradient_clip or float("inf")
    gradient_norm = nn.utils.clip_grad_norm_(network.parameters(), largest, foreach=True)
    result = StepResult(loss, draws.times, gradient_norm)
    if not torch.isfinite(loss.loss + gradient_norm).item():
        raise NonFiniteError(describe_non_finite(result, network, step))

    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.rate_at(step, config.training.steps)
    optimizer.step()
    return result


def describe_non_finite(result: StepResult, network: nn.Module, step: int) -> str:
    """Where it broke: the term and the bin of its time, or the parameters whose gradient is not finite."""
    terms = (
        ("terminal term", result.loss.terminal, "t", result.times.t),
        ("flow term", result.loss.flow, "s'", result.times.s_prime),
    )
    found = []
    for name, values, symbol, times in terms:
        bad = ~torch.isfinite(values)
        if bad.any():
            bins = sorted({time_bin(time) for time in times[bad].tolist()})
            found.append(f"the {name} of {int(bad.sum())} samples with {symbol} in {' and '.join(bins)}")
    if not found:
        broken = [
            name
            for name, parameter in network.named_parameters()
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        found.append(
            f"the gradient of {len(broken)} parameters, first {', '.join(broken[:3])} (both terms are finite)"
        )
    return f"step {step}: not finite: {'; '.join(found)}"


def time_bin(time: float) -> str:
    """The name of the quarter of [0, 1] that a time lies in, such as 0.25–0.50."""
    index = min(int(time * TIME_BINS), TIME_BINS - 1)
    return f"{index / TIME_BINS:.2f}–{(index + 1) / TIME_BINS:.2f}"
