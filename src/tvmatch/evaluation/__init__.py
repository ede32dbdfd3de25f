"""How good the samples are: distances to real data that was kept aside."""

from tvmatch.evaluation.digits import evaluate_digits
from tvmatch.evaluation.extractors import Extractor, Features, load_extractor
from tvmatch.evaluation.frechet import GaussianStatistics, fit_gaussian, frechet_distance
from tvmatch.evaluation.image_metrics import evaluate_features
from tvmatch.evaluation.images import evaluate_images
from tvmatch.evaluation.inception_score import InceptionScore, inception_score
from tvmatch.evaluation.points import evaluate_points
from tvmatch.evaluation.precision_and_recall import PrecisionRecall, precision_recall
from tvmatch.evaluation.reference import load_reference
from tvmatch.evaluation.reference_files import Reference
from tvmatch.evaluation.report import features_table, metrics_table, write_metrics
from tvmatch.evaluation.statistics import RunningGaussian
from tvmatch.evaluation.wasserstein import wasserstein2

__all__ = [
    "Extractor",
    "Features",
    "GaussianStatistics",
    "InceptionScore",
    "PrecisionRecall",
    "Reference",
    "RunningGaussian",
    "evaluate_digits",
    "evaluate_features",
    "evaluate_images",
    "evaluate_points",
    "features_table",
    "fit_gaussian",
    "frechet_distance",
    "inception_score",
    "load_extractor",
    "load_reference",
    "metrics_table",
    "precision_recall",
    "wasserstein2",
    "write_metrics",
]
