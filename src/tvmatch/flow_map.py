"""Displacement, velocity and terminal velocity of a network F_θ (TVM, arXiv 2511.19797).

The network can be any callable `network(x, t, s, labels, guidance_weight)` that returns F, or a Dual of F and
∂_s F if s is a Dual.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tvmatch.condition import Condition, as_condition, expect_per_sample
from tvmatch.dual import Dual
from tvmatch.errors import InputError


class Network(Protocol):
    """The interface of a network; see `tvmatch.models.DiT.forward`.

    `labels=None` drops the labels of all samples; the objective computes the unconditional velocity this way.
    `guidance_weight=None` means 1 for all samples.

    A network that is conditioned on embeddings has two more arguments, `embeddings=None` and `mask=None` (see
    `tvmatch.condition.Condition`). A call without embeddings is unconditional.
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
    """Displacement f and terminal velocity d/ds f, both of x's shape."""

    displacement: Tensor
    terminal_velocity: Tensor


def per_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to broadcast against `like` (B, ...); float64 only if `like` is.

    Raises:
        InputError: if `numbers` is not of shape (B,).
    """
    expect_per_sample(like, numbers=numbers)
    if numbers.dtype == torch.float64:  # NumPy's default; the product would be float64, too
        numbers = numbers.to(torch.promote_types(like.dtype, torch.float32))
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t) x0 + t x1, the path from data (t = 0) to noise (t = 1), for t of shape (B,).

    Raises:
        InputError: if the noise differs from the data in shape, dtype or device, or t is not of shape (B,).
    """
    expect_same_kind(x0, noise=noise)
    expect_per_sample(x0, t=t)
    return torch.lerp(x0, noise, per_sample(t, x0).to(x0.dtype))


def expect_same_kind(x0: Tensor, **arguments: Tensor) -> None:
    """Raise an InputError for tensors that differ from the data in shape, dtype or device."""
    for name, x in {"x0": x0, **arguments}.items():
        if not isinstance(x, Tensor):
            raise InputError(name, f"a tensor is needed, got a {type(x).__name__}")
    if x0.ndim < 2 or not x0.is_floating_point():
        raise InputError(
            "x0", f"a floating-point tensor (B, ...) is needed, got {x0.dtype} of shape {tuple(x0.shape)}"
        )
    for name, x in arguments.items():
        for kind in ("shape", "dtype", "device"):
            given, needed = getattr(x, kind), getattr(x0, kind)
            if given != needed:
                given, needed = (tuple(y) if kind == "shape" else y for y in (given, needed))
                raise InputError(name, f"the {kind} {needed} of x0 is needed, got {given}")


@dataclass(frozen=True)
class FlowMap:
    """f_θ(x, t, s) = k(w) (s − t) F_θ(x, t, s) and its derivatives.

    All methods raise an `InputError` if times, labels or weights are not of shape (B,) on x's device, or if
    the network returns another shape than x's or changes its arguments in place.

    Attributes:
        network: F_θ.
        scaled: the scaled parameterisation, k(w) = w; otherwise k = 1.
    """

    network: Network
    scaled: bool = False

    def _output(self, x: Tensor, t: Tensor, s: Tensor | Dual, condition: Condition) -> Dual:
        """F, with ∂_s F if s carries a tangent."""
        end = s.value if isinstance(s, Dual) else s
        expect_per_sample(x, s=end, t=t)
        condition.check(x)
        given = {"x": x, "t": t, "s": end, **condition._asdict()}
        before = _versions(given)
        labels, guidance_weight = condition.labels, condition.guidance_weight
        output = self.network(x, t, s, labels, guidance_weight, **condition.embedding_arguments())
        for name, version in _versions(given).items():
            if version != before.get(name, version):
                raise InputError(
                    "network",
                    f"{_name(self.network)} changes its argument {name} in place; "
                    f"write {name} = {name} * … instead of {name} *= …",
                )
        value, tangent = output if isinstance(output, Dual) else Dual(output)
        if isinstance(s, Dual) != isinstance(output, Dual):
            wanted = "Dual(F, ∂_s F) for an s" if isinstance(s, Dual) else "tensor for an s without a tangent"
            raise InputError(
                "network",
                f"{_name(self.network)} must return a {wanted}, got a {type(output).__name__}; "
                "tvmatch.models.JVPNetwork gives any module this interface",
            )
        for part in (value,) if tangent is None else (value, tangent):
            if not isinstance(part, Tensor) or not part.is_floating_point():
                kind = part.dtype if isinstance(part, Tensor) else f"a {type(part).__name__}"
                raise InputError(
                    "network", f"{_name(self.network)} must return one floating-point tensor, got {kind}"
                )
            if part.shape != x.shape:
                raise InputError(
                    "network",
                    f"{_name(self.network)} must return the shape {tuple(x.shape)} of x, "
                    f"got {tuple(part.shape)}",
                )
        return Dual(value, tangent)

    def _scale(self, output: Tensor, condition: Condition) -> Tensor:
        """k(w) F."""
        if not self.scaled or condition.guidance_weight is None:
            return output
        return per_sample(condition.guidance_weight, output) * output

    def displacement(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | Condition | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        """f_θ(x, t, s, c, w) = k(w) (s − t) F_θ, the jump from time t to s: x_s ≈ x_t + f_θ.

        Args:
            x: (B, ...) at time t.
            t: (B,) starting times.
            s: (B,) terminal times, s ≤ t.
            labels: int64 (B,), the class count for the dropped label; None drops all. Or a `Condition`.
            guidance_weight: (B,) w; None means 1. Must be None if `labels` is a `Condition`.
        """
        condition = as_condition(labels, guidance_weight)
        output = self._output(x, t, s, condition).value
        return per_sample(s - t, x) * self._scale(output, condition)

    def velocity(
        self,
        x: Tensor,
        s: Tensor,
        labels: Tensor | Condition | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        """u_θ(x, s, c, w) = k(w) F_θ(x, s, s); the arguments are those of `displacement`."""
        condition = as_condition(labels, guidance_weight)
        return self._scale(self._output(x, s, s, condition).value, condition)

    def displacement_and_terminal_velocity(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | Condition | None = None,
        guidance_weight: Tensor | None = None,
        *,
        detach_jvp: bool = False,
    ) -> TerminalVelocity:
        """f_θ and d/ds f_θ = k(w) [F_θ + (s − t) ∂_s F_θ], from one pass with a tangent in s.

        Args:
            detach_jvp: no gradient through ∂_s F_θ (faster, biased). Other arguments: see `displacement`.
        """
        condition = as_condition(labels, guidance_weight)
        # With detach_jvp this pass records no graph; the value comes from a second pass without a tangent.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_jvp):
            value, tangent = self._output(x, t, Dual(s, torch.ones_like(s)), condition)
        if tangent is None:  # exactly zero
            tangent = torch.zeros_like(value)
        if detach_jvp:
            value = self._output(x, t, s, condition).value
        duration = per_sample(s - t, x)
        return TerminalVelocity(
            displacement=duration * self._scale(value, condition),
            terminal_velocity=self._scale(value + duration * tangent, condition),
        )


def _versions(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    """PyTorch's version counters, which in-place changes increment; empty under `torch.compile`."""
    if torch.compiler.is_compiling():
        return {}
    return {name: x._version for name, x in tensors.items() if x is not None and not x.is_inference()}


def _name(network: Network) -> str:
    return getattr(network, "__name__", type(network).__name__)
