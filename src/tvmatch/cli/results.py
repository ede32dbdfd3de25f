"""What a finished run shows: pictures of its samples, its curves, its figures."""

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tvmatch import pictures
from tvmatch.config.schema import Config
from tvmatch.data.base import Dataset
from tvmatch.data.config import DensityData, DigitsData
from tvmatch.errors import InputError
from tvmatch.evaluation import (
    evaluate_digits,
    evaluate_images,
    evaluate_points,
    metrics_table,
    write_metrics,
)
from tvmatch.trained_model import TrainedModel
from tvmatch.training import NonFiniteError
from tvmatch.training.log import read_log

COLUMNS = 12
METRICS_NAME = "metrics.json"


def draw(run: Path, model: TrainedModel, dataset: Dataset, steps: tuple[int, ...]) -> list[Path]:
    """Pictures of the training and of samples at each number of steps, in the run folder."""
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
    """A row a class, of at most the first ten classes, or a square grid without classes."""
    rows = min(model.spec.class_count, 10)
    labels = [k for k in range(rows) for _ in range(COLUMNS)] or None
    samples = model.sample(labels, count=None if labels else COLUMNS * COLUMNS, steps=steps)
    _expect_finite(samples)
    return pictures.image_grid(samples, COLUMNS)


def _expect_finite(*samples: Tensor) -> None:
    if not all(torch.isfinite(values).all() for values in samples):
        raise NonFiniteError("the trained model's samples are not finite: its training has diverged")


def measure(
    model: TrainedModel,
    config: Config,
    dataset: Dataset,
    steps: tuple[int, ...],
    count: int | None,
    seed: int,
) -> dict[str, Any]:
    """The figures of `metrics.json`, by the kind of data.

    Args:
        model: to be measured.
        config: of its run.
        dataset: the run's data.
        steps: numbers of network evaluations a sample.
        count: samples of points or images; by default 2,000, or half of the images if they are fewer.
        seed: of the noise and of the choice of real data.

    Raises:
        InputError: if a count does not fit the data.
    """
    if count is not None and isinstance(config.data, DigitsData):
        raise InputError("samples", f"digits are always measured on 360 a draw, got {count}")
    if count is not None and count < 2:
        raise InputError("samples", f"must be at least 2, got {count}")
    elements = len(dataset) if isinstance(dataset, Sized) else math.inf
    if count is not None and 2 * count > elements:
        raise InputError("samples", f"{count} are compared with twice as many of the {elements} images")
    count = min(2000, int(min(elements, 4000)) // 2) if count is None else count
    with _progress("evaluating") as report:
        if isinstance(config.data, DigitsData):
            split: Literal["held_out", "validation"] = (
                "held_out" if config.data.split == "train" else "validation"
            )
            name = "digits"
            figures = evaluate_digits(
                model.sample, reference_split=split, steps=steps, seed=seed, on_progress=report
            )
        elif isinstance(config.data, DensityData):
            name = config.data.name
            figures = evaluate_points(
                model.sample, dataset, steps=steps, count=count, seed=seed, on_progress=report
            )
        else:
            name = config.data.path
            figures = evaluate_images(
                model.sample, dataset, steps=steps, count=count, seed=seed, on_progress=report
            )
    facts = {
        "dataset": name,
        "steps": model.step,
        "parameters": model.provenance.get("parameters"),
        "train_seconds": model.provenance.get("train_seconds"),
    }
    return facts | figures


def show(console: Console, metrics: dict[str, Any], path: Path) -> None:
    """Write the figures to `path` and print them as a table."""
    write_metrics(path, metrics)
    console.print(metrics_table(metrics))


def show_paths(paths: list[Path]) -> None:
    """One path a line."""
    for path in paths:
        print(path)


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
