"""`tvmatch evaluate --reference …`: FID and other metrics in the features of an extractor."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from tvmatch.cli import options, results
from tvmatch.cli.progress import progress_bar
from tvmatch.config.parser import OneLineParser
from tvmatch.distributed import Processes
from tvmatch.errors import InputError, arguments_named
from tvmatch.evaluation import (
    FeatureRequest,
    evaluate_features,
    features_table,
    load_extractor,
    load_reference,
    write_metrics,
)
from tvmatch.evaluation.feature_request import METRICS
from tvmatch.evaluation.provenance import provenance_line
from tvmatch.evaluation.references.loading import is_array_file
from tvmatch.evaluation.report import feature_metrics_name
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import find_checkpoint
from tvmatch.training.run_folder import run_folder

OPTIONS = {
    "reference": "real images (folder, ImageNet, Parquet, ZIP, data set on the Hub) or their statistics "
    "(.npz, .pkl)",
    "reference_split": "split of the reference images (default: train)",
    "reference_crop": "crop of the reference images: centre or dhariwal (default: the crop of the model's "
    "training images, or dhariwal if the checkpoint does not record it)",
    "extractor": "inception (default), dinov2, or package.module:attribute for a custom extractor",
    "weights": "weights of the extractor: file or folder (default: published weights, downloaded)",
    "metrics": f"some of {','.join(METRICS)}, where pr is precision and recall (default: all that extractor "
    "and reference allow)",
    "guidance": "guidance weights, such as 1.5,2, within the range of the model (default: its highest)",
    **options.LABEL_OPTIONS,
    "batch_size": "images at a time (default: 64)",
    "cache": "folder for computed reference statistics (default: tvmatch/references in HF_HOME)",
}
"""Options of metrics in features with their help. Any of them asks for these metrics."""


def add_options(parser: OneLineParser) -> None:
    """Add the options of metrics in features."""
    for name, text in OPTIONS.items():
        options.adder(parser)(f"--{name}", type=int if name == "batch_size" else str, help=text)


@arguments_named({"count": "samples"})
def evaluate(
    parsed: argparse.Namespace, model: TrainedModel, steps: tuple[int, ...], processes: Processes
) -> int:
    """Compute the metrics. The first process writes them to a file and prints a table.

    Raises:
        InputError: for an option that does not fit the model, the extractor or the reference.
    """
    request = _request(parsed, steps)
    name = parsed.extractor or "inception"
    default = _folder(Path(parsed.checkpoint)) / feature_metrics_name(name, request)
    path = options.metrics_file(parsed.out, default)
    if parsed.reference is None and request.metrics != ("is",):
        raise InputError(
            "reference", "is required (real images or their statistics) for all metrics but --metrics is"
        )
    if parsed.reference_crop is not None and (parsed.reference is None or is_array_file(parsed.reference)):
        raise InputError(
            "reference_crop", f"applies to images only, the reference is {parsed.reference or 'not given'}"
        )
    request.check(model)
    weights = None if parsed.weights is None else Path(parsed.weights)
    extractor = load_extractor(name, model.device, weights)
    with _warnings_on_stderr():
        reference = None
        if parsed.reference is not None:
            if not processes.is_first or not sys.stderr.isatty():
                options.hide_data_progress()
            with progress_bar("reference", shown=processes.is_first) as report:
                reference = load_reference(
                    parsed.reference,
                    extractor,
                    model.output_shape,
                    split=parsed.reference_split or "train",
                    crop=parsed.reference_crop or model.provenance.get("crop"),
                    with_vectors=request.metrics is None or "pr" in request.metrics,
                    cache=None if parsed.cache is None else Path(parsed.cache),
                    batch_size=request.batch_size,
                    processes=processes,
                    on_progress=report,
                )
        with progress_bar("samples", shown=processes.is_first) as report:
            metrics = evaluate_features(
                model, extractor, reference, request, processes=processes, on_progress=report
            )
    if metrics is not None:
        parameters = sum(parameter.numel() for parameter in model.network.parameters())
        facts = {"checkpoint": parsed.checkpoint, "steps": model.step, "parameters": parameters}
        try:
            write_metrics(path, facts | metrics)
        finally:  # show the result of hours of work even if the disk is full
            Console().print(features_table(metrics))
            print(provenance_line(metrics["provenance"]))
        results.show_paths([path])
    return 0


def _folder(checkpoint: Path) -> Path:
    """The folder of the default file: that of the run, or of the checkpoint outside a run."""
    try:
        return run_folder(checkpoint)
    except InputError:
        return find_checkpoint(checkpoint)


def _request(parsed: argparse.Namespace, steps: tuple[int, ...]) -> FeatureRequest:
    """The request that the options describe; its defaults apply to options that are not given."""
    given: dict[str, Any] = {
        "metrics": parsed.metrics and tuple(name.strip() for name in parsed.metrics.split(",")),
        "count": parsed.samples,
        "guidance": parsed.guidance and options.numbers("guidance", parsed.guidance, "1.5,2"),
        "labels_from": parsed.labels_from,
        "uint8": parsed.uint8,
        "batch_size": parsed.batch_size,
    }
    return FeatureRequest(
        steps=steps, seed=parsed.seed, **{name: value for name, value in given.items() if value is not None}
    )


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print warnings of `tvmatch.evaluation` in the format of error messages."""
    logger = logging.getLogger("tvmatch.evaluation")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("tvmatch: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
