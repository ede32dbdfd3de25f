"""Option types and arguments that several commands share."""

from pathlib import Path

from tvmatch.errors import InputError
from tvmatch.training import CONFIG_NAME, Config
from tvmatch.training.recipes import OneLineParser, parse_config, read_yaml


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
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, …")


def run_folder(checkpoint: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints."""
    if not checkpoint.exists():
        raise InputError(f"{checkpoint}: no such file or folder")
    for folder in (checkpoint, *checkpoint.resolve().parents[:2]):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise InputError(f"{checkpoint}: not a run: no {CONFIG_NAME} here or in the run folder above")


def run_config(run: Path) -> Config:
    """The configuration that a run folder was trained with."""
    return parse_config(read_yaml(run / CONFIG_NAME), [])
