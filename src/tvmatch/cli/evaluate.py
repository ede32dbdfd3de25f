"""`tvmatch evaluate`: a checkpoint against real data."""

import argparse
from pathlib import Path

from rich.console import Console

from tvmatch.cli import feature_metrics, options, results
from tvmatch.config.parser import OneLineParser
from tvmatch.distributed import Processes, device_of_process, joined_processes
from tvmatch.errors import InputError
from tvmatch.training.run_folder import run_config, run_folder

DESCRIPTION = """\
Measure a checkpoint against real data. By default the data of its run. Digits: does a classifier see the
digit asked for, and the Fréchet distance to held-out digits in pixel space. Points: the exact 2-Wasserstein
distance to fresh data. Images: the Fréchet distance in pixel space, which is no FID. Figures go to
metrics.json in the run folder, or to the new file --out. With --reference, which a model of latents needs:
FID, sFID, Inception Score, precision and recall in Inception features, or the same in other features with
--extractor, in a row for each guidance weight and number of steps; any checkpoint will do. These figures
go to metrics_EXTRACTOR.json in the run folder or beside model.json, in place of those of this extractor
that are there (--out keeps both); those with --labels_from or --uint8 truncate go to a file of their own.
Started by torchrun, the processes share the work; their number changes no figure."""


def run(arguments: list[str]) -> int:
    """Evaluate and print a table."""
    parser = OneLineParser(prog="tvmatch evaluate", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument("--steps", type=str, default="1,2,4", help="network evaluations, 1,2,4")
    parser.add_argument(
        "--samples",
        type=int,
        default=None,
        help="of points and images (default: 2000, or half of the images if they are fewer; with a "
        "reference 50000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and choice of data (default: 0)")
    parser.add_argument(
        "--out", type=str, default=None, help="file for the figures (default: in the run folder)"
    )
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
        return 0  # one process is enough for figures of small images and points
    folder = run_folder(checkpoint)
    path = Path(parsed.out) if parsed.out else folder / results.METRICS_NAME
    if path.is_dir():
        raise InputError("out", f"{path} is a folder, the figures go to a file")
    if path.exists() and path.resolve() != (folder / results.METRICS_NAME).resolve():
        raise InputError("out", f"{path} exists already")
    config = run_config(folder)
    metrics = results.measure(model, config, options.load_data(config), steps, parsed.samples, parsed.seed)
    results.show(Console(), metrics, path)
    results.show_paths([path])
    return 0
