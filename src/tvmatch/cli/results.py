"""What a finished run shows: pictures of its samples, its curves, its figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from tvmatch import pictures
from tvmatch.data.base import Dataset
from tvmatch.data.config import DensityData, DigitsData
from tvmatch.evaluation import (
    evaluate_digits,
    evaluate_images,
    evaluate_points,
    metrics_table,
    write_metrics,
)
from tvmatch.trained_model import TrainedModel
from tvmatch.training.config import Config
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
        drawn.append(run / "samples.png")
        pictures.points_picture(data, samples, paths, drawn[-1])
    elif model.spec.shape[0] in (1, 3):
        for n in steps:
            drawn.append(run / f"samples_{n}.png")
            pictures.save_png(sample_grid(model, n), drawn[-1])
    history = read_log(run)
    if history:
        drawn.append(run / "training.png")
        pictures.training_curves(history, drawn[-1])
    return drawn


def sample_grid(model: TrainedModel, steps: int) -> Any:
    """A row a class, of at most the first ten classes, or a square grid without classes."""
    rows = min(model.spec.class_count, 10)
    labels = [k for k in range(rows) for _ in range(COLUMNS)] or None
    samples = model.sample(labels, count=None if labels else COLUMNS * COLUMNS, steps=steps)
    return pictures.image_grid(samples, COLUMNS)


def measure(
    model: TrainedModel,
    config: Config,
    dataset: Dataset,
    steps: tuple[int, ...],
    count: int | None,
    seed: int,
) -> dict[str, Any]:
    """The figures of `metrics.json`, by the kind of data."""
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
                model.sample, dataset, steps=steps, count=count or 2000, seed=seed, on_progress=report
            )
        else:
            name = config.data.path
            figures = evaluate_images(
                model.sample, dataset, steps=steps, count=count or 2000, seed=seed, on_progress=report
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


def show_paths(console: Console, paths: list[Path]) -> None:
    """One path a line."""
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
