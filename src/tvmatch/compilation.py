"""Check that `torch.compile` computes the same as eager execution.

A bug in PyTorch's compiler can make compiled training silently wrong: PyTorch 2.11 lost the gradients of
`dual.rms_norm`, although values and losses were correct. The rules with a custom backward are therefore
compiled in one small graph, and all outputs and gradients are compared with eager execution.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tvmatch import attention, dual
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.seeds import generator

# The relative error of a wrong gradient is about 1; rounding errors are at most 1e-3, also with TF32.
WRONG = 1e-2
# The whole compiler except code generation, which takes a minute on a CPU: tracing, differentiating and
# splitting the graph, where functions with a custom backward are transformed.
BACKEND = "aot_eager"


class Case(NamedTuple):
    """A rule, and the shapes of each operand's value and tangent; None for an absent tensor."""

    rule: Callable[..., Dual]
    shapes: tuple[tuple[int, ...] | None, ...]


def _attention(q: Dual, k: Dual, v: Dual) -> Dual:
    return attention.attention(q, k, v)


_ROWS, _ROW, _HEADS = (2, 3, 16), (2, 1, 16), (1, 2, 8, 16)
CASES: dict[str, Case] = {
    "gelu": Case(dual.gelu, (_ROWS, _ROWS)),
    "rms_norm": Case(dual.rms_norm, (_ROWS, _ROWS)),
    "rms_norm, scaled": Case(lambda x, scale: dual.rms_norm(x, scale=scale), (_ROWS, _ROWS, (16,), None)),
    "rms_norm, modulated": Case(
        lambda x, scale, shift: dual.rms_norm(x, scale=scale, shift=shift),
        (_ROWS, _ROWS, _ROW, _ROW, _ROW, _ROW),
    ),
    "rms_norm of a constant, modulated": Case(
        lambda x, scale, shift: dual.rms_norm(x, scale=scale, shift=shift),
        (_ROWS, None, _ROW, _ROW, _ROW, _ROW),
    ),
    "layer_norm": Case(dual.layer_norm, (_ROWS, _ROWS)),
    "layer_norm, modulated": Case(
        lambda x, scale, shift: dual.layer_norm(x, scale=scale, shift=shift),
        (_ROWS, _ROWS, _ROW, _ROW, _ROW, _ROW),
    ),
    "attention": Case(_attention, (_HEADS,) * 6),
}


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for the device, or None; for a CPU, PyTorch needs a C++ compiler."""
    names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"), "cl"]
    if device.type != "cpu" or any(shutil.which(name) for name in names):
        return None
    return (
        "compiling for a CPU needs a C++ compiler, and none was found; install g++ or clang++, or set the "
        "environment variable CXX"
    )


def errors(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, float]]:
    """Compute the relative error of value, tangent and all gradients of each case, compiled against eager.

    Args:
        device: of the tensors.
        dtype: float32 or float64.

    Returns:
        ‖compiled − eager‖ / ‖eager‖ by case and part; infinite if it is NaN or shapes differ.
    """
    inputs = {name: _draw(case, name, device, dtype) for name, case in CASES.items()}

    def outputs(inputs: dict[str, list[Tensor | None]]) -> dict[str, Dual]:
        results = {}
        for name, case in CASES.items():
            pairs = zip(inputs[name][::2], inputs[name][1::2], strict=True)
            results[name] = case.rule(*(Dual(*pair) for pair in pairs))  # type: ignore[arg-type]
        return results

    eager = _parts(outputs(inputs), inputs)
    compiled = _parts(torch.compile(outputs, fullgraph=True, dynamic=False, backend=BACKEND)(inputs), inputs)
    return {
        name: {part: _relative(compiled[name][part], exact) for part, exact in parts.items()}
        for name, parts in eager.items()
    }


def _draw(case: Case, name: str, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    random = generator(0, "compilation", name)
    return [
        None
        if shape is None
        else torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
        .to(device, dtype)
        .requires_grad_()
        for shape in case.shapes
    ]


def _parts(outputs: dict[str, Dual], inputs: dict[str, list[Tensor | None]]) -> dict[str, dict[str, Tensor]]:
    """The outputs, and the gradients of their scalar product with fixed weights, by name."""
    flat = [part for output in outputs.values() for part in output if part is not None]
    leaves = [x for name in inputs for x in inputs[name] if x is not None]
    weights = [
        torch.arange(y.numel(), device=y.device, dtype=y.dtype).add(place).cos().view(y.shape)
        for place, y in enumerate(flat)
    ]
    gradients = iter(torch.autograd.grad(flat, leaves, weights, materialize_grads=True))
    found: dict[str, dict[str, Tensor]] = {}
    for name, (value, tangent) in outputs.items():
        assert tangent is not None
        found[name] = {"value": value.detach(), "tangent": tangent.detach()}
        for place, x in enumerate(inputs[name]):
            if x is not None:
                found[name][f"gradient of input {place // 2 + 1}{', tangent' * (place % 2)}"] = next(
                    gradients
                )
    return found


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    error = float((actual - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def require_right_compilation(device: torch.device) -> None:
    """Compare the rules, compiled, with eager execution; this takes a few seconds.

    Raises:
        InputError: if a compiled function is wrong, naming it and PyTorch's version.
    """
    wrong = [
        f"{name} ({part} off by {error:.1g} of its size)"
        for name, parts in errors(device).items()
        for part, error in [max(parts.items(), key=lambda item: item[1])]
        if not error <= WRONG
    ]
    if wrong:
        raise InputError(
            "training.compile",
            f"what PyTorch {torch.__version__} compiles for {device.type} differs from "
            f"eager execution: {'; '.join(wrong)}; train without it, or with another PyTorch",
        )
