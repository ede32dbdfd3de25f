"""Comparison of a result with float64, and its tolerance.

The rounding error of a result depends on the computation, so the tolerance is measured: the result is
computed again in float64, with inputs and the outputs of all layers of a network multiplied by random factors
in [1 − u, 1 + u], where u is the unit roundoff of the checked precision. The tolerance is a small multiple of
the change.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# With a larger tolerance a derivative without a single correct digit would pass.
LARGEST_TOLERANCE = 0.5
HALF_PRECISION = (torch.bfloat16, torch.float16)


class Setting(NamedTuple):
    """Device and precision of a computation.

    Attributes:
        device: of all tensors.
        dtype: of the tensors of attention. The weights of a network are float64 for float64 and float32
            otherwise; bfloat16 and float16 use autocast, as in training.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of a network's weights and inputs."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def unit_roundoff(self) -> float:
        """u, the largest relative rounding error: half of the machine epsilon."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def allowance(self) -> int:
        """The largest error, as a multiple of the measured change.

        On a CPU errors were at most 1.5 times the change in half precision, where sums are accumulated in
        float32, and 7.5 times in float32 and float64. The order of summation differs between devices, so
        about three times as much is allowed.
        """
        return 4 if self.dtype in HALF_PRECISION else 24

    def autocast(self) -> torch.autocast:
        """The autocast context of a network in this setting."""
        enabled = self.dtype in HALF_PRECISION
        return torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled)


EXACT = Setting(torch.device("cpu"), torch.float64)


class Comparison(NamedTuple):
    """Comparison of a quantity with float64 or, for compilation, with eager execution.

    Attributes:
        subject: "attention", "network" or "compilation".
        name: the case that was computed.
        part: the quantity, or the error message if it could not be computed.
        error: relative error ‖actual − exact‖ / ‖exact‖; NaN if it could not be computed.
        tolerance: the largest accepted error.
        backend: the backend of attention; otherwise empty.
    """

    subject: str
    name: str
    part: str
    error: float
    tolerance: float
    backend: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; False if one of them is NaN."""
        return self.error <= self.tolerance <= LARGEST_TOLERANCE


def perturbed(x: Tensor, relative: float, random: torch.Generator) -> Tensor:
    """x ∘ (1 + `relative` ξ), ξ uniform in [−1, 1]."""
    uniform = torch.rand(x.shape, generator=random, dtype=x.dtype, device=random.device)
    return x * (1 + relative * (2 * uniform - 1))


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖actual − exact‖ / ‖exact‖ of all tensors together; infinite if shapes differ or `exact` is zero."""
    if [x.shape for x in actual] != [x.shape for x in exact]:
        return math.inf
    pairs = zip(actual, exact, strict=True)
    difference = sum(float((x.detach().to(y) - y).square().sum()) for x, y in pairs)
    whole = sum(float(y.square().sum()) for y in exact)
    return math.sqrt(difference / whole) if whole > 0 else math.inf


def tolerance(setting: Setting, perturbed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest accepted error in this setting, where rounding by u changes `exact` to `perturbed`.

    The change is taken to be at least u, since the result itself is rounded.
    """
    return setting.allowance * max(relative_error(perturbed, exact), setting.unit_roundoff)


def failure(subject: str, name: str, error: Exception, backend: str = "") -> Comparison:
    """A comparison that failed with an exception."""
    lines = str(error).strip().splitlines() or [""]
    message = f"{type(error).__name__}: {lines[0]}"
    return Comparison(subject, name, message, math.nan, math.nan, backend)
