"""Results of a finished run: pictures of samples, training curves, metrics."""

import math
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from tvmatch import pictures
from tvmatch.cli.progress import progress_bar
from tvmatch.config.schema import Config
from tvmatch.data.base import Dataset
from tvmatch.data.config import DensityData, DigitsData
from tvmatch.errors import InputError
from tvmatch.evaluation import evaluate_digits, evaluate_images, evaluate_points, metrics_table, write_metrics
from tvmatch.trained_model import TrainedModel
from tvmatch.training import NonFiniteError
from tvmatch.training.log import read_log

COLUMNS = 12
METRICS_NAME = "metrics.json"


def draw(run: Path, model: TrainedModel, dataset: Dataset, steps: tuple[int, ...]) -> list[Path]:
    """Write pictures of samples for each number of steps, and training curves, into the run folder."""
    drawn = []
    if model.spec.kind == "points":
        data = dataset.take(2000, seed=0).values
        samples = {n: model.sample(count=2000, steps=n, batch_size=2000) for n in steps}
        paths = model.trajectory(count=100, steps=max(steps), batch_size=100)
        _expect_finite(paths, *samples.values())
        drawn.append(run / "samples.png")
        pictures.points_picture(data, samples, paths, drawn[-1])
    elif model.gives_images:
        for n in steps:
            drawn.append(run / f"samples_{n}.png")
            pictures.save_png(sample_grid(model, n), drawn[-1])
    history = read_log(run)
    if history:
        drawn.append(run / "training.png")
        pictures.training_curves(history, drawn[-1])
    return drawn


def sample_grid(model: TrainedModel, steps: int) -> Image.Image:
    """A row of samples for each of the first ten classes, or a square grid for a model without classes."""
    rows = min(model.spec.class_count, 10)
    labels = [k for k in range(rows) for _ in range(COLUMNS)] or None
    samples = model.sample(labels, count=None if labels else COLUMNS * COLUMNS, steps=steps)
    _expect_finite(samples)
    return pictures.image_grid(samples, COLUMNS)


def _expect_finite(*samples: Tensor) -> None:
    if not all(torch.isfinite(values).all() for values in samples):
        raise NonFiniteError("the samples of the trained model are not finite: training has diverged")


def measure(
    model: TrainedModel,
    config: Config,
    dataset: Dataset,
    steps: tuple[int, ...],
    count: int | None,
    seed: int,
) -> dict[str, Any]:
    """Compute the content of `metrics.json` for the kind of data of a run.

    Args:
        model: to evaluate.
        config: of its run.
        dataset: of its run.
        steps: numbers of network evaluations a sample.
        count: number of samples of points or images; by default 2,000, or half of the images if there are
            fewer than 4,000.
        seed: of the noise and of the choice of real data.

    Raises:
        InputError: for a count that does not fit the data.
    """
    if count is not None and isinstance(config.data, DigitsData):
        raise InputError("samples", f"cannot be set for digits, which use 360 a draw, got {count}")
    if count is not None and count < 2:
        raise InputError("samples", f"must be at least 2, got {count}")
    elements = len(dataset) if isinstance(dataset, Sized) else math.inf
    if count is not None and 2 * count > elements:
        raise InputError("samples", f"must be at most half of the {elements} images, got {count}")
    count = min(2000, int(min(elements, 4000)) // 2) if count is None else count
    with progress_bar("evaluating") as report:
        shared: dict[str, Any] = {"steps": steps, "seed": seed, "on_progress": report}
        if isinstance(config.data, DigitsData):
            name = "digits"
            shared["reference_split"] = "held_out" if config.data.split == "train" else "validation"
            metrics = evaluate_digits(model.sample, **shared)
        elif isinstance(config.data, DensityData):
            name = config.data.name
            metrics = evaluate_points(model.sample, dataset, count=count, **shared)
        else:
            name = config.data.path
            metrics = evaluate_images(model.sample, dataset, count=count, **shared)
    facts = {
        "dataset": name,
        "steps": model.step,
        "parameters": model.provenance.get("parameters"),
        "train_seconds": model.provenance.get("train_seconds"),
    }
    return facts | metrics


def show(console: Console, metrics: dict[str, Any], path: Path) -> None:
    """Write metrics to `path` and print them as a table."""
    write_metrics(path, metrics)
    console.print(metrics_table(metrics))


def show_paths(paths: list[Path]) -> None:
    """Print one path a line."""
    for path in paths:
        print(path)
