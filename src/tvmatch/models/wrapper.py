"""Any network of one's own behind the interface of the DiT, through `torch.func.jvp`."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tvmatch.attention import repair_forward_mode
from tvmatch.dual import Dual, as_dual


class JVPNetwork(nn.Module):
    """Gives `module(x, t, s, …)` the Dual interface that the objective needs.

    Where an input carries a tangent, the tangent of the output is `torch.func.jvp` of the module; without one
    the module is simply called. Reverse mode through the tangent works for every module made of operators
    that have a forward-mode rule, and for PyTorch's attention and layer norm, whose rules are missing or
    wrong: they are replaced for the time of the call, see `attention.repair_forward_mode`. PyTorch raises for
    other operators that lack a rule, except for those registered with `torch.library`, whose tangent would
    silently be zero.

    Args:
        module: a callable of (x, t, s) and, if its `forward` names them, `labels` and `guidance_weight`.
            `labels=None` means the dropped label for all, `guidance_weight=None` means 1. A module without
            `guidance_weight` is not told w, which is right where it is trained at one constant.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        uncompiled = getattr(module, "_orig_mod", module)  # torch.compile hides the arguments
        parameters = inspect.signature(uncompiled.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.accepted = {name for name in ("labels", "guidance_weight") if takes_any or name in parameters}

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual:
        """F of x's shape, a `Dual` if x, t or s is one; see `DiT.forward`.

        Raises:
            TypeError: if labels are given and the module's `forward` has no such argument.
        """
        if labels is not None and "labels" not in self.accepted:
            raise TypeError(f"labels: {type(self.module).__name__}.forward has no argument of this name")
        given = {"labels": labels, "guidance_weight": guidance_weight}
        extras: dict[str, Any] = {name: given[name] for name in self.accepted}
        arguments = [as_dual(argument) for argument in (x, t, s)]
        # torch.func.jvp refuses tensors that share memory with themselves, such as an expanded time.
        values = tuple(argument.value.contiguous() for argument in arguments)
        if all(argument.tangent is None for argument in arguments):
            output = self.module(*values, **extras)
            has_dual = any(isinstance(argument, Dual) for argument in (x, t, s))
            return Dual(output) if has_dual else output
        tangents = tuple(
            torch.zeros_like(value) if argument.tangent is None else argument.tangent.contiguous()
            for value, argument in zip(values, arguments, strict=True)
        )
        with repair_forward_mode():
            result = torch.func.jvp(lambda *inputs: self.module(*inputs, **extras), values, tangents)
        return Dual(result[0], result[1])
