"""The Fréchet distance between two sets of vectors, each seen as one Gaussian, in float64.

Shapes: n vectors of d features; r is the rank of a covariance.
"""

from functools import cached_property

import torch
from torch import Tensor

from tvmatch.errors import InputError


class GaussianStatistics:
    """Mean and covariance of a set of feature vectors.

    The covariance is given as a matrix, or as a factor R with S = R Rᵀ, or as both. Of n < d vectors the
    factor (d, n) is far smaller than the matrix, which then is computed only if somebody asks for it: that of
    128 × 128 colour images has 49,152² entries, 19 GB.

    Args:
        mean: float64, (d,).
        covariance: float64, symmetric and positive semi-definite, (d, d).
        factor: R, float64 of shape (d, r); it saves `root` its work.

    Raises:
        ValueError: if neither covariance nor factor is given.
    """

    def __init__(self, mean: Tensor, covariance: Tensor | None = None, factor: Tensor | None = None) -> None:
        if covariance is None and factor is None:
            raise ValueError("a Gaussian needs a covariance or a factor of it")
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
        return (covariance + covariance.T) / 2  # a matrix product need not be symmetric to the last bit

    @property
    def trace(self) -> Tensor:
        """Tr S, without the matrix where a factor is known."""
        return self.covariance.trace() if self._factor is None else self._factor.square().sum()

    @cached_property
    def root(self) -> Tensor:
        """A factor R of the covariance, S = R Rᵀ, of shape (d, r).

        Unless it is known, R = Q Λ^½ from the eigendecomposition S = Q Λ Qᵀ. Eigenvalues that rounding
        cannot tell from zero are dropped: the square root of such a "zero" (1e-16) would be a far
        larger 1e-8, once for every constant pixel. This costs about 10 d³ operations, once.
        """
        if self._factor is not None:
            return self._factor
        eigenvalues, eigenvectors = _eigh(self.covariance)
        rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
        kept = eigenvalues > rounding.clamp(min=0)
        root: Tensor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()
        return root


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, which always converges.

    LAPACK's divide and conquer, PyTorch's way, at times gives up on the covariance of far fewer vectors than
    features, nearly all of whose eigenvalues are zero; its slower QR iteration does not.
    """
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        import scipy.linalg  # slow to import, and seldom needed

        values, vectors = scipy.linalg.eigh(matrix.numpy(), driver="ev")
        eigenvalues, eigenvectors = torch.from_numpy(values), torch.from_numpy(vectors)
    return eigenvalues, eigenvectors


def fit_gaussian(features: Tensor) -> GaussianStatistics:
    """Mean and unbiased covariance (divided by n − 1) of `features`, (n, d) of any float type.

    Constant features and fewer vectors than features are fine: the covariance is singular then. (With no more
    vectors than features, the centred vectors themselves are its factor, and there is no d × d matrix.)

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
    """Squared 2-Wasserstein distance of two Gaussians, the "Fréchet distance" of FID (not square-rooted).

    |μ_a − μ_b|² + Tr(S_a + S_b − 2 (S_a^½ S_b S_a^½)^½)

    (Dowson and Landau 1982; Heusel et al., arXiv 1706.08500, Eq. 6). The eigenvalues of
    S_a^½ S_b S_a^½ are the squared singular values of R_aᵀ R_b for any factors S = R Rᵀ, so the last
    trace is the sum of these singular values. This takes no square root of a rounded eigenvalue and
    is stable for singular covariances. Where factors are known, nothing of size d × d is made. In the units
    of the features, squared; never negative.

    Raises:
        InputError: if the two have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError("features", f"the two sets have {len(a.mean)} and {len(b.mean)} features a vector")
    between_means = (a.mean - b.mean).square().sum()
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    distance = between_means + a.trace + b.trace - 2 * cross
    # Equal sets may give −1e-15 times the traces by rounding.
    return max(0.0, float(distance))
