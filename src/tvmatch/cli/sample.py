"""`tvmatch sample`: a PNG grid, a folder of PNGs, or an .npz file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tvmatch import pictures
from tvmatch.cli import options
from tvmatch.errors import InputError
from tvmatch.files import replacing
from tvmatch.trained_model import TrainedModel, load
from tvmatch.training import resolve_device
from tvmatch.training.recipes import OneLineParser

DESCRIPTION = """\
Draw samples from a checkpoint. --out decides the form: a name ending in .png is one grid, in .npz an
array file (`samples` of shape (n, C, H, W) in [0, 1], or (n, 2), and `labels`), anything else a folder
with one PNG a sample. With several numbers of steps each gets a file or folder of its own, its name
marked _1, _2, …. Sample k has the same noise for every number of steps, batch size and device. Nothing is
overwritten."""


def run(arguments: list[str]) -> int:
    """Sample and write."""
    parser = OneLineParser(prog="tvmatch sample", description=DESCRIPTION)
    options.add_checkpoint_options(parser)
    parser.add_argument(
        "--labels",
        type=str,
        default=None,
        help="class names or numbers, 3,cat (default: all in turn)",
    )
    parser.add_argument("--count", type=int, default=None, help="samples in all; labels are repeated in turn")
    parser.add_argument("--steps", type=str, default="1", help="network evaluations, 1,2,4")
    parser.add_argument("--times", type=str, default=None, help="a time grid instead, 1,0.6,0")
    parser.add_argument(
        "--guidance", type=float, default=None, help="weight w, where the model takes several"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--batch_size", type=int, default=64, help="samples at a time (default: 64)")
    parser.add_argument(
        "--out", type=str, default="samples.png", help="file or folder (default: samples.png)"
    )
    parsed = parser.parse_args(arguments)

    out = Path(parsed.out)
    times = None if parsed.times is None else options.numbers(parsed.times)
    counts = options.step_counts(parsed.steps) if times is None else (1,)
    several = len(counts) > 1
    paths = [out.with_name(f"{out.stem}_{n}{out.suffix}") if several else out for n in counts]
    for path in paths:
        if path.exists():
            raise InputError(f"out: {path} exists already")
    model = load(parsed.checkpoint, resolve_device(parsed.device))
    labels = _labels(model, None if parsed.labels is None else options.names(parsed.labels), parsed.count)
    for steps, path in zip(counts, paths, strict=True):
        samples = model.sample(
            labels,
            count=None if labels else parsed.count,
            steps=steps,
            times=times,
            guidance=parsed.guidance,
            seed=parsed.seed,
            batch_size=parsed.batch_size,
        )
        _write(samples, labels, model, path)
        Console().print(str(path), highlight=False, soft_wrap=True)
    return 0


def _labels(model: TrainedModel, labels: list[str] | None, count: int | None) -> list[int | str] | None:
    """One label a sample: those given, or all classes, in turn up to `count`."""
    if count is not None and count < 1:
        raise InputError(f"count: must be at least 1, got {count}")
    if labels is None:
        if model.spec.class_names is None:
            return None
        labels = [str(k) for k in range(model.spec.class_count)]
        classes: list[int | str] = list(range(model.spec.class_count))
    else:
        classes = list(labels)
    count = len(classes) if count is None else count
    return [classes[k % len(classes)] for k in range(count)]


def _write(samples: Tensor, labels: list[int | str] | None, model: TrainedModel, path: Path) -> None:
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {"samples": samples.numpy()}
        if labels is not None:
            arrays["labels"] = model.spec.label_indices(labels).numpy()
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
    elif model.spec.kind == "points":
        raise InputError(f"out: points go to an .npz file, got {path}")
    elif path.suffix.lower() == ".png":
        pictures.save_png(pictures.image_grid(samples, _columns(len(samples))), path)
    elif path.suffix:
        raise InputError(f"out: must end in .png or .npz, or be a folder's name, got {path}")
    else:
        path.mkdir(parents=True)
        for k, image in enumerate(track(samples, "writing", transient=True)):
            pictures.save_png(pictures.image_grid(image[None], 1, scale=1), path / f"{k:06d}.png")


def _columns(count: int) -> int:
    """Of a nearly square grid."""
    return int(torch.tensor(count).sqrt().ceil())
