"""Exact flows with known answers, and what the training loss bounds."""

from tvmatch.theory.bound import Bound, wasserstein_bound
from tvmatch.theory.gaussian import GaussianFlow, GaussianMoments

__all__ = ["Bound", "GaussianFlow", "GaussianMoments", "wasserstein_bound"]
