"""What PyTorch's compiler makes of the rules with a backward of their own, beside eager execution."""

import torch

from tvmatch import compilation
from tvmatch.check.comparison import Comparison, Setting, failure

# Roundings of the precision: few numbers, so few operations, in another order.
ALLOWED = 64


def check_compilation(setting: Setting) -> list[Comparison]:
    """Value, tangent and gradients of each rule, compiled and eager, in the precision of a network's weights.

    None where nothing can be compiled, see `compilation.obstacle`.

    Args:
        setting: device and precision.
    """
    if compilation.obstacle(setting.device) is not None:
        return []
    dtype = setting.weights_dtype
    try:
        found = compilation.errors(setting.device, dtype)
    except Exception as error:  # whatever it is, it is the finding
        return [failure("compilation", "the rules with a backward of their own", error)]
    allowed = ALLOWED * torch.finfo(dtype).eps
    return [
        Comparison("compilation", name, part, error, allowed)
        for name, parts in found.items()
        for part, error in parts.items()
    ]
