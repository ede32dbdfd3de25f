"""Compare rules with a custom backward, compiled by `torch.compile`, with eager execution."""

import torch

from tvmatch import compilation
from tvmatch.check.comparison import Comparison, Setting, failure

# Tolerance in units of the machine epsilon: the cases are small, and only the order of operations differs.
ALLOWED = 64


def check_compilation(setting: Setting) -> list[Comparison]:
    """Check value, tangent and gradients of each rule, in the dtype of a network's weights.

    Args:
        setting: device and precision.

    Returns:
        The comparisons; empty if nothing can be compiled (see `compilation.obstacle`).
    """
    if compilation.obstacle(setting.device) is not None:
        return []
    dtype = setting.weights_dtype
    try:
        found = compilation.errors(setting.device, dtype)
    except Exception as error:  # any exception is reported as a failed comparison
        return [failure("compilation", "the rules with a custom backward", error)]
    allowed = ALLOWED * torch.finfo(dtype).eps
    return [
        Comparison("compilation", name, part, error, allowed)
        for name, parts in found.items()
        for part, error in parts.items()
    ]
