"""The Fréchet distance between Gaussians fitted to two sets of vectors, in float64.

Shapes: n vectors of d features; r is the rank of a covariance.
"""

from functools import cached_property

import torch
from torch import Tensor

from tvmatch.errors import InputError


class GaussianStatistics:
    """Mean and covariance of a set of feature vectors.

    The covariance S is given as a matrix, or as a factor R with S = R Rᵀ. For n < d vectors a factor of shape
    (d, n) is smaller than the matrix, which is then computed on first access only.

    Args:
        mean: float64, (d,).
        covariance: float64, symmetric and positive semi-definite, (d, d).
        factor: R, float64, (d, r).

    Raises:
        ValueError: if neither covariance nor factor is given.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | None = None, factor: Tensor | None = None) -> None:
        if covariance is None and factor is None:
            raise ValueError("a covariance or a factor of it is required")
        self.mean = mean
        self._covariance = covariance
        self._factor = factor

    @cached_property
    def covariance(self) -> Tensor:
        """S, symmetric, (d, d)."""
        if self._covariance is not None:
            return self._covariance
        assert self._factor is not None
        covariance = self._factor @ self._factor.T
        return (covariance + covariance.T) / 2  # rounding may make the product asymmetric

    @property
    def trace(self) -> Tensor:
        """Tr S, computed from the factor if there is one."""
        return self.covariance.trace() if self._factor is None else self._factor.square().sum()

    @cached_property
    def root(self) -> Tensor:
        """A factor R of the covariance, S = R Rᵀ, of shape (d, r).

        Without a given factor, R = Q Λ^½ from the eigendecomposition S = Q Λ Qᵀ. Eigenvalues that are zero up
        to rounding are dropped: the square root of 1e-16 is 1e-8, an error for each constant feature.
        """
        if self._factor is not None:
            return self._factor
        eigenvalues, eigenvectors = _eigh(self.covariance)
        rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
        kept = eigenvalues > rounding.clamp(min=0)
        root: Tensor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
        return root


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix.

    LAPACK's divide and conquer, which PyTorch uses, may fail to converge if most eigenvalues are zero. The
    slower QR iteration then converges.
    """
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        import scipy.linalg  # slow to import, rarely needed

        values, vectors = scipy.linalg.eigh(matrix.numpy(), driver="ev")
        eigenvalues, eigenvectors = torch.from_numpy(values), torch.from_numpy(vectors)
    return eigenvalues, eigenvectors


def fit_gaussian(features: Tensor) -> GaussianStatistics:
    """Mean and unbiased covariance (divided by n − 1) of `features`, (n, d) of any float type.

    The covariance may be singular. For n ≤ d it is represented by its factor, the centred vectors.

    Raises:
        InputError: if `features` is not of shape (n ≥ 2, d ≥ 1) or has a non-finite entry.
    """
    if features.ndim != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise InputError("features", f"must have shape (n ≥ 2, d ≥ 1), got {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    broken = int((~features.isfinite()).any(dim=1).sum())
    if broken:
        raise InputError("features", f"{broken} of {len(features)} vectors have a non-finite entry")
    mean = features.mean(dim=0)
    centred = features - mean
    factor = centred.div_((len(features) - 1) ** 0.5).T
    if factor.shape[1] <= factor.shape[0]:
        return GaussianStatistics(mean, factor=factor)
    return GaussianStatistics(mean, factor @ factor.T)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, the "Fréchet distance" of FID.

    |μ_a − μ_b|² + Tr(S_a + S_b − 2 (S_a^½ S_b S_a^½)^½)

    (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500, Eq. 6), in squared units of the features, at
    least 0. The eigenvalues of S_a^½ S_b S_a^½ are the squared singular values of R_aᵀ R_b for any factors
    S = R Rᵀ, so the last trace is the sum of these singular values, also for singular covariances.

    Raises:
        InputError: if the two have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError("features", f"the two sets have {len(a.mean)} and {len(b.mean)} features a vector")
    between_means = (a.mean - b.mean).square().sum()
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    distance = between_means + a.trace + b.trace - 2 * cross
    # Rounding may give −1e-15 times the traces for equal sets.
    return max(0.0, float(distance))
