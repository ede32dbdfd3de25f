"""`tvmatch sample`: a PNG grid, a folder of PNGs, or an .npz file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tvmatch import pictures
from tvmatch.cli import options, results
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.files import new_folder, replacing
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
    parser.add_argument("--steps", type=str, default=None, help="network evaluations, 1,2,4 (default: 1)")
    parser.add_argument("--times", type=str, default=None, help="a time grid instead of --steps, 1,0.6,0")
    parser.add_argument(
        "--guidance", type=float, default=None, help="weight w, where the model takes several"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--batch_size", type=int, default=64, help="samples at a time (default: 64)")
    parser.add_argument(
        "--out", type=str, default=None, help="file or folder (default: samples.png, samples.npz for points)"
    )
    parsed = parser.parse_args(arguments)

    if parsed.times is not None and parsed.steps is not None:
        raise InputError("times: give a grid of times or a number of --steps, not both")
    times = None if parsed.times is None else options.numbers("times", parsed.times, "1,0.5,0")
    counts = options.step_counts("1" if parsed.steps is None else parsed.steps)
    model = options.load_model(parsed.checkpoint, parsed.device, parsed.autoencoder)
    default = "samples.npz" if model.spec.kind == "points" else "samples.png"
    paths = _paths(Path(default if parsed.out is None else parsed.out), counts, model.spec)
    labels = _labels(model.spec, parsed.labels, parsed.count)
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
        _write(samples, labels, model.spec, path)
        results.show_paths([path])
    return 0


def _paths(out: Path, counts: tuple[int, ...], spec: DataSpec) -> list[Path]:
    """Where the samples of each number of steps go, all of them checked before any is drawn."""
    suffix = out.suffix.lower()
    if not out.name:
        raise InputError(f"out: must name a file or a new folder, got {str(out)!r}")
    if suffix not in (".png", ".npz", ""):
        raise InputError(f"out: must end in .png or .npz, or be a folder's name, got {out}")
    if spec.kind == "points" and suffix != ".npz":
        raise InputError(f"out: points go to an .npz file, got {out}")
    several = len(counts) > 1
    paths = [out.with_name(f"{out.stem}_{n}{out.suffix}") if several else out for n in counts]
    for path in paths:
        if path.exists():
            raise InputError(f"out: {path} exists already")
    return paths


def _labels(spec: DataSpec, given: str | None, count: int | None) -> list[int] | None:
    """One class number a sample: of the labels given, or of all classes, in turn up to `count`."""
    if count is not None and count < 1:
        raise InputError(f"count: must be at least 1, got {count}")
    if given is None and spec.class_names is None:
        return None
    classes: list[int] = list(range(spec.class_count)) if given is None else spec.labels_in(given).tolist()
    count = len(classes) if count is None else count
    return [classes[k % len(classes)] for k in range(count)]


def _write(samples: Tensor, labels: list[int] | None, spec: DataSpec, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        arrays: dict[str, Any] = {"samples": samples.numpy()}
        if labels is not None:
            arrays["labels"] = np.array(labels, np.int64)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)
    elif suffix == ".png":
        columns = math.ceil(math.sqrt(len(samples)))
        pictures.save_png(pictures.image_grid(samples, columns), path)
    else:
        console = Console(stderr=True)
        numbered = enumerate(track(samples, "writing", console=console, disable=not console.is_terminal))
        with new_folder(path) as unfinished:
            for k, image in numbered:
                pictures.save_png(pictures.image_grid(image[None], 1, scale=1), unfinished / f"{k:06d}.png")
