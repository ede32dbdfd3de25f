"""One- and few-step sampling: x ← x + f_θ(x, t, s, c, w) over a grid of times from 1 (noise) to 0 (data).

Noise belongs to (seed, sample index): sample k starts from the same noise whatever the batch size or the
number of processes.
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
    """x1 ~ N(0, I) for samples `indices` of `seed`: float32 (len(indices), *shape) on the CPU.

    Raises:
        ValueError: if `seed` or an index is negative, or an index is 2⁶⁴ or more.
    """
    return RowDraws(seed, "sample").normal("noise", indices, shape)


def expect_sample_numbers(first: int, count: int) -> None:
    """Refuse samples that have no noise of their own: the last one has number 2⁶⁴ − 1.

    Raises:
        InputError: naming `first`, or `count` where it is more than a Python sequence holds.
    """
    if count > sys.maxsize:
        raise InputError("count", f"must be at most {sys.maxsize}, got {count}")
    if first + count > 2**64:
        raise InputError("first", f"samples are numbered up to 2^64 - 1, got {first} for {count} of them")


def time_grid(steps: int = 1, times: Sequence[float] | None = None) -> tuple[float, ...]:
    """The times of a sampler, from 1 down to 0: `times` if given, else uniform with `steps` steps.

    Raises:
        InputError: if steps < 1, if `times` is not strictly decreasing from 1 to 0, or if they are not the
            times of `steps` steps (where that is not the default).
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
        noise: (B, ...) at time 1; the state keeps its precision.
        times: decreasing from 1 to 0; one network evaluation for each interval (see `time_grid`).
        labels: int64 (B,), the class count for the dropped label; None drops all. Or a `Condition`.
        guidance_weight: w for all samples; None takes the condition's, which is 1 by default.

    Returns:
        (len(times), B, ...).

    Raises:
        InputError: if the times do not decrease from 1 to 0, or labels are not one a sample.
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
    """The states x at time t moved to time s, (B, ...); for condition and weight see `sample_trajectory`."""
    start, end = x.new_full((len(x),), t), x.new_full((len(x),), s)
    condition = as_condition(labels)
    if guidance_weight is not None:
        condition = condition._replace(guidance_weight=x.new_full((len(x),), guidance_weight))
    return x + flow_map.displacement(x, start, end, condition)
