"""What an objective is: options, inputs drawn for rows of a batch, and a loss of named terms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from tvmatch.condition import Condition, Guidance
from tvmatch.errors import InputError
from tvmatch.flow_map import Network
from tvmatch.seeds import RowDraws


class Inputs(NamedTuple):
    """What a loss is evaluated on, each with B rows.

    Attributes:
        x0: data (B, ...) in the network's units.
        noise: x1 ~ N(0, I) of the same shape.
        times: by name, each (B,) in [0, 1].
        condition: labels or embeddings, and guidance weights.
    """

    x0: Tensor
    noise: Tensor
    times: Mapping[str, Tensor]
    condition: Condition

    def rows(self, which: slice | Tensor) -> "Inputs":
        """Some of the rows."""
        times = {name: time[which] for name, time in self.times.items()}
        return Inputs(self.x0[which], self.noise[which], times, self.condition.rows(which))

    def to(self, device: torch.device | str) -> "Inputs":
        """The same on another device."""
        times = {name: time.to(device) for name, time in self.times.items()}
        return Inputs(self.x0.to(device), self.noise.to(device), times, self.condition.to(device))


class Loss(NamedTuple):
    """A loss (scalar), and its named terms per sample (B,), of which it is the batch mean of the sum."""

    loss: Tensor
    terms: Mapping[str, Tensor]


@dataclass
class Objective:
    """A training objective. A subclass is a dataclass whose fields are its options, `--objective.*`.

    Training, its log, the report of what is not finite, pictures, `tvmatch check` and the dry run use an
    objective through this class alone. `register_objective` gives a subclass the name that options and files
    know it by.

    Attributes:
        term_times: for each term of the loss the name of the time its values belong to.
        scaled: whether f(x, t, s) = w (s − t) F, the scaled parameterisation; else (s − t) F.
        guidance_weight: w that the network is trained for, or a range of them.
        label_dropout: probability of dropping a sample's condition.
        target_ema: rate of the moving average of the weights that is the target network; 0: there is none,
            and the target is the network itself.
        teacher: a checkpoint whose frozen velocity is the target instead; None: there is none.
    """

    term_times: ClassVar[Mapping[str, str]]
    # Not annotated, so that a subclass has those as options alone that it declares.
    scaled = False
    guidance_weight = cast(Guidance, 1.0)
    label_dropout = 0.0
    target_ema = 0.0
    teacher = cast(str | None, None)

    def __post_init__(self) -> None:
        """Check the options, also those that were changed later; raises an InputError."""

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        """The inputs of some rows of a step's batch, on the CPU: a row's are the same in every range.

        Args:
            x0: data (len(rows), ...) in the network's units.
            condition: of the data: labels or embeddings as they are, no weights.
            null_label: the number of a dropped label.
            draws: the step's random numbers, addressed by purpose and row.
            rows: which rows of the batch.
        """
        raise NotImplementedError

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        """The loss of a batch, with gradients by the parameters of `network` alone.

        Args:
            network: F_θ.
            target: F_θ*, a moving average of the network, a teacher, or the network itself.
            inputs: as `draw` gives them, on the networks' device.
        """
        raise NotImplementedError

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise an InputError if `draw` gives no time that a term belongs to."""
        for term, time in self.term_times.items():
            if time not in inputs.times:
                raise InputError(
                    "objective",
                    f"the term {term} belongs to the time {time}, draw gives {sorted(inputs.times)}",
                )

    def check_loss(self, loss: Loss, count: int) -> None:
        """Raise an InputError unless a loss of `count` samples is a scalar with the terms of `term_times`."""
        if loss.loss.ndim:
            raise InputError("objective", f"the loss must be a scalar, got shape {tuple(loss.loss.shape)}")
        if loss.terms.keys() != self.term_times.keys():
            raise InputError(
                "objective",
                f"the loss has the terms {sorted(loss.terms)}, term_times {sorted(self.term_times)}",
            )
        for name, values in loss.terms.items():
            if values.shape != (count,):
                raise InputError(
                    "objective", f"the term {name} must have shape ({count},), got {tuple(values.shape)}"
                )

    def network_times(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The times (t, s) of the pass in which the network carries a tangent, or else of its first pass."""
        if "t" not in inputs.times:
            raise InputError("objective", f"{type(self).__name__} draws no time t: override network_times")
        t = inputs.times["t"]
        return t, inputs.times.get("s", t)

    def check(self, conditional: bool, *, hint: str = "") -> None:
        """Raise an InputError if the objective does not fit the data.

        Args:
            conditional: whether the data have classes or embeddings.
            hint: how they would have, to end the message with.
        """


def draw_condition(
    condition: Condition, null_label: int, objective: Objective, draws: RowDraws, rows: range
) -> Condition:
    """Drop conditions and draw guidance weights: w of the objective, 1 where the condition is dropped.

    Args:
        condition: labels or embeddings of the data, of len(rows) samples.
        null_label: the number of a dropped label.
        objective: the probability of dropping, and w; for a range (low, high) 1/w is uniform between 1/high
            and 1/low.
        draws: where the random numbers come from.
        rows: which rows of the batch.
    """
    weight = objective.guidance_weight
    if isinstance(weight, tuple):
        low, high = weight
        inverse = 1 / high + draws.uniform("guidance weight", rows) * (1 / low - 1 / high)
        condition = condition._replace(guidance_weight=(1 / inverse).to(torch.float32))
    elif weight != 1:
        weights = torch.full((len(rows),), weight, dtype=torch.float32, device="cpu")
        condition = condition._replace(guidance_weight=weights)
    if condition.is_unconditional:
        return condition
    dropped = draws.uniform("dropped label", rows) < objective.label_dropout
    return condition.drop(dropped, null_label)
