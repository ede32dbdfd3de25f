"""Mean and covariance of vectors that are given in parts, in float64.

Shapes: n vectors of d features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tvmatch.data.running_moments import merge_means
from tvmatch.errors import InputError
from tvmatch.evaluation.metrics.frechet import GaussianStatistics

_ROWS = 1024  # vectors that are added to the d × d matrix together, since each addition reads all of it


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, mean and scatter matrix of vectors, float64 on the CPU.

    The scatter matrix Σ (x − μ)(x − μ)ᵀ is `scatter` + `rows`ᵀ `rows`.

    Attributes:
        count: n.
        mean: μ, (d,).
        scatter: (d, d), or (0, d) if there are only rows.
        rows: (r, d) with r ≤ d.
    """

    count: int
    mean: Tensor
    scatter: Tensor
    rows: Tensor


class RunningGaussian:
    """Running mean and covariance of vectors, merged with `merge_means`.

    For more vectors than features the scatter matrix M is stored, otherwise rows R with M = Rᵀ R.

    Args:
        features: d.
    """

    def __init__(self, features: int) -> None:
        self._count = 0
        self._mean = torch.zeros(features, dtype=torch.float64, device="cpu")
        self._scatter = torch.zeros(0, features, dtype=torch.float64, device="cpu")
        self._rows: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def update(self, features: Tensor) -> None:
        """Add the vectors `features`, (n, d) of any float type on any device.

        Raises:
            InputError: for another shape, or if an entry is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise InputError("features", f"must be (n, {len(self._mean)}), got {tuple(features.shape)}")
        broken = int((~features.isfinite()).any(dim=1).sum())
        if broken:
            raise InputError("features", f"{broken} of {len(features)} vectors have a non-finite entry")
        if len(features):
            self._waiting.append(features.detach().to("cpu", torch.float64, copy=True))
        if sum(map(len, self._waiting)) >= _ROWS:
            self._add_waiting()

    def merge(self, other: Moments) -> None:
        """Add the vectors that `other` describes.

        Raises:
            InputError: for another number of features.
        """
        if len(other.mean) != len(self._mean):
            raise InputError("features", f"must be {len(self._mean)} a vector, got {len(other.mean)}")
        if other.count:
            self._add_waiting()
            self._add(other.count, other.mean, other.rows)
            if len(other.scatter):
                self._make_matrix()
                self._scatter += other.scatter

    def moments(self) -> Moments:
        """`Moments` of the vectors so far."""
        self._add_waiting()
        rows = torch.cat([self._mean.new_zeros(0, len(self._mean)), *self._rows])
        return Moments(self._count, self._mean.clone(), self._scatter.clone(), rows)

    def statistics(self) -> GaussianStatistics:
        """Mean and unbiased covariance (divided by n − 1), which is exactly symmetric.

        Raises:
            InputError: for fewer than 2 vectors.
        """
        seen = self.moments()
        if seen.count < 2:
            raise InputError("features", f"a covariance needs at least 2 vectors, there are {seen.count}")
        if not len(seen.scatter):
            return GaussianStatistics(seen.mean, factor=seen.rows.T / (seen.count - 1) ** 0.5)
        return GaussianStatistics(seen.mean, (seen.scatter + seen.scatter.T) / (2 * (seen.count - 1)))

    def _add_waiting(self) -> None:
        if self._waiting:
            vectors = torch.cat(self._waiting)
            self._waiting = []
            mean = vectors.mean(dim=0)
            self._add(len(vectors), mean, vectors - mean)

    def _add(self, count: int, mean: Tensor, centred: Tensor) -> None:
        """Add `count` vectors of this mean; `centredᵀ centred` is their scatter matrix or a part of it."""
        merged = merge_means(self._count, self._mean, count, mean)
        between = merged.shift * merged.weight**0.5
        self._rows.append(torch.cat([centred, between[None]]))  # δ δᵀ in the same matrix product
        if len(self._scatter) or sum(map(len, self._rows)) > len(self._mean):
            self._make_matrix()
        self._count, self._mean = merged.total, merged.mean

    def _make_matrix(self) -> None:
        """Replace the rows by their scatter matrix."""
        if not len(self._scatter):
            self._scatter = self._mean.new_zeros(len(self._mean), len(self._mean))
        for rows in self._rows:
            self._scatter.addmm_(rows.T, rows)
        self._rows = []
