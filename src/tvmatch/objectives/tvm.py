"""Terminal Velocity Matching: the objective on one screen (arXiv 2511.19797, Eqs. 12–15 and Algorithm 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tvmatch.flow_map import (
    FlowMap,
    Network,
    expect_per_sample,
    expect_same_kind,
    interpolate,
    per_sample,
)


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
    labels: Tensor | None,
    guidance_weight: Tensor | None,
    *,
    scaled: bool,
    detach_jvp: bool = False,
) -> TVMLoss:
    """loss = batch mean of (T + V) / w², with v = x1 − x0, ‖·‖² the mean over pixels, sg no gradient:

        T = ‖ d/ds f_θ(x_t, t, s, c, w) − sg[u_θ*(x_t + f_θ(x_t, t, s, c, w), s, c, w)] ‖²     (0 where t = s)
        V = ‖ u_θ(x_s', s', c, w) − sg[w v + (1 − w) u_θ*(x_s', s', ∅, 1)] ‖²

    Args:
        network: F_θ, with gradients.
        target: F_θ*, usually an exponential moving average of the network; never receives gradients.
        x0: data (B, ...) in the network's units.
        noise: x1 ~ N(0, I) of the same shape; it serves both terms.
        t: (B,) starting times in [0, 1].
        s: (B,) terminal times, s ≤ t.
        s_prime: (B,) times of the flow term.
        labels: int64 (B,), the class count for a dropped label; None drops all. With weights given, the
            target is also called with `labels=None`, for its unconditional velocity.
        guidance_weight: (B,) w ≥ 1, which must be 1 where the label is dropped; None means 1 and saves the
            unconditional evaluation.
        scaled: the scaled parameterisation, k(w) = w.
        detach_jvp: no gradient through ∂_s F_θ (faster, biased).

    Returns:
        The loss and its terms; a value that is not finite stays so.

    Raises:
        InputError: for an argument, or an output of a network, of another shape, kind or device. Values,
            such as s ≤ t, are not looked at, which would wait for a GPU: `times.sample_times` keeps them.
    """
    expect_same_kind(x0, noise=noise)
    expect_per_sample(x0, t=t, s=s, s_prime=s_prime, labels=labels, guidance_weight=guidance_weight)
    online, frozen = FlowMap(network, scaled), FlowMap(target, scaled)

    x_t = interpolate(x0, noise, t)
    displacement, terminal_velocity = online.displacement_and_terminal_velocity(
        x_t, t, s, labels, guidance_weight, detach_jvp=detach_jvp
    )
    x_s_prime = interpolate(x0, noise, s_prime)
    velocity = online.velocity(x_s_prime, s_prime, labels, guidance_weight)

    with torch.no_grad():
        end_velocity = frozen.velocity(x_t + displacement, s, labels, guidance_weight)
        guided_velocity = noise - x0
        if guidance_weight is not None:
            w = per_sample(guidance_weight, x0)
            guided_velocity = w * guided_velocity + (1 - w) * frozen.velocity(
                x_s_prime, s_prime, None, torch.ones_like(guidance_weight)
            )

    terminal = torch.where(t > s, _mean_square(terminal_velocity - end_velocity), 0.0)
    flow = _mean_square(velocity - guided_velocity)
    if guidance_weight is not None:
        terminal, flow = terminal / guidance_weight**2, flow / guidance_weight**2
    return TVMLoss((terminal + flow).mean(), terminal, flow)


def _mean_square(x: Tensor) -> Tensor:
    """(B, ...) to (B,)."""
    return x.square().flatten(1).mean(1)
