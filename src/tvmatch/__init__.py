"""Terminal Velocity Matching: one- and few-step generative models (arXiv 2511.19797).

`load` and `TrainedModel` need PyTorch, NumPy and safetensors alone; `recipe` and `train` import the rest
when they are first used.
"""

from typing import TYPE_CHECKING, Any

from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel, load

if TYPE_CHECKING:
    from tvmatch.training import recipe as recipe
    from tvmatch.training import train as train

__version__ = "0.1.0"
__all__ = ["Dual", "InputError", "TrainedModel", "__version__", "load", "recipe", "train"]


def __getattr__(name: str) -> Any:
    if name in ("recipe", "train"):
        from tvmatch import training

        return getattr(training, name)
    raise AttributeError(f"module 'tvmatch' has no attribute {name!r}")
