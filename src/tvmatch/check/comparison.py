"""One comparison with float64, and how much it may be off.

No computation is exact in a precision of unit roundoff u, and how much an error grows on its way depends on
the computation. So the yardstick is measured: the same answer is computed in float64 once more, from numbers
that are off by u, each by a random factor in [1 − u, 1 + u]: the inputs, and what every layer of a network
returns. What that changes is what rounding each of them once costs, and a sound computation stays within a
small multiple of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A tolerance above this would pass a derivative that has not one right digit.
LARGEST_TOLERANCE = 0.5
HALF_PRECISION = (torch.bfloat16, torch.float16)


class Setting(NamedTuple):
    """Where and how a computation runs.

    Attributes:
        device: of all tensors.
        dtype: of attention's tensors. A network's weights are float64 for float64 and float32 otherwise;
            bfloat16 and float16 are autocast, as in training.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of a network's weights and inputs."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def unit_roundoff(self) -> float:
        """u, the largest relative error of rounding one number: half of the machine epsilon."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def allowance(self) -> int:
        """How many times the measured change an error may be.

        In half precision sums are carried in float32, so the error is that of rounding what goes in and comes
        out: at most 1.5 times the change in what was measured on a CPU (attention of 16 to 300 keys, networks
        of 1 to 12 blocks with random and with trained weights). In float32 and float64 every one of the many
        additions rounds: at most 7.5 times. Devices add in orders of their own, so all get about three times
        as much.
        """
        return 4 if self.dtype in HALF_PRECISION else 24

    def autocast(self) -> torch.autocast:
        """The precision of a network in this setting."""
        enabled = self.dtype in HALF_PRECISION
        return torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled)


EXACT = Setting(torch.device("cpu"), torch.float64)


class Comparison(NamedTuple):
    """A quantity beside the same in float64.

    Attributes:
        subject: "attention" or "network".
        name: what was computed of it.
        part: the quantity, or what went wrong if there is none.
        backend: what computed it, where there is a choice.
        error: relative, ‖actual − exact‖ / ‖exact‖; NaN if there is no answer.
        tolerance: the largest that is right.
    """

    subject: str
    name: str
    part: str
    error: float
    tolerance: float
    backend: str = ""

    @property
    def passed(self) -> bool:
        """Within the tolerance; never with a NaN on either side."""
        return self.error <= self.tolerance <= LARGEST_TOLERANCE


def perturbed(x: Tensor, relative: float, random: torch.Generator) -> Tensor:
    """x ∘ (1 + `relative` ξ), ξ uniform in [−1, 1]."""
    uniform = torch.rand(x.shape, generator=random, dtype=x.dtype, device=random.device)
    return x * (1 + relative * (2 * uniform - 1))


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖actual − exact‖ / ‖exact‖ of all tensors together; infinite for another shape or an exact zero."""
    if [x.shape for x in actual] != [x.shape for x in exact]:
        return math.inf
    pairs = zip(actual, exact, strict=True)
    difference = sum(float((x.detach().to(y) - y).square().sum()) for x, y in pairs)
    whole = sum(float(y.square().sum()) for y in exact)
    return math.sqrt(difference / whole) if whole > 0 else math.inf


def tolerance(setting: Setting, perturbed: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """What an error may be in this setting, where roundings by u turn `exact` into `perturbed`.

    The answer itself is rounded too, so u is the least change.
    """
    return setting.allowance * max(relative_error(perturbed, exact), setting.unit_roundoff)


def failure(subject: str, name: str, error: Exception, backend: str = "") -> Comparison:
    """A comparison that raised instead of answering."""
    lines = str(error).strip().splitlines() or [""]
    said = f"{type(error).__name__}: {lines[0]}"
    return Comparison(subject, name, said, math.nan, math.nan, backend)
