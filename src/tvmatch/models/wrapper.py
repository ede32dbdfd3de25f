"""`JVPNetwork`: any network behind the interface of the DiT, through `torch.func.jvp`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tvmatch.attention import repair_forward_mode
from tvmatch.dual import Dual, as_dual
from tvmatch.errors import InputError

# Class names: not all of these classes exist if PyTorch was built without `torch.distributed`.
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_OPTIONAL = ("labels", "guidance_weight", "embeddings", "mask")


class JVPNetwork(nn.Module):
    """Gives `module(x, t, s, …)` the `Dual` interface that the objectives need.

    If an input carries a tangent, the tangent of the output is computed by `torch.func.jvp`; otherwise the
    module is called directly. It gets copies of its inputs. During a call with a tangent, PyTorch functions
    whose forward mode is missing or wrong are replaced (attention, layer and group norm) or refused (batch
    norm in training, `linalg.solve`, `det`, `torch.utils.checkpoint`, operators registered with
    `torch.library`, …), so that value, tangent and gradients through the tangent are correct, or an error is
    raised. `attention.repair_forward_mode` has the list, and what cannot be detected.

    Args:
        module: a callable of (x, t, s) and, if its `forward` has arguments of these names, `labels`,
            `guidance_weight`, `embeddings` and `mask`. `labels=None` drops all labels, `guidance_weight=None`
            means 1. A module without `guidance_weight` does not get w, which is correct if it is trained at
            one constant w. `DistributedDataParallel` must be outside of this class, not inside.
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
            NotImplementedError: with a tangent, for functions that PyTorch differentiates wrongly.
        """
        if any(isinstance(argument, Dual) and argument.tangent is not None for argument in (x, t, s)):
            self._expect_no_parallelism()
        optional = (labels, guidance_weight, embeddings, mask)
        return _call(self.module, type(self.module), self.accepted, (x, t, s), optional)

    def _expect_no_parallelism(self) -> None:
        classes = {cls.__name__ for module in _unwrapped(self.module) for cls in type(module).__mro__}
        for name in classes.intersection(_PARALLEL):
            wrapper = "fully_shard" if name == "FSDPModule" else name
            raise InputError(
                "module",
                f"torch.func.jvp does not support {wrapper}; wrap the other way round, "
                f"{wrapper}(JVPNetwork(network))",
            )


class ThroughJVP:
    """Mixin that gives a class of modules the interface of `JVPNetwork`, without changing parameter names.

    It must be the first base class.
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
        """See `JVPNetwork.forward`."""
        optional, kind = (labels, guidance_weight, embeddings, mask), type(self)
        return _call(super().forward, kind, optional_arguments(kind), (x, t, s), optional)  # type: ignore[misc]


def optional_arguments(network_class: type) -> frozenset[str]:
    """The arguments among labels, guidance_weight, embeddings and mask that the class's `forward` has."""
    classes = (cls for cls in network_class.__mro__ if cls is not ThroughJVP and "forward" in vars(cls))
    return _optional(vars(next(classes))["forward"])


def _optional(forward: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    return frozenset(name for name in _OPTIONAL if takes_any or name in names)


def _call(
    function: Callable[..., Any],
    kind: type,
    accepted: frozenset[str],
    inputs: tuple[Tensor | Dual, ...],
    optional: tuple[Tensor | None, ...],
) -> Tensor | Dual:
    """Call `function` of the class `kind`, through `torch.func.jvp` if an input has a tangent."""
    extras = {}
    for name, value in zip(_OPTIONAL, optional, strict=True):
        if name in accepted:
            extras[name] = None if value is None else value.clone()
        elif value is not None and name != "guidance_weight":  # w may be the same for all samples
            raise TypeError(f"{name}: {kind.__name__}.forward has no argument of this name")
    arguments = [as_dual(argument) for argument in inputs]
    # torch.func.jvp does not support tensors whose elements share memory, such as an expanded time.
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
    """The module, and the modules inside wrappers that pass on all arguments (`torch.compile`, DDP)."""
    found = [module]
    while True:
        kinds = {x.kind for x in inspect.signature(found[-1].forward).parameters.values()}
        inside = getattr(found[-1], "_orig_mod", None)
        if inside is None and kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            inside = getattr(found[-1], "module", None)
        if not isinstance(inside, nn.Module):
            return found
        found.append(inside)
