"""Option types and arguments that several commands share."""

import argparse
import os
import sys
from pathlib import Path

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


def step_counts(text: str) -> tuple[int, ...]:
    """Numbers of steps from "1,2,4"."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError("steps", f"must be whole numbers like 1,2,4, got {text!r}") from None
    if min(counts) < 1:
        raise InputError("steps", f"must be at least 1, got {min(counts)}")
    if len(set(counts)) < len(counts):
        raise InputError("steps", f"{text} names a number twice")
    return counts


def numbers(option: str, text: str, example: str) -> tuple[float, ...]:
    """Floating-point numbers of an option from "1,0.5,0"; an InputError shows the example."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(option, f"must be numbers like {example}, got {text!r}") from None


def add_import_option(parser: OneLineParser) -> None:
    """--import, for the help: `tvmatch.cli.main` takes it out and acts on it before a command runs."""
    parser.add_argument(
        "--import",
        default=argparse.SUPPRESS,
        metavar="MODULE",
        help="a Python module of yours, installed or in this folder, that registers a network",
    )


def add_checkpoint_options(parser: OneLineParser) -> None:
    """CHECKPOINT, --device, --autoencoder and --import: what `load_model` needs."""
    add_import_option(parser)
    parser.add_argument("checkpoint", type=str, help="a run folder (its newest checkpoint) or one checkpoint")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--autoencoder",
        type=str,
        default=None,
        help="of a model of latents: folder or Hub name to load it from (default: as recorded)",
    )


def add_label_options(parser: OneLineParser) -> None:
    """--labels_from and --uint8: how samples are made that are to be measured."""
    parser.add_argument(
        "--labels_from",
        type=str,
        default=None,
        help="data or uniform: the label of each sample is drawn, as often as in the training data or all "
        "alike (default: the classes in turn)",
    )
    parser.add_argument(
        "--uint8",
        type=str,
        default=None,
        help="round or truncate: how pixels become bytes (default: round)",
    )


def load_model(checkpoint: str | Path, device: str, autoencoder: str | None = None) -> TrainedModel:
    """`load_with_decoder` on a device as `resolve_device` names it."""
    return load_with_decoder(checkpoint, resolve_device(device), autoencoder)


def load_decoder(config: Config, spec: DataSpec, device: str) -> Decoder | None:
    """What makes images of a run's latents; None for other data.

    Raises:
        InputError: if the autoencoder cannot be loaded, or is another than the latents'.
    """
    if spec.autoencoder is None or not isinstance(config.data, LatentsData):
        return None
    # Here, because it imports diffusers
    from tvmatch.data.latents.autoencoder import load_autoencoder

    source = config.data.autoencoder or spec.autoencoder.source
    try:
        autoencoder = load_autoencoder(source, resolve_device(device))
    except InputError as error:
        if config.training.sample_every == 0:
            print(f"no samples will be drawn: {error}", file=sys.stderr)
            return None
        hint = "data.autoencoder names another place, training.sample_every=0 draws no samples"
        raise error.with_hint(hint) from None
    autoencoder.check(spec.autoencoder)
    return autoencoder


def check_writable(option: str, path: Path) -> None:
    """Raise an InputError that names the option unless a file can be made at `path`, or folders above it."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(option, f"{path} cannot be written, {above} is no folder that may be written to")


def load_data(config: Config) -> Dataset:
    """The data set of a configuration; progress bars of preparing images are for terminals alone."""
    if isinstance(config.data, ImagesData | LatentsData) and not sys.stderr.isatty():
        import datasets  # here, because it takes a second to import

        datasets.disable_progress_bars()
    dataset: Dataset = config.data.load()
    return dataset
