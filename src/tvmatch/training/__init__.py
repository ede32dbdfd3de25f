"""Training: configuration, step, loop, checkpoints."""

from tvmatch.training.checkpoint import checkpoints, last_checkpoint
from tvmatch.training.config import Config
from tvmatch.training.loop import Trainer, train
from tvmatch.training.non_finite import NonFiniteError
from tvmatch.training.recipes import recipe, recipe_names
from tvmatch.training.signals import Interrupted
from tvmatch.training.start import CONFIG_NAME, lock_run, resolve_device

__all__ = [
    "CONFIG_NAME",
    "Config",
    "Interrupted",
    "NonFiniteError",
    "Trainer",
    "checkpoints",
    "last_checkpoint",
    "lock_run",
    "recipe",
    "recipe_names",
    "resolve_device",
    "train",
]
