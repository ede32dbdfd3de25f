"""`tvmatch evaluate`: a checkpoint against real data."""

from pathlib import Path

from rich.console import Console

from tvmatch.cli import options, results
from tvmatch.errors import InputError
from tvmatch.trained_model import load
from tvmatch.training import resolve_device
from tvmatch.training.recipes import OneLineParser

DESCRIPTION = """\
Measure a checkpoint against the real data of its run. Digits: does a classifier see the digit asked for,
and the Fréchet distance to held-out digits in pixel space. Points: the exact 2-Wasserstein distance to
fresh data. Images: the Fréchet distance in pixel space, which is no FID. Figures go to metrics.json in
the run folder, or to the new file --out."""


def run(arguments: list[str]) -> int:
    """Evaluate and print a table."""
    parser = OneLineParser(prog="tvmatch evaluate", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument("--steps", type=str, default="1,2,4", help="network evaluations, 1,2,4")
    parser.add_argument(
        "--samples",
        type=int,
        default=None,
        help="of points and images (default: 2000, or half of the images if they are fewer)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and choice of data (default: 0)")
    parser.add_argument(
        "--out", type=str, default=None, help="file for the figures (default: in the run folder)"
    )
    parsed = parser.parse_args(arguments)

    steps = options.step_counts(parsed.steps)
    checkpoint = Path(parsed.checkpoint)
    model = load(checkpoint, resolve_device(parsed.device))
    run_folder = options.run_folder(checkpoint)
    path = Path(parsed.out) if parsed.out else run_folder / results.METRICS_NAME
    if path.is_dir():
        raise InputError(f"out: {path} is a folder, the figures go to a file")
    if path.exists() and path.resolve() != (run_folder / results.METRICS_NAME).resolve():
        raise InputError(f"out: {path} exists already")
    if parsed.seed < 0:
        raise InputError(f"seed: must not be negative, got {parsed.seed}")
    config = options.run_config(run_folder)
    metrics = results.measure(model, config, options.load_data(config), steps, parsed.samples, parsed.seed)
    results.show(Console(), metrics, path)
    results.show_paths([path])
    return 0
