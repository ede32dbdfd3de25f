"""Mean and scatter of numbers in parts, without the cancellation of Σ x² − n μ²."""

from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Mean = TypeVar("Mean", Tensor, NDArray[np.float64])


class Merged(NamedTuple, Generic[Mean]):
    """Result of `merge_means`.

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
    """Merge two parts a and b with mean μ and scatter matrix M = Σ (x − μ)(x − μ)ᵀ.

        δ = μ_b − μ_a,  n = n_a + n_b,  μ = μ_a + (n_b / n) δ,  M = M_a + M_b + (n_a n_b / n) δ δᵀ

    (Chan, Golub and LeVeque 1979). Means have any shape; per channel, M is a number and δ δᵀ is δ².
    """
    total = count + other_count
    shift = other_mean - mean
    return Merged(total, mean + shift * (other_count / total), shift, count * other_count / total)
