"""Shared by the tests of PyTorch's forward mode: derivatives, a compiler's stand-in, a watch on kernels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import jvp
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from tvmatch.attention import attention, launch, sdpa

# The same few sums of numbers of order 1, in another order; each derivative adds some roundings.
SINGLE = {"rtol": 1e-4, "atol": 2e-5}
DOUBLE = {"rtol": 1e-10, "atol": 1e-11}
# PyTorch 2.14 sees a tangent of `forward_ad` at the door of a compiled graph: it leaves the call to eager
# execution or, for one graph, refuses it itself. Older ones compile on, and the tangent would be lost.
SEES_TANGENTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
SEEN = r"input tensors that carry a forward-mode AD tangent"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def derivatives(
    function: Callable[..., Tensor], values: list[Tensor], tangents: list[Tensor]
) -> tuple[Tensor, ...]:
    """Value, tangent, and the gradients of a function of both by all inputs and their tangents."""
    inputs = [x.detach().clone().requires_grad_() for x in [*values, *tangents]]
    value, tangent = jvp(function, tuple(inputs[: len(values)]), tuple(inputs[len(values) :]))
    loss = (value * tangent).sin().sum() + (value - 2 * tangent).cos().sum()
    return value, tangent, *torch.autograd.grad(loss, inputs)


def through_level(function: Callable[..., Tensor], values: list[Tensor], tangents: list[Tensor]) -> Any:
    """Value and tangent by `forward_ad.dual_level`."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(values, tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(function(*duals)))


def without_tangents(graph: torch.fx.GraphModule, _: Any) -> Any:
    """Stands for compiled code, which computes on memory: the tangents of a graph's inputs are lost."""

    def run(*inputs: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(False):
            return graph(*inputs)

    return make_boxed_func(run)


compiler = partial(torch.compile, backend=aot_autograd(fw_compiler=without_tangents))


def force_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "auto" leaves a CPU to the reference. Returns a list that grows with each kernel that runs."""
    seen: list[str] = []

    def note(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: (seen.append(name), run(*arguments, **options))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, name, note(name, getattr(launch, name)))
    monkeypatch.setattr(sdpa, "attention", partial(attention, backend="triton"))
    return seen
