"""Distributions in the plane: `checkerboard`, `moons`, `gaussians`."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tvmatch.data.base import Batch
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws, in_whole_blocks

DensityName = Literal["checkerboard", "moons", "gaussians"]

MOON_SCALE = 4 / 3  # maps the two unit half circles, together three radii wide, to [−2, 2]
MOON_NOISE = 0.1
RING_RADIUS = 1.5
RING_STD = 0.1
RING_MODES = 8


def _checkerboard(draws: RowDraws, rows: range) -> Tensor:
    """Uniform on the eight unit squares of [−2, 2)² with an even sum of column and row number."""
    x, y, upper = draws.uniform("checkerboard", rows, (3,)).unbind(1)
    grid = 2.0**22  # multiples of 1 / grid are exact in float32, so none is rounded into the next square
    x, y = (4 * grid * x).floor() / grid - 2, (grid * y).floor() / grid
    row = 2 * (2 * upper).floor() - 2  # the lower or the upper square of the column
    return torch.stack([x, y + row + x.floor() % 2], dim=1)


def _moons(draws: RowDraws, rows: range) -> Tensor:
    """Two interleaving half circles, one centred in the other's opening, with Gaussian noise.

    The outer is (cos a, sin a) and the inner (1 − cos a, 1/2 − sin a) with a uniform on [0, π]. Their centre
    of symmetry (1/2, 1/4) is shifted to the origin.
    """
    angle, side = draws.uniform("moons", rows, (2,)).unbind(1)
    angle = math.pi * angle
    turned = 1 - 2 * (2 * side).floor()  # the inner is the outer turned by π
    arc = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1) * turned[:, None]
    return MOON_SCALE * arc + MOON_NOISE * _noise(draws, "moons: noise", rows)


def _gaussians(draws: RowDraws, rows: range) -> Tensor:
    """Eight equally likely round Gaussians, their centres equally spaced on a circle about the origin."""
    mode = (RING_MODES * draws.uniform("gaussians", rows)).floor()
    angle = mode * (2 * math.pi / RING_MODES)
    centre = RING_RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + RING_STD * _noise(draws, "gaussians: noise", rows)


def _noise(draws: RowDraws, purpose: str, rows: range) -> Tensor:
    return draws.normal(purpose, rows, (2,), torch.float64)


class _Density(NamedTuple):
    draw: Callable[[RowDraws, range], Tensor]  # float64
    variance: tuple[float, float]  # exact, of either coordinate; every mean is 0 by symmetry


_DENSITIES: dict[str, _Density] = {
    # Either coordinate alone is uniform on [−2, 2]: variance 4²/12.
    "checkerboard": _Density(_checkerboard, (4 / 3, 4 / 3)),
    # E (cos a − 1/2)² = 3/4 and E (sin a − 1/4)² = 1/2 − (1/2)(2/π) + 1/16.
    "moons": _Density(
        _moons,
        (MOON_SCALE**2 * 3 / 4 + MOON_NOISE**2, MOON_SCALE**2 * (9 / 16 - 1 / math.pi) + MOON_NOISE**2),
    ),
    # Half of the squared radius falls on each axis.
    "gaussians": _Density(_gaussians, (RING_RADIUS**2 / 2 + RING_STD**2,) * 2),
}


class Density:
    """A two-dimensional distribution without classes; every batch is a new draw.

    The points have mean 0 and coordinates of order one; `spec.std` is the exact standard deviation, so the
    network sees unit variance.

    Args:
        name: "checkerboard" (eight unit squares of [−2, 2]²), "moons" (two noisy half circles within about
            [−2, 2] × [−1, 1]) or "gaussians" (a ring of eight, radius 1.5, standard deviation 0.1).

    Raises:
        InputError: the name is unknown.
    """

    def __init__(self, name: DensityName) -> None:
        if name not in _DENSITIES:
            raise InputError("name", f"no density is called {name!r}; there are {', '.join(_DENSITIES)}")
        self._draw, variance = _DENSITIES[name]
        std = tuple(math.sqrt(number) for number in variance)
        self.spec = DataSpec(kind="points", shape=(2,), class_names=None, mean=(0.0, 0.0), std=std)

    def draw(self, draws: RowDraws, rows: range) -> Tensor:
        """Independent points, float32 of shape (len(rows), 2); each depends on its row alone.

        Raises:
            InputError: `rows` is empty.
        """
        if not rows:
            raise InputError("count", f"must be at least 1, got {len(rows)}")
        return in_whole_blocks(lambda block: self._draw(draws, block).to(torch.float32), rows)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """`size` points, each drawn for (seed, step, row)."""
        return Batch(self.draw(RowDraws(seed, "step", step), range(size)), None)

    def take(self, count: int, seed: int) -> Batch:
        """`count` points drawn for `seed`, independent of all training batches."""
        return Batch(self.draw(RowDraws(seed, "take"), range(count)), None)
