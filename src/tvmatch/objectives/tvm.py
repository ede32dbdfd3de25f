"""Terminal Velocity Matching (arXiv 2511.19797, Eqs. 12–15 and Algorithm 1)."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tvmatch.condition import MOST_GUIDANCE, Condition, Guidance, as_condition, expect_per_sample
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap, Network, expect_same_kind, interpolate, per_sample
from tvmatch.objectives.base import Inputs, Loss, Objective, draw_condition
from tvmatch.objectives.registry import register_objective
from tvmatch.objectives.times import TimesConfig, sample_times
from tvmatch.option_checks import check_fields, require
from tvmatch.seeds import RowDraws


class TVMLoss(NamedTuple):
    """The loss (scalar) and, per sample (B,), its two terms, already divided by w²."""

    loss: Tensor
    terminal: Tensor
    flow: Tensor


def tvm_loss(
    network: Network,
    target: Network,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    s: Tensor,
    s_prime: Tensor,
    labels: Tensor | Condition | None = None,
    guidance_weight: Tensor | None = None,
    *,
    scaled: bool,
    detach_jvp: bool = False,
) -> TVMLoss:
    """Batch mean of (T + V) / w², where v = x1 − x0, ‖·‖² is the mean over pixels and sg stops gradients:

        T = ‖ d/ds f_θ(x_t, t, s, c, w) − sg[u_θ*(x_t + f_θ(x_t, t, s, c, w), s, c, w)] ‖²     (0 where t = s)
        V = ‖ u_θ(x_s', s', c, w) − sg[w v + (1 − w) u_θ*(x_s', s', ∅, 1)] ‖²

    Args:
        network: F_θ, which receives gradients.
        target: F_θ*, usually an exponential moving average of the network; receives no gradients.
        x0: data (B, ...) in the network's units.
        noise: x1 ~ N(0, I) of the same shape, used in both terms.
        t: (B,) starting times in [0, 1].
        s: (B,) terminal times, s ≤ t.
        s_prime: (B,) times of the flow term.
        labels: int64 (B,), the class count for a dropped label; None drops all. Or a `Condition`.
        guidance_weight: (B,) w ≥ 1, which must be 1 where the label is dropped. If given, the target is also
            evaluated without labels, for its unconditional velocity. None means 1, or the `Condition`'s.
        scaled: the scaled parameterisation, k(w) = w.
        detach_jvp: no gradient through ∂_s F_θ (faster, biased).

    Returns:
        The loss and its terms. Non-finite values are returned as they are.

    Raises:
        InputError: if an argument or an output of a network has a wrong shape, dtype or device. Values, such
            as s ≤ t, are not checked, since that would synchronise with the GPU.
    """
    condition = as_condition(labels, guidance_weight)
    expect_same_kind(x0, noise=noise)
    expect_per_sample(x0, t=t, s=s, s_prime=s_prime)
    condition.check(x0)
    online, frozen = FlowMap(network, scaled), FlowMap(target, scaled)

    x_t = interpolate(x0, noise, t)
    displacement, terminal_velocity = online.displacement_and_terminal_velocity(
        x_t, t, s, condition, detach_jvp=detach_jvp
    )
    x_s_prime = interpolate(x0, noise, s_prime)
    velocity = online.velocity(x_s_prime, s_prime, condition)

    with torch.no_grad():
        end_velocity = frozen.velocity(x_t + displacement, s, condition)
        guided_velocity = noise - x0
        if condition.guidance_weight is not None:
            w = per_sample(condition.guidance_weight, x0)
            unconditional_velocity = frozen.velocity(x_s_prime, s_prime, condition.unconditional())
            guided_velocity = w * guided_velocity + (1 - w) * unconditional_velocity

    terminal = torch.where(t > s, _mean_square(terminal_velocity - end_velocity), 0.0)
    flow = _mean_square(velocity - guided_velocity)
    if condition.guidance_weight is not None:
        terminal, flow = terminal / condition.guidance_weight**2, flow / condition.guidance_weight**2
    return TVMLoss((terminal + flow).mean(), terminal, flow)


def _mean_square(x: Tensor) -> Tensor:
    """(B, ...) to (B,)."""
    return x.square().flatten(1).mean(1)


@register_objective("tvm")
@dataclass
class TVM(Objective):
    """Terminal Velocity Matching (TVM §3).

    Attributes:
        guidance_weight: w ≥ 1, a constant, or a pair [low, high] with 1/w uniform between 1/high and 1/low.
        scaled: use the scaled parameterisation, in which the network's output is multiplied by w.
        label_dropout: probability of dropping a label, with w = 1; may be 0 only if w = 1 or with a teacher.
        target_ema: rate of the target network's moving average; 0: the target is the network itself.
        detach_jvp: no gradient through the derivative in s (faster, biased).
        teacher: a checkpoint whose guided velocity is the target (distillation), instead of `target_ema`.
        times: distribution of (t, s, s').
    """

    term_times: ClassVar = {"terminal": "t", "flow": "s_prime"}

    guidance_weight: Guidance = 1.0
    scaled: bool = True
    label_dropout: float = 0.1
    target_ema: float = 0.99
    detach_jvp: bool = False
    teacher: str | None = None
    times: TimesConfig = field(default_factory=TimesConfig)

    def __post_init__(self) -> None:
        check_fields(self, "objective")
        check_fields(self.times, "objective.times")
        self.times.__post_init__()
        if isinstance(self.guidance_weight, list):  # from YAML
            self.guidance_weight = (self.guidance_weight[0], self.guidance_weight[1])
        weights = self.guidance_weight if isinstance(self.guidance_weight, tuple) else (self.guidance_weight,)
        for weight in weights:
            expected = f"at least 1 and at most {MOST_GUIDANCE:,.0f}"
            require("objective.guidance_weight", weight, 1 <= weight <= MOST_GUIDANCE, expected)
        if len(weights) == 2 and weights[0] >= weights[-1]:
            raise InputError(
                "objective.guidance_weight", f"must be [low, high] with low < high, got {list(weights)}"
            )
        p, rate = self.label_dropout, self.target_ema
        require("objective.label_dropout", p, 0 <= p <= 1, "in [0, 1]")
        require("objective.target_ema", rate, 0 <= rate < 1, "in [0, 1)")

    def check(self, conditional: bool, *, hint: str = "") -> None:
        """w ≠ 1 needs classes, and the unconditional velocity, which only dropped labels train."""
        weight = self.guidance_weight
        if weight == 1:
            return
        if not conditional:
            raise InputError(
                "objective.guidance_weight", f"must be 1 for data without classes, got {weight}{hint}"
            )
        if self.label_dropout == 0 and self.teacher is None:
            raise InputError(
                "objective.label_dropout",
                f"must be positive (0.1, say) for a guidance_weight of {weight}, "
                "since guidance needs the velocity without a label",
            )

    def draw(self, x0: Tensor, condition: Condition, null_label: int, draws: RowDraws, rows: range) -> Inputs:
        """Draw noise, times, dropped labels and guidance weights; see `Objective.draw`."""
        noise = draws.normal("noise", rows, x0.shape[1:])
        times = sample_times(self.times, draws, rows)._asdict()
        return Inputs(x0, noise, times, draw_condition(condition, null_label, self, draws, rows))

    def loss(self, network: Network, target: Network, inputs: Inputs) -> Loss:
        """`tvm_loss` with its two terms."""
        x0, noise, times, condition = inputs
        loss, terminal, flow = tvm_loss(
            network, target, x0, noise, **times, labels=condition, scaled=self.scaled,
            detach_jvp=self.detach_jvp,
        )  # fmt: skip
        return Loss(loss, {"terminal": terminal, "flow": flow})
