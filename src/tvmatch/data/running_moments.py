"""Mean and spread of numbers that come in parts, without the digits that Σ x² − n μ² would lose."""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Mean = TypeVar("Mean", Tensor, NDArray[np.float64])


class Merged(NamedTuple, Generic[Mean]):
    """Two parts together, see `merge_means`.

    Attributes:
        total: n.
        mean: μ.
        shift: δ.
        weight: of δ δᵀ in the scatter matrix.
    """

    total: int
    mean: Mean
    shift: Mean
    weight: float


def merge_means(count: int, mean: Mean, other_count: int, other_mean: Mean) -> Merged[Mean]:
    """What joins two parts a and b of mean μ and scatter matrix M = Σ (x − μ)(x − μ)ᵀ.

        δ = μ_b − μ_a,  n = n_a + n_b,  μ = μ_a + (n_b / n) δ,  M = M_a + M_b + (n_a n_b / n) δ δᵀ

    (Chan, Golub and LeVeque 1979). Means of any shape; in a channel of its own M is a number, and δ δᵀ is δ².
    """
    total = count + other_count
    shift = other_mean - mean
    return Merged(total, mean + shift * (other_count / total), shift, count * other_count / total)
