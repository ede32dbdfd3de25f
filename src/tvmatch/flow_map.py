"""What a network F_θ says about the flow: displacement, velocity, terminal velocity (TVM, arXiv 2511.19797).

Independent of which network is inside: anything that is called as `network(x, t, s, labels, guidance_weight)`
and returns F, or a Dual of F and ∂_s F when s is a Dual.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tvmatch.dual import Dual


class Network(Protocol):
    """The interface of every network; see `tvmatch.models.DiT.forward`.

    `labels=None` means that the label is dropped for every sample, and a class-conditional network must take
    it: the objective asks for the unconditional velocity that way. `guidance_weight=None` means 1 for all.
    """

    def __call__(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual: ...


class TerminalVelocity(NamedTuple):
    """A jump and the velocity at its end, both of x's shape."""

    displacement: Tensor
    terminal_velocity: Tensor


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to multiply a tensor of shape (B, ...)."""
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t) x0 + t x1: the path from data (t = 0) to noise (t = 1), t of shape (B,)."""
    return torch.lerp(x0, noise, per_sample(t, x0).to(x0.dtype))


@dataclass(frozen=True)
class FlowMap:
    """f_θ(x, t, s) = k(w) (s − t) F_θ(x, t, s) and its derivatives.

    Attributes:
        network: F_θ.
        scaled: the scaled parameterisation, k(w) = w; otherwise k = 1.
    """

    network: Network
    scaled: bool = False

    def _scale(self, output: Tensor, guidance_weight: Tensor | None) -> Tensor:
        """k(w) F."""
        if not self.scaled or guidance_weight is None:
            return output
        return per_sample(guidance_weight, output) * output

    def displacement(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        """f_θ(x, t, s, c, w) = k(w) (s − t) F_θ: the jump from time t to s, so that x_s ≈ x_t + f_θ.

        Args:
            x: (B, ...) at time t.
            t: (B,) starting times.
            s: (B,) terminal times, s ≤ t.
            labels: int64 (B,), the class count for the dropped label; None drops all.
            guidance_weight: (B,) w; None means 1.
        """
        output = self.network(x, t, s, labels, guidance_weight)
        assert isinstance(output, Tensor)
        return per_sample(s - t, x) * self._scale(output, guidance_weight)

    def velocity(
        self,
        x: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        """u_θ(x, s, c, w) = k(w) F_θ(x, s, s): the diagonal; arguments as for `displacement`."""
        output = self.network(x, s, s, labels, guidance_weight)
        assert isinstance(output, Tensor)
        return self._scale(output, guidance_weight)

    def displacement_and_terminal_velocity(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
        *,
        detach_jvp: bool = False,
    ) -> TerminalVelocity:
        """f_θ and d/ds f_θ = k(w) [F_θ + (s − t) ∂_s F_θ] from one pass that carries the tangent in s.

        Args:
            detach_jvp: take ∂_s F_θ as a constant in reverse mode (faster, biased). Others: `displacement`.
        """
        # Detached, the pass with the tangent leaves no graph, and the value has a plain one of half the size.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_jvp):
            output = self.network(x, t, Dual(s, torch.ones_like(s)), labels, guidance_weight)
        assert isinstance(output, Dual)
        value, tangent = output
        assert tangent is not None
        if detach_jvp:
            plain = self.network(x, t, s, labels, guidance_weight)
            assert isinstance(plain, Tensor)
            value = plain
        duration = per_sample(s - t, x)
        return TerminalVelocity(
            displacement=duration * self._scale(value, guidance_weight),
            terminal_velocity=self._scale(value + duration * tangent, guidance_weight),
        )
