"""The flow of a Gaussian in closed form, to compare trained networks with.

Path x_t = (1−t) x0 + t x1 with x0 ~ N(m, Σ) and x1 ~ N(0, I); conditional velocity v = x1 − x0.
Then x_t ~ N((1−t) m, C_t) with C_t = (1−t)² Σ + t² I. All matrices share the eigenvectors of Σ;
for an eigenvalue λ, the standard deviation of x_t along its eigenvector is

    ρ_t = √((1−t)² λ + t²).

Shapes: B batch, D dimension. Computation is in float64; a function of x returns x's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tvmatch.errors import InputError


class GaussianMoments(NamedTuple):
    """Mean (D,) or (B, D) and covariance (D, D) or (B, D, D), float64."""

    mean: Tensor
    covariance: Tensor


class GaussianFlow:
    """Exact velocity and flow map from noise N(0, I) at t = 1 to data N(mean, covariance) at t = 0.

    Times are floats or tensors of shape (B,), in [0, 1]. The covariance may be singular; at t = 0 x must then
    be in the support of the data, and neither the score nor a flow from t = 0 exist. Eigenvalues below
    rounding error are set to zero.

    Args:
        mean: shape (D,).
        covariance: symmetric and positive semi-definite, shape (D, D).

    Raises:
        InputError: if the shapes do not match, or the covariance is not finite, symmetric and
            positive semi-definite up to rounding.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise InputError(
                "mean and covariance must have shapes (D,) and (D, D), "
                f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        matrix = covariance.double()
        if not (torch.isfinite(mean).all() and torch.isfinite(matrix).all()):
            raise InputError("mean and covariance must be finite")
        # The effect of rounding in the given dtype on eigenvalues and symmetry.
        tolerance = 4 * len(mean) * torch.finfo(covariance.dtype).eps * float(matrix.abs().max())
        eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        if float((matrix - matrix.T).abs().max()) > tolerance or float(eigenvalues.min()) < -tolerance:
            raise InputError(
                "covariance must be symmetric and positive semi-definite, "
                f"its smallest eigenvalue is {float(eigenvalues.min()):.3g}"
            )
        self.dtype = mean.dtype
        self.mean = mean.double()
        # Otherwise a singular covariance would have a standard deviation of √ε orthogonal to its support.
        self.eigenvalues: Tensor = torch.where(eigenvalues > tolerance, eigenvalues, 0.0)
        self.eigenvectors: Tensor = eigenvectors

    def velocity(self, x: Tensor, t: float | Tensor) -> Tensor:
        """u(x, t) = E[v | x_t = x] = −m + (t I − (1−t) Σ) C_t⁻¹ (x − (1−t) m), shape (B, D)."""
        return self.average_velocity(x, t, t)

    def flow_map(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """ψ(x, t, s) = (1−s) m + C_s^½ C_t^−½ (x − (1−t) m): move x (B, D) from time t to time s.

        For s > t the flow runs towards the noise.
        """
        return (x.double() + (self._column(s, x) - self._column(t, x)) * self._average(x, t, s)).to(x.dtype)

    def average_velocity(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """(ψ(x, t, s) − x) / (s − t), and u(x, t) at s = t: the output of a perfect network F(x, t, s).

        −m + K (x − (1−t) m), where along an eigenvector K = (ρ_s / ρ_t − 1) / (s − t). It is computed as
        K = [s + t − λ (2 − s − t)] / [ρ_t (ρ_s + ρ_t)], without division by s − t. Shape (B, D).
        """
        return self._average(x, t, s).to(x.dtype)

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """∇ log p_t(x) = −C_t⁻¹ (x − (1−t) m), shape (B, D)."""
        return (self._centred(x, t) / -self._deviation(t, x).square() @ self._vectors(x).T).to(x.dtype)

    def marginal(self, t: float | Tensor) -> GaussianMoments:
        """Moments of x_t: (1−t) m and (1−t)² Σ + t² I; batched if t has shape (B,)."""
        time = torch.as_tensor(t, dtype=torch.float64, device=self.mean.device)[..., None]
        variances = (1 - time).square() * self.eigenvalues + time.square()
        covariance = self.eigenvectors * variances[..., None, :] @ self.eigenvectors.T
        return GaussianMoments((1 - time) * self.mean, covariance)

    def conditional_variance(self, t: float | Tensor) -> Tensor:
        """Tr Var(v | x_t), the same for every x_t, float64 of t's shape.

        Var(v | x_t) = I + Σ − (t I − (1−t) Σ) C_t⁻¹ (t I − (1−t) Σ) = Σ C_t⁻¹. At t = 0 it is I, also if Σ is
        singular, since x_0 and x_1 are independent.
        """
        time = torch.as_tensor(t, dtype=torch.float64, device=self.mean.device)[..., None]
        variances = (1 - time).square() * self.eigenvalues + time.square()
        return torch.where(time == 0, 1.0, self.eigenvalues / variances).sum(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` draws of the data x0 in the mean's dtype, (count, D), on the generator's device."""
        device = generator.device
        draws = torch.randn(count, len(self.mean), dtype=torch.float64, device=device, generator=generator)
        factor = (self.eigenvectors * self.eigenvalues.sqrt()).to(device)
        return (self.mean.to(device) + draws @ factor.T).to(self.dtype)

    def _average(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        start, end = self._column(t, x), self._column(s, x)
        start_deviation, end_deviation = self._deviation(t, x), self._deviation(s, x)
        slope = (start + end) - self.eigenvalues.to(x.device) * (2 - start - end)
        scale = start_deviation * (end_deviation + start_deviation)
        # 0/0 occurs only at t = s = 0 for λ = 0, where u(x, 0) = E[x1] − x = −x gives the factor −1.
        factor = torch.where((scale == 0) & (slope == 0), -1.0, slope / scale)
        return self._centred(x, t) * factor @ self._vectors(x).T - self.mean.to(x.device)

    def _centred(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x − (1−t) m in the eigenvectors' coordinates, (B, D)."""
        return (x.double() - (1 - self._column(t, x)) * self.mean.to(x.device)) @ self._vectors(x)

    def _deviation(self, t: float | Tensor, x: Tensor) -> Tensor:
        """ρ_t, (B, D) or (1, D)."""
        time = self._column(t, x)
        return torch.hypot((1 - time) * self.eigenvalues.sqrt().to(x.device), time)

    def _column(self, t: float | Tensor, x: Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64, device=x.device).reshape(-1, 1)

    def _vectors(self, x: Tensor) -> Tensor:
        return self.eigenvectors.to(x.device)
