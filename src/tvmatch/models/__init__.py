"""Networks F_θ(x, t, s, c, w) with Jacobian-vector products."""

from tvmatch.models.base import Addition, AttentionShape, BaseNetwork
from tvmatch.models.dit import PRESETS, DiT, DiTConfig
from tvmatch.models.mlp import MLP, MLPConfig
from tvmatch.models.registry import (
    build_network,
    config_class_of,
    kind_of,
    network_class_of,
    network_kinds,
    register_network,
)
from tvmatch.models.wrapper import JVPNetwork

__all__ = [
    "MLP",
    "PRESETS",
    "Addition",
    "AttentionShape",
    "BaseNetwork",
    "DiT",
    "DiTConfig",
    "JVPNetwork",
    "MLPConfig",
    "build_network",
    "config_class_of",
    "kind_of",
    "network_class_of",
    "network_kinds",
    "register_network",
]
