"""Networks F_θ(x, t, s, c, w) that carry a tangent."""

from tvmatch.models.dit import PRESETS, DiT, DiTConfig
from tvmatch.models.mlp import MLP, MLPConfig
from tvmatch.models.wrapper import JVPNetwork

__all__ = ["MLP", "PRESETS", "DiT", "DiTConfig", "JVPNetwork", "MLPConfig"]
