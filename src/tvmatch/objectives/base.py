"""`Objective`: options, random inputs for the rows of a batch, and a loss with named terms."""

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
    """Inputs of a loss, for B samples.

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
        """A subset of the rows."""
        times = {name: time[which] for name, time in self.times.items()}
        return Inputs(self.x0[which], self.noise[which], times, self.condition.rows(which))

    def to(self, device: torch.device | str) -> "Inputs":
        """The inputs on another device."""
        times = {name: time.to(device) for name, time in self.times.items()}
        return Inputs(self.x0.to(device), self.noise.to(device), times, self.condition.to(device))


class Loss(NamedTuple):
    """A loss (scalar) and its named terms per sample (B,); the loss is the batch mean of their sum."""

    loss: Tensor
    terms: Mapping[str, Tensor]


@dataclass
class Objective:
    """A training objective. A subclass is a dataclass whose fields are its options, `--objective.*`.

    Training, its log, the report of non-finite values, pictures, `tvmatch check` and the dry run use only
    this interface. `register_objective` gives a subclass its name in options and files.

    Attributes:
        term_times: name of the time of each term of the loss.
        scaled: use the scaled parameterisation f(x, t, s) = w (s − t) F; otherwise (s − t) F.
        guidance_weight: w for which the network is trained, or a range of weights.
        label_dropout: probability of dropping a sample's condition.
        target_ema: rate of the target network's moving average; 0: the target is the network.
        teacher: a checkpoint whose frozen velocity is the target instead; None: no teacher.
    """

    term_times: ClassVar[Mapping[str, str]]
    # Not annotated, so that they are options only of subclasses that declare them.
    scaled = False
    guidance_weight = cast(Guidance, 1.0)
    label_dropout = 0.0
    target_ema = 0.0
    teacher = cast(str | None, None)

    def __post_init__(self) -> None:
        """Check the options; also called after they were changed. Raises an InputError."""

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        """Draw the inputs for some rows of a step's batch, on the CPU.

        The inputs of a row must not depend on which other rows are drawn.

        Args:
            x0: data (len(rows), ...) in the network's units.
            condition: labels or embeddings of the data, before dropping, without weights.
            null_label: the number of the dropped label.
            draws: the random numbers of the step, by name and row.
            rows: the rows of the batch.
        """
        raise NotImplementedError

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        """Compute the loss of a batch. Only the parameters of `network` receive gradients.

        Args:
            network: F_θ.
            target: F_θ*, a moving average of the network, a teacher, or the network itself.
            inputs: from `draw`, on the networks' device.
        """
        raise NotImplementedError

    def check_inputs(self, inputs: Inputs) -> None:
        """Raise an InputError if the time of a term is missing in the inputs."""
        for term, time in self.term_times.items():
            if time not in inputs.times:
                raise InputError(
                    "objective",
                    f"the term {term} has the time {time}, but draw returns {sorted(inputs.times)}",
                )

    def check_loss(self, loss: Loss, count: int) -> None:
        """Raise an InputError unless the loss is a scalar with the terms of `term_times`, each (count,)."""
        if loss.loss.ndim:
            raise InputError("objective", f"the loss must be a scalar, got shape {tuple(loss.loss.shape)}")
        if loss.terms.keys() != self.term_times.keys():
            raise InputError(
                "objective",
                f"the loss has the terms {sorted(loss.terms)}, term_times has {sorted(self.term_times)}",
            )
        for name, values in loss.terms.items():
            if values.shape != (count,):
                raise InputError(
                    "objective", f"the term {name} must have shape ({count},), got {tuple(values.shape)}"
                )

    def network_times(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The times (t, s) of the pass with a tangent, or of the first pass if none has a tangent."""
        if "t" not in inputs.times:
            raise InputError("objective", f"{type(self).__name__} draws no time t: override network_times")
        t = inputs.times["t"]
        return t, inputs.times.get("s", t)

    def check(self, conditional: bool, *, hint: str = "") -> None:
        """Raise an InputError if the objective does not fit the data.

        Args:
            conditional: whether the data have classes or embeddings.
            hint: appended to the message; says how the data can have classes.
        """


def draw_condition(
    condition: Condition, null_label: int, objective: Objective, draws: RowDraws, rows: range
) -> Condition:
    """Drop conditions and draw guidance weights; the weight of a dropped condition is 1.

    Args:
        condition: labels or embeddings of the data, for len(rows) samples.
        null_label: the number of the dropped label.
        objective: gives dropout probability and w; for a range, 1/w is uniform between 1/high and 1/low.
        draws: the random numbers of the step.
        rows: the rows of the batch.
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
