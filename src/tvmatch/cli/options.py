"""Option types and arguments that several commands share."""

import sys
from pathlib import Path

from tvmatch.data.base import Dataset
from tvmatch.data.config import ImagesData
from tvmatch.errors import InputError
from tvmatch.training import CONFIG_NAME, Config
from tvmatch.training.recipes import OneLineParser, parse_config, read_yaml

DEVICE_HELP = "auto, cpu, cuda, cuda:1, …"


def step_counts(text: str) -> tuple[int, ...]:
    """Numbers of steps from "1,2,4"."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"steps: must be whole numbers like 1,2,4, got {text!r}") from None
    if min(counts) < 1:
        raise InputError(f"steps: must be at least 1, got {min(counts)}")
    if len(set(counts)) < len(counts):
        raise InputError(f"steps: {text} names a number twice")
    return counts


def numbers(text: str) -> tuple[float, ...]:
    """Floating-point numbers from "1,0.5,0"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"times: must be numbers like 1,0.5,0, got {text!r}") from None


def names(text: str) -> list[str]:
    """Labels from "3,cat": class names or numbers."""
    labels = [part.strip() for part in text.split(",")]
    if "" in labels:
        raise InputError(f"labels: must be names or numbers like 3,cat, got {text!r}")
    return labels


def add_checkpoint_options(parser: OneLineParser) -> None:
    """CHECKPOINT and --device."""
    parser.add_argument("checkpoint", type=str, help="a run folder (its newest checkpoint) or one checkpoint")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)


def run_folder(path: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (path / CONFIG_NAME).is_file():
        return path
    full = path.resolve()
    if full.parent.name == "checkpoints" and (full.parents[1] / CONFIG_NAME).is_file():
        return path.parents[1] if len(path.parts) > 2 else full.parents[1]
    raise InputError(f"{path}: not a run: no {CONFIG_NAME} here or in the run folder above")


def run_config(run: Path) -> Config:
    """The configuration that a run folder was trained with.

    Raises:
        InputError: if its data set was given from Python, so that no file says what it is.
    """
    content = read_yaml(run / CONFIG_NAME)
    if content.get("data") is None:
        raise InputError(
            f"{run / CONFIG_NAME}: the data set of this run was given from Python; evaluate it from Python, "
            "with tvmatch.evaluation"
        )
    return parse_config(content, str(run / CONFIG_NAME))


def load_data(config: Config) -> Dataset:
    """The data set of a configuration; progress bars of preparing images are for terminals alone."""
    if isinstance(config.data, ImagesData) and not sys.stderr.isatty():
        import datasets  # here, because it takes a second to import

        datasets.disable_progress_bars()
    dataset: Dataset = config.data.load()
    return dataset
