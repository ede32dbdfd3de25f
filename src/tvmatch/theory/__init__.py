"""Exact flows of Gaussians, and the Wasserstein bound of the training loss."""

from tvmatch.theory.bound import Bound, wasserstein_bound
from tvmatch.theory.gaussian import GaussianFlow, GaussianMoments

__all__ = ["Bound", "GaussianFlow", "GaussianMoments", "wasserstein_bound"]
