"""Any network of one's own behind the interface of the DiT, through `torch.func.jvp`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tvmatch.attention import repair_forward_mode
from tvmatch.dual import Dual, as_dual
from tvmatch.errors import InputError

# By the name of the class, of which two are only there where PyTorch was built with `torch.distributed`.
_PARALLEL = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "FSDPModule": "fully_shard",
}
_OPTIONAL = ("labels", "guidance_weight", "embeddings", "mask")


class JVPNetwork(nn.Module):
    """Gives `module(x, t, s, …)` the Dual interface that the objective needs.

    Where an input carries a tangent, the tangent of the output is `torch.func.jvp` of the module; without one
    the module is simply called, in either case with copies of the inputs that are its own. For the time of
    the call PyTorch's functions whose forward mode is missing or wrong are replaced (attention, layer and
    group norm) or refused (batch norm in training, `linalg.solve`, `det`, `torch.utils.checkpoint`, operators
    registered with `torch.library`, …), so that value, tangent and gradients through the tangent are right,
    or an error says what is not. `attention.repair_forward_mode` has the list, and what no one can see:
    `detach`, `.data`, NumPy.

    Args:
        module: a callable of (x, t, s) and, if its `forward` names them, `labels`, `guidance_weight`,
            `embeddings` and `mask`. `labels=None` means the dropped label for all, `guidance_weight=None`
            means 1. A module without `guidance_weight` is not told w, which is right where it is trained at
            one constant. A compiled module is called by the names of the module inside.
            `DistributedDataParallel` belongs around this class, not inside.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.accepted = _optional(_unwrapped(module)[-1].forward)

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | Dual:
        """F of x's shape, a `Dual` if x, t or s is one; see `DiT.forward`.

        Raises:
            TypeError: if labels are given and the module's `forward` has no such argument.
            InputError: with a tangent, if the module is wrapped for data parallelism.
            NotImplementedError: with a tangent, for what PyTorch gets wrong in forward mode.
        """
        extras = {
            "labels": labels,
            "guidance_weight": guidance_weight,
            "embeddings": embeddings,
            "mask": mask,
        }
        for name in ("labels", "embeddings", "mask"):
            if extras[name] is not None and name not in self.accepted:
                raise TypeError(f"{name}: {type(self.module).__name__}.forward has no argument of this name")
        if any(isinstance(argument, Dual) and argument.tangent is not None for argument in (x, t, s)):
            self._expect_no_parallelism()
        return _call(self.module, (x, t, s), {name: extras[name] for name in self.accepted})

    def _expect_no_parallelism(self) -> None:
        for module in _unwrapped(self.module):
            classes = {kind.__name__ for kind in type(module).__mro__}
            for kind, wrapper in _PARALLEL.items():
                if kind in classes:
                    raise InputError(
                        "module",
                        f"torch.func.jvp does not go through {wrapper}; wrap the other way round, "
                        f"{wrapper}(JVPNetwork(network))",
                    )


class ThroughJVP:
    """The same for a class instead of an instance: in front of a class of modules in a subclass's bases.

    Parameters keep their names, and the network stays an instance of its class.
    """

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | Dual:
        """As `JVPNetwork.forward`."""
        extras = {
            "labels": labels,
            "guidance_weight": guidance_weight,
            "embeddings": embeddings,
            "mask": mask,
        }
        accepted = optional_arguments(type(self))
        given = [name for name, value in extras.items() if value is not None and name != "guidance_weight"]
        unknown = [name for name in given if name not in accepted]
        if unknown:  # a weight that is the same for all samples need not be an input
            raise TypeError(f"{unknown[0]}: {type(self).__name__}.forward has no such argument")
        extras = {name: extras[name] for name in accepted}
        return _call(super().forward, (x, t, s), extras)  # type: ignore[misc]


def optional_arguments(network_class: type) -> frozenset[str]:
    """Which of `labels`, `guidance_weight`, `embeddings` and `mask` the class's own `forward` takes."""
    classes = (cls for cls in network_class.__mro__ if cls is not ThroughJVP and "forward" in vars(cls))
    return _optional(vars(next(classes))["forward"])


def _optional(forward: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return frozenset(name for name in _OPTIONAL if takes_any or name in names)


def _call(
    function: Callable[..., Any], inputs: tuple[Tensor | Dual, ...], extras: dict[str, Tensor | None]
) -> Tensor | Dual:
    """`function` of (x, t, s), through `torch.func.jvp` if one of them has a tangent."""
    extras = {name: None if value is None else value.clone() for name, value in extras.items()}
    arguments = [as_dual(argument) for argument in inputs]
    # torch.func.jvp refuses tensors that share memory with themselves, such as an expanded time.
    values = tuple(argument.value.clone() for argument in arguments)
    if all(argument.tangent is None for argument in arguments):
        output = function(*values, **extras)
        return Dual(output) if any(isinstance(argument, Dual) for argument in inputs) else output
    tangents = tuple(
        torch.zeros_like(value) if argument.tangent is None else argument.tangent.contiguous()
        for value, argument in zip(values, arguments, strict=True)
    )
    with repair_forward_mode():
        result = torch.func.jvp(lambda *tensors: function(*tensors, **extras), values, tangents)
    return Dual(result[0], result[1])


def _unwrapped(module: nn.Module) -> list[nn.Module]:
    """The module, and what is inside if it passes all arguments on, as `torch.compile` and DDP do."""
    found = [module]
    while True:
        kinds = {x.kind for x in inspect.signature(found[-1].forward).parameters.values()}
        inside = getattr(found[-1], "_orig_mod", None)
        if inside is None and kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            inside = getattr(found[-1], "module", None)
        if not isinstance(inside, nn.Module):
            return found
        found.append(inside)
