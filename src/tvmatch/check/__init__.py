"""Check attention, networks and compilation on a device and in a precision."""

from tvmatch.check.attention import check_attention, obstacle_to_kernels, own_case
from tvmatch.check.comparison import Comparison, Setting
from tvmatch.check.compilation import check_compilation
from tvmatch.check.network import check_network, random_model

__all__ = [
    "Comparison",
    "Setting",
    "check_attention",
    "check_compilation",
    "check_network",
    "obstacle_to_kernels",
    "own_case",
    "random_model",
]
