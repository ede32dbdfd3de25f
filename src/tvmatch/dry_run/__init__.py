"""What a training step needs, counted without data and without a GPU."""

from tvmatch.dry_run.estimate import Estimate, estimate

__all__ = ["Estimate", "estimate"]
