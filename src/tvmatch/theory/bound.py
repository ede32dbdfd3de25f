"""Measure both sides of the Wasserstein bound of the TVM loss.

This is an explicit form of Theorem 1 of TVM (arXiv 2511.19797). Let y_s = x_t + f_θ(x_t, t, s) be the model's
path, z_s = ψ(x_t, t, s) the exact one, e(s) = y_s − z_s with e(t) = 0, and

    a(s) = ‖d/ds f_θ − u_θ(y_s, s)‖        terminal velocity against the model's velocity
    b(s) = ‖u_θ(z_s, s) − u(z_s, s)‖       the model's velocity against the exact one
    L(s) = sup over x_t of ‖u_θ(y_s, s) − u_θ(z_s, s)‖ / ‖e(s)‖           two-sided, or
           sup over x_t of −⟨e(s), u_θ(y_s, s) − u_θ(z_s, s)⟩ / ‖e(s)‖²    one-sided, may be negative

Since de/ds = [d/ds f_θ − u_θ(y)] + [u_θ(y) − u_θ(z)] + [u_θ(z) − u(z)] and s runs down from t to 0,
−d‖e‖/ds ≤ a + b + L ‖e‖. By Grönwall's inequality an error made at s grows by at most Λ(s) = exp ∫_0^s L
until s = 0. With Minkowski's inequality for the root mean square,

    W₂(y_0, z_0) ≤ √E‖e(0)‖² ≤ ∫_0^t Λ (√E a² + √E b²) ds                                (tight form)

and with Cauchy–Schwarz and E b² = E‖u_θ(x_s, s) − v‖² − E Tr Var(v | x_s),

    W₂² ≤ 2t ∫_0^t Λ² L_TVM ds + C,   L_TVM = E a² + E‖u_θ(x_s, s) − v‖²,
                                      C = −2t ∫_0^t Λ² E Tr Var(v | x_s) ds               (theorem's form).

L_TVM is the training loss with w = 1, θ* = θ, s' = s, its norms summed over the dimensions, not averaged.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap, interpolate


class ExactFlow(Protocol):
    """A flow with known velocity and flow map; see `tvmatch.theory.GaussianFlow`."""

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor: ...

    def flow_map(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor: ...

    def conditional_variance(self, t: float | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Bound:
    """Both sides of the inequality for one flow map and one t. Curves are float64 of shape (G + 1,).

    Attributes:
        s: the grid from 0 to t.
        terminal_error: √E a(s)².
        velocity_error: √E b(s)².
        lipschitz: L(s).
        amplification: Λ(s).
        loss: L_TVM(s).
        conditional_variance: E Tr Var(v | x_s).
        generated: y_0 = x_t + f_θ(x_t, t, 0), (B, D).
        exact: z_0 = ψ(x_t, t, 0), (B, D). W₂ of `generated` and `exact` is the left side.
        error: √E‖e(0)‖², an upper bound of that W₂.
        tight_form: ∫ Λ (√E a² + √E b²) ds, an upper bound of W₂ and `error`.
        theorem_form: 2t ∫ Λ² L_TVM ds + C, an upper bound of their squares.
        constant: C.
        standard_error: of `theorem_form`, due to the sampling noise of v.
    """

    s: Tensor
    terminal_error: Tensor
    velocity_error: Tensor
    lipschitz: Tensor
    amplification: Tensor
    loss: Tensor
    conditional_variance: Tensor
    generated: Tensor
    exact: Tensor
    error: float
    tight_form: float
    theorem_form: float
    constant: float
    standard_error: float


@dataclass(frozen=True)
class _Point:
    """Measurements at one s, per sample (B,) except for the Lipschitz quotient."""

    terminal: Tensor  # a²
    velocity: Tensor  # b²
    flow_excess: Tensor  # ‖u_θ(x_s, s) − v‖² − ‖u(x_s, s) − v‖²
    lipschitz: float  # NaN where y_s = z_s for every sample
    generated: Tensor
    exact: Tensor


@torch.no_grad()
def wasserstein_bound(
    flow_map: FlowMap,
    flow: ExactFlow,
    x0: Tensor,
    noise: Tensor,
    t: float = 1.0,
    *,
    grid: int = 128,
    one_sided: bool = False,
) -> Bound:
    """Measure both sides of the inequality on the samples x_t = (1−t) x0 + t x1.

    For the empirical measure of these samples the tight form has no statistical error: all expectations and
    the supremum in L are over the samples whose error is bounded. The trapezoidal rule has error O(G⁻²).

    The theorem's form needs v, which is random given x_s. To reduce the sampling noise, its flow term
    E‖u_θ(x_s, s) − v‖² is measured as mean(‖u_θ(x_s, s) − v‖² − ‖u(x_s, s) − v‖²) + E Tr Var(v | x_s).

    Args:
        flow_map: the model; used without labels and guidance.
        flow: exact flow for the distribution of x0.
        x0: data (B, D). Use float64 for data and network: L is a quotient of small differences.
        noise: x1 ~ N(0, I), (B, D).
        t: starting time in (0, 1].
        grid: number G of equal intervals of s in [0, t].
        one_sided: use the one-sided L, which is smaller.

    Raises:
        InputError: if t or grid is out of range.
    """
    if not 0 < t <= 1:
        raise InputError(f"t must lie in (0, 1], got {t}")
    if grid < 1:
        raise InputError(f"grid must be at least 1, got {grid}")
    s = torch.linspace(0, t, grid + 1, dtype=torch.float64, device="cpu")
    points = [_measure(flow_map, flow, x0, noise, t, float(time), one_sided) for time in s]

    lipschitz = torch.tensor([point.lipschitz for point in points], dtype=torch.float64, device="cpu")
    lipschitz[-1] = lipschitz[-2]  # at s = t the quotient is 0/0; take the value of its neighbour
    lipschitz = lipschitz.nan_to_num(nan=0.0)  # without any error, the value does not matter
    steps = (lipschitz[1:] + lipschitz[:-1]) / 2 * s.diff()
    amplification = torch.cat([s.new_zeros(1), steps.cumsum(0)]).exp()

    terminal = torch.stack([point.terminal for point in points]).double().cpu()  # (G + 1, B)
    velocity = torch.stack([point.velocity for point in points]).double().cpu()
    flow_excess = torch.stack([point.flow_excess for point in points]).double().cpu()
    variance = flow.conditional_variance(s).double().cpu()
    loss = (terminal + flow_excess).mean(1) + variance

    terminal_error, velocity_error = terminal.mean(1).sqrt(), velocity.mean(1).sqrt()
    weight = 2 * t * amplification.square()
    constant = -torch.trapezoid(weight * variance, s)
    per_sample_form = torch.trapezoid(weight[:, None] * (terminal + flow_excess), s, dim=0)
    error = (points[0].generated - points[0].exact).square().sum(1).mean().sqrt()
    return Bound(
        s=s,
        terminal_error=terminal_error,
        velocity_error=velocity_error,
        lipschitz=lipschitz,
        amplification=amplification,
        loss=loss,
        conditional_variance=variance,
        generated=points[0].generated,
        exact=points[0].exact,
        error=float(error),
        tight_form=float(torch.trapezoid(amplification * (terminal_error + velocity_error), s)),
        theorem_form=float(torch.trapezoid(weight * loss, s) + constant),
        constant=float(constant),
        standard_error=float(per_sample_form.std()) / math.sqrt(len(x0)),
    )


def _measure(
    flow_map: FlowMap, flow: ExactFlow, x0: Tensor, noise: Tensor, t: float, s: float, one_sided: bool
) -> _Point:
    start, end = x0.new_full((len(x0),), t), x0.new_full((len(x0),), s)
    x_t, x_s = interpolate(x0, noise, start), interpolate(x0, noise, end)
    v = noise - x0
    jump = flow_map.displacement_and_terminal_velocity(x_t, start, end)
    y, z = x_t + jump.displacement, flow.flow_map(x_t, start, end)
    model_at_y, model_at_z, model_at_x = flow_map.velocity(torch.cat([y, z, x_s]), end.repeat(3)).chunk(3)
    return _Point(
        terminal=_squared_norm(jump.terminal_velocity - model_at_y),
        velocity=_squared_norm(model_at_z - flow.velocity(z, end)),
        flow_excess=_squared_norm(model_at_x - v) - _squared_norm(flow.velocity(x_s, end) - v),
        lipschitz=_lipschitz(y - z, model_at_y - model_at_z, _squared_norm(z), one_sided),
        generated=y,
        exact=z,
    )


def _lipschitz(e: Tensor, difference: Tensor, size: Tensor, one_sided: bool) -> float:
    """The largest quotient over the samples, NaN if every e is zero up to rounding.

    Samples with an error below ε^(2/3) times the size of x are omitted: their quotient is rounding.
    """
    squared = _squared_norm(e)
    kept = squared > torch.finfo(e.dtype).eps ** (4 / 3) * (1 + size)
    if not kept.any():
        return math.nan
    if one_sided:
        quotient = -(e * difference).sum(1) / squared
    else:
        quotient = (_squared_norm(difference) / squared).sqrt()
    return float(quotient[kept].max())


def _squared_norm(x: Tensor) -> Tensor:
    return x.square().sum(1)
