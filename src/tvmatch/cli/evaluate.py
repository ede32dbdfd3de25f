"""`tvmatch evaluate`: compare samples of a checkpoint with real data."""

import argparse
from pathlib import Path

from rich.console import Console

from tvmatch.cli import feature_metrics, options, results
from tvmatch.config.parser import OneLineParser
from tvmatch.distributed import Processes, device_of_process, joined_processes
from tvmatch.errors import InputError
from tvmatch.training.run_folder import run_config, run_folder

DESCRIPTION = """\
Compare samples of a checkpoint with real data. Without --reference, the data are those of its run. Digits:
accuracy of a classifier, and the Fréchet distance to held-out digits in pixel space. Points: the exact
2-Wasserstein distance to new data. Images: the Fréchet distance in pixel space, which is not FID. Metrics
are written to metrics.json in the run folder, or to the new file --out.
With --reference, which a model of latents needs: FID, sFID, Inception Score, precision and recall in
Inception features, or similar metrics in the features of another --extractor. The table has a row for each
guidance weight and number of steps. Any checkpoint can be evaluated. Metrics are written to
metrics_EXTRACTOR.json in the run folder, or beside model.json; an existing file of that name is replaced,
unless --out names a new file. Metrics with --labels_from or --uint8 truncate are written to separate files.
Several processes started by torchrun share the work. Their number changes metrics by rounding only."""


def run(arguments: list[str]) -> int:
    """Evaluate a checkpoint and print a table."""
    parser = OneLineParser(prog="tvmatch evaluate", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    add = options.adder(parser)
    add("--steps", default="1,2,4", help="network evaluations a sample")
    add(
        "--samples",
        type=int,
        help="number of samples (default: 50000 with a reference; otherwise 2000, or half of the images if "
        "there are fewer than 4000); cannot be set for digits",
    )
    add("--seed", type=int, default=0, help="seed of the noise and of the choice of data")
    add("--out", help="file for the metrics (default: in the run folder)")
    feature_metrics.add_options(parser)
    parsed = parser.parse_args(arguments)

    steps = options.step_counts(parsed.steps)
    if parsed.seed < 0:
        raise InputError("seed", f"must not be negative, got {parsed.seed}")
    with joined_processes() as processes:
        return _evaluate(parsed, steps, processes)


def _evaluate(parsed: argparse.Namespace, steps: tuple[int, ...], processes: Processes) -> int:
    in_features = any(getattr(parsed, name) is not None for name in feature_metrics.OPTIONS)
    checkpoint = Path(parsed.checkpoint)
    device = device_of_process(parsed.device)
    model = options.load_model(checkpoint, device, parsed.autoencoder)
    if in_features or model.spec.kind == "latents":
        return feature_metrics.evaluate(parsed, model, steps, processes)
    if not processes.is_first:
        return 0  # these metrics are computed by one process
    folder = run_folder(checkpoint)
    path = options.metrics_file(parsed.out, folder / results.METRICS_NAME)
    config = run_config(folder)
    metrics = results.measure(model, config, options.load_data(config), steps, parsed.samples, parsed.seed)
    results.show(Console(), metrics, path)
    results.show_paths([path])
    return 0
