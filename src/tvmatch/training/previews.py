"""Pictures of samples while a run goes on."""

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
    """Draw samples of a model in training into `folder` and, of images, into TensorBoard.

    Images are drawn in one step, a row a class; points of the plane in one, two and four steps beside
    their data. Other points have no picture, nor have latents without a decoder, nor samples that are not
    finite.

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
    """Whether samples can be drawn; if not, training goes on and tells better what is wrong."""
    if all(torch.isfinite(values).all() for values in samples):
        return True
    log.message(f"step {step}: samples are not finite, there is no picture of them")
    return False
