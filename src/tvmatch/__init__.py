"""Terminal Velocity Matching: one- and few-step generative models (arXiv 2511.19797).

`load` and `TrainedModel` need only PyTorch, NumPy and safetensors; the others import further packages when
they are first used.
"""

from typing import TYPE_CHECKING, Any

from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel, load

if TYPE_CHECKING:
    from tvmatch.config import recipe as recipe
    from tvmatch.interop.hub import from_pretrained as from_pretrained
    from tvmatch.interop.hub import push_to_hub as push_to_hub
    from tvmatch.training import train as train

__version__ = "0.1.0"
__all__ = [
    "Dual",
    "InputError",
    "TrainedModel",
    "__version__",
    "from_pretrained",
    "load",
    "push_to_hub",
    "recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("from_pretrained", "push_to_hub"):
        from tvmatch.interop import hub

        return getattr(hub, name)
    if name == "recipe":
        from tvmatch import config

        return config.recipe
    if name == "train":
        from tvmatch import training

        return training.train
    raise AttributeError(f"module 'tvmatch' has no attribute {name!r}")
