"""The guard before compiled training: a function that is wrong when it is compiled stops the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tvmatch import compilation, dual
from tvmatch.compilation import Case, require_right_compilation
from tvmatch.config import recipe
from tvmatch.data.digits import digits
from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.models import DiTConfig
from tvmatch.training import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch.compiler.reset()


class _Wrong(torch.autograd.Function):
    """The identity, whose backward does what a fault of the compiler would."""

    @staticmethod
    def forward(x: Tensor, gradient: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.gradient = inputs[1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * cotangents[0], None


def wrong_gradient(x: Dual) -> Dual:
    """None of its gradient is left when it is compiled; the value is right."""
    return dual.linear_map(lambda y: _Wrong.apply(y, 0.0 if torch.compiler.is_compiling() else 1.0), x)


def wrong_value(x: Dual) -> Dual:
    return dual.linear_map(lambda y: 1.1 * y if torch.compiler.is_compiling() else y, x)


def not_finite(x: Dual) -> Dual:
    return dual.linear_map(lambda y: y / 0 if torch.compiler.is_compiling() else y, x)


def right(x: Dual) -> Dual:
    return dual.linear_map(torch.sin, x)


def cases(**rules: Any) -> dict[str, Case]:
    return {name: Case(rule, ((2, 3), (2, 3))) for name, rule in rules.items()}


def test_the_rules_are_right_when_they_are_compiled() -> None:
    """On the PyTorch that runs this test: a few roundings of float64, of every output and gradient."""
    found = compilation.errors(CPU, torch.float64)
    assert found.keys() == compilation.CASES.keys()
    for name, parts in found.items():
        inputs = sum(shape is not None for shape in compilation.CASES[name].shapes)
        assert len(parts) == 2 + inputs
        assert max(parts.values()) < 1e-14, name


@pytest.mark.parametrize("rule", [wrong_gradient, wrong_value, not_finite])
def test_a_function_that_is_wrong_is_named(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "CASES", cases(right=right, spoiled=rule))
    message = rf"^training\.compile: what PyTorch {torch.__version__.split('+')[0]}.* differs .*: spoiled \("
    with pytest.raises(InputError, match=message) as caught:
        require_right_compilation(CPU)
    assert "right (" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_stops_before_its_first_step(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "CASES", cases(spoiled=wrong_gradient))
    config = recipe("digits")
    config.training.compile = compiled
    config.network = DiTConfig(hidden_size=16, depth=1, heads=2, patch_size=2, time_frequencies=8)

    def start() -> Trainer:
        return Trainer(config, digits("train"), tmp_path / "run", device="cpu")

    if compiled:
        with pytest.raises(InputError, match=r"training\.compile: .*spoiled"):
            start()
    else:
        start()


def test_what_is_compared_is_drawn_on_the_cpu() -> None:
    """Also where the user's tensors are made elsewhere."""
    with torch.device("meta"):
        inputs = compilation._draw(compilation.CASES["gelu"], "gelu", torch.device("cpu"), torch.float32)
    assert all(x is not None and x.device.type == "cpu" for x in inputs)
