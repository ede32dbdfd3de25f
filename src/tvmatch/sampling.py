"""One- and few-step sampling: x ← x + f_θ(x, t, s, c, w) over a grid of times from 1 (noise) to 0 (data).

The noise of sample k is a function of the seed and k only.
"""

import itertools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from tvmatch.condition import Condition, as_condition
from tvmatch.errors import InputError, name_of
from tvmatch.flow_map import FlowMap
from tvmatch.seeds import RowDraws


def sample_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise x1 ~ N(0, I) of the samples `indices`: float32 (len(indices), *shape) on the CPU.

    Raises:
        ValueError: if `seed` or an index is negative, or an index is 2⁶⁴ or more.
    """
    return RowDraws(seed, "sample").normal("noise", indices, shape)


def expect_sample_numbers(first: int, count: int) -> None:
    """Check that the sample numbers first … first + count − 1 are below 2⁶⁴.

    Raises:
        InputError: naming `first`, or `count` if it exceeds the length of a Python sequence.
    """
    if count > sys.maxsize:
        raise InputError("count", f"must be at most {sys.maxsize}, got {count}")
    if first + count > 2**64:
        raise InputError("first", f"samples are numbered up to 2^64 - 1, got {first} for {count} of them")


def time_grid(steps: int = 1, times: Sequence[float] | None = None) -> tuple[float, ...]:
    """The times of a sampler, decreasing from 1 to 0: `times` if given, otherwise `steps` uniform steps.

    Raises:
        InputError: if steps < 1, if `times` does not decrease strictly from 1 to 0, or if the number of
            `times` does not match a `steps` other than 1.
    """
    if times is None:
        if steps < 1:
            raise InputError("steps", f"must be at least 1, got {steps}")
        return (*tuple(1 - i / steps for i in range(steps)), 0.0)
    grid = tuple(float(time) for time in times)
    decreasing = all(later < earlier for earlier, later in itertools.pairwise(grid))
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not decreasing:
        raise InputError("times", f"must decrease strictly from 1 to 0, got {list(grid)}")
    if steps not in (1, len(grid) - 1):
        raise InputError(
            "times", f"{len(grid)} times make {len(grid) - 1} steps, but {name_of('steps')} is {steps}"
        )
    return grid


@torch.no_grad()
def sample_trajectory(
    flow_map: FlowMap,
    noise: Tensor,
    times: Sequence[float],
    labels: Tensor | Condition | None = None,
    guidance_weight: float | None = None,
) -> Tensor:
    """All states of a sampler, from the noise to the sample, in the network's units.

    Args:
        flow_map: the model.
        noise: (B, ...) at time 1; the states have its dtype.
        times: decreasing from 1 to 0; one network evaluation per interval (see `time_grid`).
        labels: int64 (B,), the class count for the dropped label; None drops all. Or a `Condition`.
        guidance_weight: w of all samples; None: the weight of the condition, which is 1 by default.

    Returns:
        (len(times), B, ...).

    Raises:
        InputError: if the times do not decrease from 1 to 0, or labels are not of shape (B,).
    """
    states = [noise]
    for t, s in itertools.pairwise(time_grid(times=times)):
        states.append(jump(flow_map, states[-1], t, s, labels, guidance_weight))
    return torch.stack(states)


def jump(
    flow_map: FlowMap,
    x: Tensor,
    t: float,
    s: float,
    labels: Tensor | Condition | None = None,
    guidance_weight: float | None = None,
) -> Tensor:
    """Move the states x (B, ...) from time t to time s; other arguments: see `sample_trajectory`."""
    start, end = x.new_full((len(x),), t), x.new_full((len(x),), s)
    condition = as_condition(labels)
    if guidance_weight is not None:
        condition = condition._replace(guidance_weight=x.new_full((len(x),), guidance_weight))
    return x + flow_map.displacement(x, start, end, condition)
