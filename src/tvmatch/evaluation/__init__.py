"""How good the samples are: distances to real data that was kept aside."""

from tvmatch.evaluation.digits import evaluate_digits
from tvmatch.evaluation.frechet import GaussianStatistics, fit_gaussian, frechet_distance
from tvmatch.evaluation.images import evaluate_images
from tvmatch.evaluation.points import evaluate_points
from tvmatch.evaluation.report import metrics_table, write_metrics
from tvmatch.evaluation.transport import wasserstein2

__all__ = [
    "GaussianStatistics",
    "evaluate_digits",
    "evaluate_images",
    "evaluate_points",
    "fit_gaussian",
    "frechet_distance",
    "metrics_table",
    "wasserstein2",
    "write_metrics",
]
