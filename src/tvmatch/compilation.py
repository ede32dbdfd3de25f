"""Whether `torch.compile` computes here what eager execution computes.

PyTorch 2.11 lost the gradients of `dual.rms_norm` under compilation, without a word: values and losses were
right, and every compiled training was wrong. What such a fault can hit are the rules that have a backward of
their own. They are compiled once, small, in one graph, and each output and gradient is compared.
"""

import hashlib
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tvmatch import attention, dual
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.seeds import generator
from tvmatch.storage.files import replacing

# A gradient that is lost or taken from elsewhere is off by about its own size. Rounding leaves 1e-3 at most,
# that of TF32 included.
WRONG = 1e-2
# The whole of the compiler but code generation, which alone takes a minute on a CPU: tracing, and deriving
# and splitting the graph of both passes, where functions with a backward of their own are taken apart.
BACKEND = "aot_eager"


class Case(NamedTuple):
    """A rule, and the shapes of its tensors: each operand's value and tangent; None: there is none."""

    rule: Callable[..., Dual]
    shapes: tuple[tuple[int, ...] | None, ...]


def _attention(q: Dual, k: Dual, v: Dual) -> Dual:
    """By whatever serves tangents on the device."""
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
    """Why nothing can be compiled for the device, or None: for a CPU, PyTorch's compiler writes C++."""
    names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"), "cl"]
    if device.type != "cpu" or any(shutil.which(name) for name in names):
        return None
    return (
        "compiling for a CPU needs a C++ compiler, and none was found; install g++ or clang++ (the "
        "environment variable CXX can name it)"
    )


def errors(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, float]]:
    """For each case, the relative error of value, tangent and every gradient, compiled against eager.

    Args:
        device: where to compute.
        dtype: float32 or float64.

    Returns:
        By case and part, ‖compiled − eager‖ / ‖eager‖; NaN, or a shape that differs, is infinite.
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
    """The outputs, and the gradients of ⟨cosines, outputs⟩, by name; all in one backward pass."""
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
    """Compare, once for every build of PyTorch, source of tvmatch and kind of device; takes some seconds.

    That it was right is remembered in `$XDG_CACHE_HOME/tvmatch` (by default `~/.cache/tvmatch`), if that can
    be written.

    Raises:
        InputError: if a function is wrong when it is compiled, naming it and PyTorch's version.
    """
    remembered = _cache_folder() / "compilation" / _fingerprint(device)
    if remembered.is_file():
        return
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
    try:
        with replacing(remembered) as unfinished:
            unfinished.write_text(f"PyTorch {torch.__version__}, {device.type}\n", encoding="utf-8")
    except OSError:
        pass  # it is compared again


def _cache_folder() -> Path:
    """As the XDG base directory specification has it: a relative path does not count."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "tvmatch"


def _fingerprint(device: torch.device) -> str:
    """Of all that decides whether the compiled functions are right."""
    digest = hashlib.sha256()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    for fact in (torch.__version__, torch.version.git_version, sys.version, device.type, hardware):
        digest.update(f"{fact}\n".encode())
    package = Path(__file__).parent
    for file in sorted([*package.glob("*.py"), *package.glob("attention/**/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
