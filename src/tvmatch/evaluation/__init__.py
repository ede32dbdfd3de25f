"""Metrics of samples: comparisons with real data."""

from tvmatch.evaluation.digits import evaluate_digits
from tvmatch.evaluation.extractors import Extractor, Features, load_extractor
from tvmatch.evaluation.feature_metrics import evaluate_features
from tvmatch.evaluation.feature_request import FeatureRequest
from tvmatch.evaluation.metrics.frechet import GaussianStatistics, fit_gaussian, frechet_distance
from tvmatch.evaluation.metrics.inception_score import InceptionScore, inception_score
from tvmatch.evaluation.metrics.precision_and_recall import PrecisionRecall, precision_recall
from tvmatch.evaluation.metrics.statistics import RunningGaussian
from tvmatch.evaluation.metrics.wasserstein import wasserstein2
from tvmatch.evaluation.pixel_metrics import evaluate_images
from tvmatch.evaluation.points import evaluate_points
from tvmatch.evaluation.references.files import Reference
from tvmatch.evaluation.references.loading import load_reference
from tvmatch.evaluation.report import features_table, metrics_table, write_metrics

__all__ = [
    "Extractor",
    "FeatureRequest",
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
