"""What a network F_θ says about the flow: displacement, velocity, terminal velocity (TVM, arXiv 2511.19797).

Independent of which network is inside: anything that is called as `network(x, t, s, labels, guidance_weight)`
and returns F, or a Dual of F and ∂_s F when s is a Dual.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tvmatch.dual import Dual
from tvmatch.errors import InputError


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
    """(B,) shaped to multiply a tensor of shape (B, ...); float64 only where the tensor is.

    Raises:
        InputError: for another shape, which would multiply something else by broadcasting.
    """
    expect_per_sample(like, numbers=numbers)
    if numbers.dtype == torch.float64:  # as NumPy makes times; the product would be in float64, too
        numbers = numbers.to(torch.promote_types(like.dtype, torch.float32))
    return numbers.reshape(-1, *[1] * (like.ndim - 1))


def expect_per_sample(x: Tensor, **arguments: Tensor | None) -> None:
    """Refuse what is not a number for each sample of x (B, ...), on its device. Values are not looked at.

    Args:
        x: a batch.
        arguments: by name; None passes. `labels` are int64 or int32, all others floating-point.

    Raises:
        InputError: naming the argument.
    """
    for name, numbers in arguments.items():
        if numbers is None:
            continue
        if not isinstance(numbers, Tensor):
            raise InputError(name, f"a tensor is needed, got a {type(numbers).__name__}")
        if numbers.shape != x.shape[:1]:
            raise InputError(
                name,
                f"the shape ({x.shape[0] if x.ndim else 'B'},) is needed, a number for each sample, "
                f"got {tuple(numbers.shape)}",
            )
        labels = name == "labels"
        if not (numbers.dtype in (torch.int64, torch.int32) if labels else numbers.is_floating_point()):
            kind = "the dtype int64" if labels else "a floating-point dtype"
            raise InputError(name, f"{kind} is needed, got {numbers.dtype}")
        if numbers.device != x.device:
            raise InputError(name, f"the device {x.device} of the data is needed, got {numbers.device}")


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t) x0 + t x1: the path from data (t = 0) to noise (t = 1), t of shape (B,).

    Raises:
        InputError: if the noise differs from the data in shape, dtype or device, or t is not of shape (B,).
    """
    expect_same_kind(x0, noise=noise)
    expect_per_sample(x0, t=t)
    return torch.lerp(x0, noise, per_sample(t, x0).to(x0.dtype))


def expect_same_kind(x0: Tensor, **arguments: Tensor) -> None:
    """Refuse tensors that differ from the data in shape, dtype or device, by an InputError."""
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

    Every method raises an `InputError` for times, labels or weights that are not one a sample on x's device,
    for a network that returns another shape than x's, and for one that changes its arguments in place.

    Attributes:
        network: F_θ.
        scaled: the scaled parameterisation, k(w) = w; otherwise k = 1.
    """

    network: Network
    scaled: bool = False

    def _output(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor | Dual,
        labels: Tensor | None,
        guidance_weight: Tensor | None,
    ) -> Dual:
        """F, with ∂_s F if s carries a tangent."""
        end = s.value if isinstance(s, Dual) else s
        expect_per_sample(x, s=end, t=t, labels=labels, guidance_weight=guidance_weight)
        given = {"x": x, "t": t, "s": end, "labels": labels, "guidance_weight": guidance_weight}
        before = _versions(given)
        output = self.network(x, t, s, labels, guidance_weight)
        for name, version in _versions(given).items():
            if version != before.get(name, version):
                raise InputError(
                    "network",
                    f"{_name(self.network)} changes its argument {name} in place, which is the "
                    f"caller's: write {name} = {name} * …, not {name} *= …",
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
        output = self._output(x, t, s, labels, guidance_weight).value
        return per_sample(s - t, x) * self._scale(output, guidance_weight)

    def velocity(
        self,
        x: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        """u_θ(x, s, c, w) = k(w) F_θ(x, s, s): the diagonal; arguments as for `displacement`."""
        return self._scale(self._output(x, s, s, labels, guidance_weight).value, guidance_weight)

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
            value, tangent = self._output(x, t, Dual(s, torch.ones_like(s)), labels, guidance_weight)
        if tangent is None:  # exactly zero
            tangent = torch.zeros_like(value)
        if detach_jvp:
            value = self._output(x, t, s, labels, guidance_weight).value
        duration = per_sample(s - t, x)
        return TerminalVelocity(
            displacement=duration * self._scale(value, guidance_weight),
            terminal_velocity=self._scale(value + duration * tangent, guidance_weight),
        )


def _versions(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    """How often each has been changed in place; nothing where it is not counted."""
    if torch.compiler.is_compiling():
        return {}
    return {name: x._version for name, x in tensors.items() if x is not None and not x.is_inference()}


def _name(network: Network) -> str:
    return getattr(network, "__name__", type(network).__name__)
