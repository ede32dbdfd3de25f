"""The exact Wasserstein distance between two finite sets of points."""

import warnings

import numpy as np
import torch
from torch import Tensor

from tvmatch.errors import InputError

_MAX_ITERATIONS = 100_000_000  # 2,000 × 2,000 points need fewer than 5 · 10⁴


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """2-Wasserstein distance between the empirical measures of `a`, (n, d), and `b`, (m, d).

    W₂² = min over π of Σ_ij π_ij |a_i − b_j|², where π sums to 1/n over j and to 1/m over i. Returns W₂, in
    the units of the points, from POT's exact network simplex in float64 (Bonneel et al. 2011), which takes
    0.5 s and 100 MB for 2,000 × 2,000 points.

    Two sets from the same distribution have a distance of about n^(−1/2) in two dimensions. Therefore compare
    with the distance between two sets of real data of the same sizes.

    Raises:
        InputError: if the sets are empty, of different dimensions or have non-finite coordinates.
        RuntimeError: if the solver stops before the optimum.
    """
    import ot  # slow to import

    points_a, points_b = _as_points("a", a), _as_points("b", b)
    if points_a.shape[1] != points_b.shape[1]:
        raise InputError(
            "points a", f"have {points_a.shape[1]} coordinates, points b have {points_b.shape[1]}"
        )
    # |a|² + |b|² − 2 a·b would lose the digits of small distances.
    cost = np.zeros((len(points_a), len(points_b)))
    for axis in range(points_a.shape[1]):
        cost += np.subtract.outer(points_a[:, axis], points_b[:, axis]) ** 2
    weights_a = np.full(len(points_a), 1 / len(points_a))
    weights_b = np.full(len(points_b), 1 / len(points_b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised as an error below
        squared, log = ot.emd2(weights_a, weights_b, cost, numItermax=_MAX_ITERATIONS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the transport problem was not solved: {log['warning']}")
    return float(np.sqrt(max(0.0, squared)))


def _as_points(name: str, points: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    if points.ndim != 2 or 0 in points.shape:
        raise InputError(f"points {name}", f"must have shape (n ≥ 1, d ≥ 1), got {tuple(points.shape)}")
    if not points.isfinite().all():
        raise InputError(f"points {name}", "has a non-finite coordinate")
    return np.asarray(points.detach().to("cpu", torch.float64).numpy())
