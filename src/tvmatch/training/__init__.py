"""Training: configuration, step, loop, checkpoints."""

from tvmatch.training.checkpoint import checkpoints
from tvmatch.training.config import Config
from tvmatch.training.loop import CONFIG_NAME, Interrupted, Trainer, resolve_device, train
from tvmatch.training.recipes import recipe, recipe_names
from tvmatch.training.step import NonFiniteError

__all__ = [
    "CONFIG_NAME",
    "Config",
    "Interrupted",
    "NonFiniteError",
    "Trainer",
    "checkpoints",
    "recipe",
    "recipe_names",
    "resolve_device",
    "train",
]
