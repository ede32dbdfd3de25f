"""Samples for an evaluation, with the time to draw them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from torch import Tensor

from tvmatch.errors import InputError


class Sampler(Protocol):
    """The interface of `TrainedModel.sample` that evaluations use: n samples in data units, on the CPU."""

    def __call__(
        self, labels: Sequence[int] | None = None, *, count: int | None = None, steps: int = 1, seed: int = 0
    ) -> Tensor: ...


Progress = Callable[[int, int], None]
"""Called with (parts done, all parts) after each part of an evaluation."""


@dataclass(frozen=True)
class Generated:
    """Samples in data units, (n, *shape), and the seconds it took to draw them."""

    values: Tensor
    seconds: float


def generate(sample: Sampler, like: Tensor, labels: Tensor | None, *, steps: int, seed: int) -> Generated:
    """Draw as many samples as `like` has elements, with these labels (None: without labels).

    Raises:
        InputError: if the samples do not have the shape of `like`.
    """
    start = perf_counter()
    if labels is None:
        values = sample(count=len(like), steps=steps, seed=seed)
    else:
        values = sample(labels.tolist(), steps=steps, seed=seed)
    seconds = perf_counter() - start
    if values.shape != like.shape:
        raise InputError(
            "sample", f"must return shape {tuple(like.shape)} like the data, got {tuple(values.shape)}"
        )
    return Generated(values, seconds)


def check_steps(steps: Sequence[int]) -> None:
    """Raise InputError unless `steps` is a non-empty sequence of positive numbers of steps."""
    if not steps or min(steps) < 1:
        raise InputError("steps", f"must be one or more numbers ≥ 1, got {list(steps)}")
