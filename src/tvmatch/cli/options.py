"""Arguments that several commands share, and functions that read them."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tvmatch.config.parser import OneLineParser
from tvmatch.config.schema import Config
from tvmatch.data.base import Dataset
from tvmatch.data.config import ImagesData, LatentsData
from tvmatch.data.spec import DataSpec
from tvmatch.devices import resolve_device
from tvmatch.errors import InputError
from tvmatch.trained_model import Decoder, TrainedModel
from tvmatch.trained_model.loading import load_with_decoder

DEVICE_HELP = "auto, cpu, cuda, cuda:1, …"
LABEL_OPTIONS = {
    "labels_from": "draw labels at random: data, with the class frequencies of the training data, or uniform "
    "(default: all classes in turn)",
    "uint8": "conversion of pixels to bytes: round (default) or truncate",
}


def step_counts(text: str) -> tuple[int, ...]:
    """Numbers of steps from "1,2,4"."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError("steps", f"must be whole numbers like 1,2,4, got {text!r}") from None
    if min(counts) < 1:
        raise InputError("steps", f"must be at least 1, got {min(counts)}")
    if len(set(counts)) < len(counts):
        raise InputError("steps", f"{text} contains a number twice")
    return counts


def numbers(option: str, text: str, example: str) -> tuple[float, ...]:
    """Floating-point numbers from "1,0.5,0". The error message of `option` shows `example`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(option, f"must be numbers like {example}, got {text!r}") from None


def adder(parser: OneLineParser) -> Callable[..., Any]:
    """`parser.add_argument` for text options without a default."""
    return partial(parser.add_argument, type=str, default=None)


def add_import_option(parser: OneLineParser) -> None:
    """Add --import to the help; `tvmatch.cli.main` handles it before a command runs."""
    parser.add_argument(
        "--import",
        default=argparse.SUPPRESS,
        metavar="MODULE",
        help="import a Python module, installed or in this folder, that registers a network or an objective",
    )


def add_checkpoint_options(parser: OneLineParser) -> None:
    """Add CHECKPOINT, --device, --autoencoder and --import, which `load_model` needs."""
    add_import_option(parser)
    parser.add_argument("checkpoint", type=str, help="run folder (its newest checkpoint) or checkpoint")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)
    adder(parser)(
        "--autoencoder",
        help="autoencoder of a model of latents: folder or name on the Hub (default: from the checkpoint)",
    )


def load_model(checkpoint: str | Path, device: str, autoencoder: str | None = None) -> TrainedModel:
    """Call `load_with_decoder` for a device name as in `resolve_device`."""
    return load_with_decoder(checkpoint, resolve_device(device), autoencoder)


def load_decoder(config: Config, spec: DataSpec, device: str) -> Decoder | None:
    """Load the autoencoder that decodes the latents of a run; None for other data.

    Raises:
        InputError: if the autoencoder cannot be loaded, or is not the one that encoded the latents.
    """
    if spec.autoencoder is None or not isinstance(config.data, LatentsData):
        return None
    from tvmatch.data.latents.autoencoder import load_autoencoder  # here, because it imports diffusers

    source = config.data.autoencoder or spec.autoencoder.source
    try:
        autoencoder = load_autoencoder(source, resolve_device(device))
    except InputError as error:
        if config.training.sample_every == 0:
            print(f"no samples will be drawn: {error}", file=sys.stderr)
            return None
        hint = "set data.autoencoder to its location, or training.sample_every=0 to draw no samples"
        raise error.with_hint(hint) from None
    autoencoder.check(spec.autoencoder)
    return autoencoder


def check_writable(option: str, path: Path) -> None:
    """Raise an InputError about `option` unless a file can be created at `path`, with its parent folders."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(option, f"{path} cannot be written, {above} is not a writable folder")


def metrics_file(given: str | None, default: Path) -> Path:
    """The file of --out, which must be new, or the default one, which may be replaced."""
    path = default if given is None else Path(given)
    if path.is_dir():
        raise InputError("out", f"{path} is a folder, must be a file")
    if path.exists() and path.resolve() != default.resolve():
        raise InputError("out", f"{path} exists already")
    check_writable("out", path)
    return path


def hide_data_progress() -> None:
    """Switch off the progress bars of `datasets`."""
    import datasets  # here, because it takes a second to import

    datasets.disable_progress_bars()


def load_data(config: Config) -> Dataset:
    """Load the data set of a configuration, with progress bars if standard error is a terminal."""
    if isinstance(config.data, ImagesData | LatentsData) and not sys.stderr.isatty():
        hide_data_progress()
    dataset: Dataset = config.data.load()
    return dataset
