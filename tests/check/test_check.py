"""`tvmatch check`: what is sound passes in every precision, faults put in on purpose are found and named."""

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY_MLP, environment, images, tiny_config
from torch import Tensor

from tvmatch import compilation, dual
from tvmatch.attention import dispatch
from tvmatch.check import Comparison, Setting, check_network, random_model
from tvmatch.check import attention as attention_checks
from tvmatch.check.comparison import perturbed, relative_error, tolerance
from tvmatch.cli import main
from tvmatch.data.densities import Density
from tvmatch.dual import Dual
from tvmatch.training import Trainer

CPU = torch.device("cpu")
COMPILED_ONCE = functools.cache(compilation.errors)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of a table is wrapped; no kernel is interpreted, which takes half a minute (but see below).

    Nothing is compiled twice either: that it is compared is the matter of one test below.
    """
    monkeypatch.setattr(compilation, "errors", COMPILED_ONCE)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(attention_checks, "backends", lambda setting: ("reference",))


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code of a check, and what it prints."""
    capsys.readouterr()
    code = main(["check", "--device=cpu", *arguments])
    return code, capsys.readouterr().out.splitlines()


def off(capsys: pytest.CaptureFixture[str], *arguments: str) -> set[str]:
    """The checks that a failing run names in its last line; each has its row in the table."""
    code, lines = report(capsys, *arguments)
    assert code == 1
    numbers, _, names = lines[-1].partition(" are off: ")
    named = names.split("; ")
    assert numbers.split(" of ")[0] == str(len(named))
    for name in named:
        words = name.partition(": ")[2].partition(" (")[0]
        assert any(line.strip().startswith(words) and line.endswith("OFF ") for line in lines), (words, lines)
    return set(named)


# What is right passes


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float64"])
def test_a_sound_machine(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report(capsys, f"--dtype={dtype}")
    assert code == 0, lines
    assert lines[0].endswith("float32" if dtype == "auto" else dtype)
    assert lines[1].startswith("network: tiny/2 with random weights, ")
    assert lines[-1] == "all 23 checks passed"
    rows = [line for line in lines if line.endswith("ok ")]
    assert len(rows) == 23
    assert [row.split()[0] for row in rows[-12:-8]] == ["F", "∂_s", "gradient", "its"]
    assert lines.index(next(line for line in lines if line.strip() == "compilation")) > 15
    # Were the tolerances lax, nothing would be off: rounding each number once costs a few roundings.
    setting = Setting(CPU, torch.float32 if dtype == "auto" else getattr(torch, dtype))
    allowed = [float(row.split()[-2]) for row in rows if "by differences" not in row]
    assert max(allowed) < 20 * setting.allowance * setting.unit_roundoff


def test_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's own weights, classes and guidance; a network of points has no attention of its own."""
    config = tiny_config(16)
    config.objective.guidance_weight = (1.5, 3.0)
    Trainer(config, images(), tmp_path / "run").run()
    code, lines = report(capsys, f"--model={tmp_path / 'run'}")
    assert code == 0, lines
    assert lines[1].startswith(f"network: {tmp_path / 'run'}, ")
    assert any("the network's own, 4 × 4 " in line for line in lines)

    config = tiny_config(16)
    config.network = TINY_MLP
    Trainer(config, Density("moons"), tmp_path / "points").run()
    code, lines = report(capsys, f"--model={tmp_path / 'points'}", "--dtype=bfloat16")
    assert (code, lines[-1]) == (0, "all 22 checks passed")


def test_the_fused_kernels_in_the_interpreter() -> None:
    """On a CPU they are checked beside the reference if Triton interprets them."""
    program = (
        "import sys; from tvmatch.check import attention; from tvmatch.cli import main;"
        "attention.CASES = (attention.Case('small', 5, 7, 8), attention.Case('none', 5, 7, 8, tangents=''));"
        "sys.exit(main(['check', '--device=cpu']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    for backend in ("reference", "triton"):  # these two and the network's own
        assert sum(f" {backend} " in line for line in lines) == 3
    assert lines[-1] == "all 19 checks passed"


def test_the_model_stays_as_it_is() -> None:
    model = random_model("tiny/2")
    model.network.requires_grad_(False)
    before = {name: x.clone() for name, x in model.network.state_dict().items()}
    check_network(model, Setting(CPU, torch.float32))
    for name, x in model.network.state_dict().items():
        assert torch.equal(x, before[name])
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


# What is wrong does not

WITH_TANGENT = {
    f"attention: {name} (reference)"
    for name in (
        "self-attention",
        "cross-attention, ragged",
        "head width 72",
        "causal",
        "key lengths, one of them 0",
        "tangents of q and k",
        "tangent of v",
        "under torch.func.jvp",
        "the network's own, 16 × 32",
    )
}
DERIVATIVE = "network: ∂_s F, by differences"


def spoil_attention(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor | None]) -> None:
    """Every tangent that the reference returns goes through `fault`."""
    whole = dispatch.attention_reference

    def spoiled(*arguments: Any, **options: Any) -> Dual:
        value, tangent = whole(*arguments, **options)
        return Dual(value, None if tangent is None else fault(tangent))

    monkeypatch.setattr(dispatch, "attention_reference", spoiled)


FAULTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "dropped": lambda tangent: None,
    "zero": torch.zeros_like,
    "a constant": lambda tangent: tangent.detach(),
    "of the other sign": torch.neg,
    "too large by 5 %": lambda tangent: 1.05 * tangent,
    "not a number in one place": lambda tangent: torch.where(
        torch.arange(tangent.numel()).view_as(tangent) == 7, math.nan, tangent
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_tangent_of_attention(
    fault: str, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_attention(monkeypatch, FAULTS[fault])
    found = off(capsys, f"--dtype={dtype}")
    assert found >= WITH_TANGENT
    assert not any("no tangent" in name for name in found)
    if fault == "a constant":  # ∂_s F is right, only nothing goes through it
        assert "network: its float64, by differences" in found
        assert DERIVATIVE not in found
    elif dtype == "float32":  # in bfloat16, attention's small part in ∂_s F may drown in the rest's rounding
        assert DERIVATIVE in found


def scaled(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A rule of `dual` whose tangent is too large by one part in a thousand."""
    rule = getattr(dual, name)

    def spoiled(*arguments: Any, **options: Any) -> Dual:
        value, tangent = rule(*arguments, **options)
        return Dual(value, None if tangent is None else 1.001 * tangent)

    return lambda monkeypatch: monkeypatch.setattr(dual, name, spoiled)


@pytest.mark.parametrize("rule", ["silu", "gelu", "rms_norm", "linear", "add_product"])
def test_a_wrong_rule(rule: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences tell, though the float64 copy has the same fault."""
    scaled(rule)(monkeypatch)
    found = off(capsys)
    assert DERIVATIVE in found
    assert not any(name.startswith("attention") for name in found)


def test_a_wrong_backward(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that forgets the value's second derivative: every value and tangent stays right."""
    gelu = dual.gelu

    def forgetful(x: Dual) -> Dual:
        return Dual(gelu(x).value, gelu(Dual(x.value.detach(), x.tangent)).tangent)

    monkeypatch.setattr(dual, "gelu", forgetful)
    assert off(capsys) == {"network: its float64, by differences"}


def test_a_fault_of_one_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broken kernel would have it: float64 is right, float32 is not."""
    silu = dual.silu

    def spoiled(x: Dual) -> Dual:
        return dual.linear_map(lambda y: 1.001 * y if y.dtype == torch.float32 else y, silu(x))

    monkeypatch.setattr(dual, "silu", spoiled)
    assert off(capsys) == {"network: F", DERIVATIVE, "network: gradient of the loss"}
    assert report(capsys, "--dtype=float64")[0] == 0


def test_an_exception_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Dual:
        raise RuntimeError("no kernel [image] is there\nand more")

    monkeypatch.setattr(dispatch, "attention_reference", broken)
    code, lines = report(capsys)
    assert code == 1
    assert any("RuntimeError: no kernel [image] is there  " in line for line in lines)
    assert "network: F and its derivatives" in lines[-1]


def test_a_fault_of_compilation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with the part that is off, though values, tangents and losses are right."""

    def spoiled(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
        found = {name: dict(parts) for name, parts in COMPILED_ONCE(device, dtype).items()}
        found["rms_norm"]["gradient of input 1"] = 1.0
        return found

    monkeypatch.setattr(compilation, "errors", spoiled)
    assert off(capsys) == {"compilation: rms_norm"}


def test_no_compiler_is_no_fault(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    code, lines = report(capsys)
    assert (code, lines[-1]) == (0, "all 15 checks passed")
    assert any(line.startswith("compilation is not compared: compiling for a CPU needs") for line in lines)


# Parts


def test_relative_error() -> None:
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_error([y], [x]) == pytest.approx(0.1)
    assert relative_error([x, y], [x, x]) == pytest.approx(0.1 / math.sqrt(2))
    assert relative_error([x], [x]) == 0
    assert relative_error([x], [torch.zeros(2)]) == math.inf
    assert relative_error([x], [torch.zeros(3)]) == math.inf
    assert relative_error([x], []) == math.inf
    assert math.isnan(relative_error([x * math.nan], [x]))
    assert relative_error([x], [x * math.nan]) == math.inf


@pytest.mark.parametrize(
    ("error", "allowed", "passed"),
    [
        (0.1, 0.2, True),
        (0.2, 0.2, True),
        (0.3, 0.2, False),
        (math.nan, 0.2, False),
        (0.1, math.nan, False),
        (math.inf, math.inf, False),
        (0.1, 0.9, False),  # a tolerance that would let a wrong sign pass is none
    ],
)
def test_passed(error: float, allowed: float, passed: bool) -> None:
    assert Comparison("attention", "causal", "value", error, allowed).passed is passed


def test_tolerance_follows_the_measured_change() -> None:
    setting = Setting(CPU, torch.bfloat16)
    exact = torch.ones(1000, dtype=torch.float64)
    assert tolerance(setting, [1.25 * exact], [exact]) == 1.0
    assert tolerance(setting, [exact], [exact]) == 4 * 2.0**-8  # rounding the answer itself
    assert math.isnan(tolerance(setting, [exact * math.nan], [exact]))
    random = torch.Generator().manual_seed(0)
    change = perturbed(exact, 0.1, random) - exact
    assert 0.09 < change.abs().max() <= 0.1
    assert abs(change.mean()) < 0.01  # five standard deviations are 0.009


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype=int8"], "dtype: must be one of auto, float32, bfloat16, float16, float64, got 'int8'"),
        (["--device=gpu"], "device: no device is called 'gpu'"),
        (["--device=cuda:99"], "device: 'cuda:99' cannot be used"),
        (
            ["--model=XL/3"],
            "model: XL/3: no such file or folder; take a run folder, a checkpoint, or tiny/2, m",
        ),
        (["--model="], "model: "),
        (["--precision=float32"], "--precision: no such option"),
        (["run"], "unrecognized arguments: run"),
    ],
)
def test_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"tvmatch: error: {message}")
    assert output.out == ""


def test_an_untrained_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero would be compared with zero."""
    Trainer(tiny_config(1), images(), tmp_path / "run").run()
    capsys.readouterr()
    assert main(["check", "--model", str(tmp_path / "run")]) == 2
    output = capsys.readouterr()
    assert output.err == (
        "tvmatch: error: model: its ∂_s F is zero, as in an untrained network: nothing to compare\n"
    )
    assert output.out == ""
