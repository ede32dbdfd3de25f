"""Training: step, trainer, run folder, checkpoints."""

from tvmatch.training.checkpoint import checkpoints, last_checkpoint
from tvmatch.training.non_finite import NonFiniteError
from tvmatch.training.run_folder import CONFIG_NAME, lock_run
from tvmatch.training.signals import Interrupted
from tvmatch.training.trainer import Trainer, train

__all__ = [
    "CONFIG_NAME",
    "Interrupted",
    "NonFiniteError",
    "Trainer",
    "checkpoints",
    "last_checkpoint",
    "lock_run",
    "train",
]
