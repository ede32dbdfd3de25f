"""Pictures of samples during training."""

from collections.abc import Sized
from pathlib import Path

import torch
from torch import Tensor

from tvmatch import pictures
from tvmatch.data.base import Dataset
from tvmatch.data.read_ahead import read_here
from tvmatch.trained_model import TrainedModel
from tvmatch.training.log import RunLog

COLUMNS = 8
POINTS = 2000


def draw_samples(model: TrainedModel, dataset: Dataset, folder: Path, log: RunLog, seed: int) -> None:
    """Write a picture of samples to `folder` and, for images, to TensorBoard.

    Images are sampled in one step, with one row per class. Points in the plane are sampled in one, two and
    four steps and shown next to the data. There is no picture for other points, for latents without a
    decoder, and if samples are not finite.

    Raises:
        OSError: if the picture cannot be written.
        InputError, DataError: if the data set fails.
    """
    path = folder / f"step_{model.step:07d}.png"
    if model.gives_images:
        rows = min(model.spec.class_count, 10)
        labels = [k for k in range(rows) for _ in range(COLUMNS)] or None
        samples = model.sample(labels, count=None if labels else COLUMNS * COLUMNS)
        if _all_finite([samples], model.step, log):
            grid = pictures.image_grid(samples, COLUMNS)
            pictures.save_png(grid, path)
            log.image("samples/1 step", grid, model.step)
    elif model.spec.kind == "points" and model.spec.shape == (2,):
        count = min(POINTS, len(dataset)) if isinstance(dataset, Sized) else POINTS
        data = read_here(lambda n: dataset.take(n, seed), count).values
        clouds = {n: model.sample(count=count, steps=n, batch_size=count) for n in (1, 2, 4)}
        paths = model.trajectory(count=100, steps=8, batch_size=100)
        if _all_finite([paths, *clouds.values()], model.step, log):
            pictures.points_picture(data, clouds, paths, path)


def _all_finite(samples: list[Tensor], step: int, log: RunLog) -> bool:
    """Whether all samples are finite; if not, a message is logged and training continues."""
    if all(torch.isfinite(values).all() for values in samples):
        return True
    log.message(f"step {step}: samples are not finite, no picture is written")
    return False
