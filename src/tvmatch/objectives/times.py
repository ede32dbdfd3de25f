"""Distributions of the times (t, s, s') at which the objective is evaluated (TVM, arXiv 2511.19797).

t = 1 is noise, t = 0 is data, and 0 ≤ s ≤ t ≤ 1. The terminal term uses (t, s), the flow term s'.
σ is the logistic function, Φ the standard normal CDF. A logit-normal (μ, ς) variable is σ(μ + ς Z)
with Z ~ N(0, 1); its CDF at x is Φ((logit x − μ) / ς).

All times are drawn as logits in float64, where no probability underflows, and rounded to float32 at the end.
Rounding is monotone and preserves 0 and 1, so 0 ≤ s ≤ t ≤ 1 holds for the result.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws, in_whole_blocks

_LARGEST_BELOW_ONE = 1.0 - 2.0**-53
_CHOICES = {"distribution": ("gap*", "gap", "truncated", "clamped"), "s_prime": ("independent", "tied")}


@dataclass
class TimesConfig:
    """Distribution of the times of a training batch. A pair is (mean, std) of a logit.

    `gap` (and `gap*`): g = σ(N(gap)), s ~ logit-normal(s) truncated to s < 1 − g, t = s + g.
    `truncated`: t ~ logit-normal(t), s ~ logit-normal(s) truncated to s ≤ t.
    `clamped`: t ~ logit-normal(t), r ~ logit-normal(s) independent, s = min(r, t).
    With probability `equal_probability`, t is then set to s. This does not change the flow term.

    Attributes:
        distribution: of (t, s); `gap*` is `gap` with an independent, untruncated s' ~ logit-normal(s).
        gap: mean and std of the logit of t − s, for `gap` and `gap*`.
        t: mean and std of the logit of t, for `truncated` and `clamped`.
        s: mean and std of the logit of s before truncation or clamping.
        s_prime: `independent`: s' is s of a second, independent draw of the distribution (for `gap*` of the
            untruncated logit-normal); `tied`: s' = s.
        equal_probability: probability of t = s, where the loss is the Flow Matching loss.

    Raises:
        InputError: for an unknown name, a non-finite mean, a std that is not positive and finite, a
            probability outside [0, 1], or `gap*` with a tied s'.
    """

    distribution: Literal["gap*", "gap", "truncated", "clamped"] = "gap*"
    gap: tuple[float, float] = (-0.8, 1.0)
    t: tuple[float, float] = (1.0, 1.0)
    s: tuple[float, float] = (-0.4, 1.0)
    s_prime: Literal["independent", "tied"] = "independent"
    equal_probability: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise InputError(
                    f"objective.times.{name}", f"must be {expected}, got {getattr(self, name)!r}"
                )
        for name in ("gap", "t", "s"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(math.isfinite(number) for number in pair) or pair[1] <= 0:
                expected = "a finite mean and a positive finite std"
                raise InputError(f"objective.times.{name}", f"must be {expected}, got {pair}")
        probability = self.equal_probability
        if not 0 <= probability <= 1:
            raise InputError("objective.times.equal_probability", f"must lie in [0, 1], got {probability}")
        if self.distribution == "gap*" and self.s_prime == "tied":
            raise InputError("objective.times.s_prime", "must be independent for gap*; use gap for a tied s'")


class Times(NamedTuple):
    """Times of a batch, each float32 of shape (B,) in [0, 1], with s ≤ t."""

    t: Tensor
    s: Tensor
    s_prime: Tensor


def sample_times(config: TimesConfig, draws: RowDraws, rows: range) -> Times:
    """Draw independent (t, s, s') for each of the rows, on the CPU.

    Args:
        config: the distribution.
        draws: the random numbers of the step.
        rows: the rows of the batch, not empty. The times of a row do not depend on the other rows.
    """
    t, s, s_prime = in_whole_blocks(lambda block: _times(config, draws, block), rows).unbind(1)
    return Times(t, s, s_prime)


def _times(config: TimesConfig, draws: RowDraws, rows: range) -> Tensor:
    """t, s and s' side by side, float32 of shape (len(rows), 3)."""
    t, s = _pair(config, draws, "t and s", rows)
    if config.s_prime == "tied":
        s_prime = s
    elif config.distribution == "gap*":
        s_prime = torch.sigmoid(_normal(config.s, draws, "s'", rows))
    else:
        _, s_prime = _pair(config, draws, "s'", rows)
    if config.equal_probability:
        t = torch.where(draws.uniform("t = s", rows) < config.equal_probability, s, t)
    return torch.stack([t, s, s_prime], dim=1).to(torch.float32)


def _pair(config: TimesConfig, draws: RowDraws, purpose: str, rows: range) -> tuple[Tensor, Tensor]:
    """(t, s) in float64, before t is set to s for some rows."""
    if config.distribution in ("gap", "gap*"):
        gap_logit = _normal(config.gap, draws, f"{purpose}: gap", rows)
        # logit(1 − g) = −logit g
        s = torch.sigmoid(_truncated_normal(config.s, -gap_logit, draws, f"{purpose}: below", rows))
        return (s + torch.sigmoid(gap_logit)).clamp(max=1.0), s
    t_logit = _normal(config.t, draws, f"{purpose}: t", rows)
    if config.distribution == "truncated":
        s_logit = _truncated_normal(config.s, t_logit, draws, f"{purpose}: below", rows)
    else:
        s_logit = torch.minimum(_normal(config.s, draws, f"{purpose}: s", rows), t_logit)
    return torch.sigmoid(t_logit), torch.sigmoid(s_logit)


def _normal(parameters: tuple[float, float], draws: RowDraws, purpose: str, rows: range) -> Tensor:
    """N(mean, std²), float64."""
    mean, std = parameters
    return mean + std * draws.normal(purpose, rows, dtype=torch.float64)


def _truncated_normal(
    parameters: tuple[float, float], upper: Tensor, draws: RowDraws, purpose: str, rows: range
) -> Tensor:
    """N(mean, std²) truncated to values below `upper` (B,), by the inverse CDF.

    With b = (upper − mean) / std and U uniform, z solves log Φ(z) = log U + log Φ(b). Without the logarithm
    Φ(b) would underflow for b < −38, and z would be −∞.
    """
    mean, std = parameters
    # The clamp keeps log Φ(b) ≈ −b²/2 finite if std is close to zero; minimum() below then returns `upper`.
    bound = ((upper - mean) / std).clamp(min=-1e100)
    probability = (1.0 - draws.uniform(purpose, rows)).clamp(max=_LARGEST_BELOW_ONE)  # in (0, 1)
    z = _inverse_log_normal_cdf(probability.log() + torch.special.log_ndtr(bound))
    return torch.minimum(mean + std * z, upper)


def _inverse_log_normal_cdf(log_probability: Tensor) -> Tensor:
    """z with log Φ(z) = log_probability < 0, with a relative error of about 1e-15 in float64.

    Above log p = −5 the inverse CDF itself is accurate. Below, Newton's method on log Φ is used: log Φ is
    concave and the initial value −√(−2 log p) is less than the solution, so the iteration increases
    monotonically. The initial value is off by at most 30 %, and four steps reach rounding error everywhere.
    """
    centre = torch.special.ndtri(log_probability.exp().clamp(max=_LARGEST_BELOW_ONE))
    z = -(-2.0 * log_probability).sqrt()
    for _ in range(4):
        slope = math.sqrt(2.0 / math.pi) / torch.special.erfcx(z / -math.sqrt(2.0))  # φ(z) / Φ(z)
        z = z + (log_probability - torch.special.log_ndtr(z)) / slope
    return torch.where(log_probability > -5.0, centre, z)
