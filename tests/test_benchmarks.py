"""The benchmarks themselves, on tiny inputs: what they count, compare and write down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tvmatch.attention import attention_reference
from tvmatch.dual import Dual, as_dual

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import attention  # noqa: E402
import attention_contenders  # noqa: E402
import attention_report  # noqa: E402
import common  # noqa: E402
import tile_sweep  # noqa: E402
from attention_contenders import Contender  # noqa: E402
from attention_report import LONG, OURS, Row  # noqa: E402

CPU = torch.device("cpu")


# --- counting ------------------------------------------------------------------------------------------


def test_forward_flops_are_those_of_the_six_products() -> None:
    shape = (2, 3, 16, 8)
    q, k, v = (Dual(torch.randn(shape), torch.randn(shape)) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        attention_reference(q, k, v)
    assert Contender("", lambda x: ()).forward_flops(shape) == counter.get_total_flops()


def test_flops_of_the_value_alone_are_those_that_pytorch_counts() -> None:
    shape = (2, 3, 16, 8)
    way = Contender("", lambda x: (), tangent=False)
    assert way.forward_flops(shape) == sdpa_flop_count(shape, shape, shape)
    assert way.backward_flops(shape) == sdpa_backward_flop_count(shape, shape, shape, shape)


def test_the_joint_backward_counts_fifteen_products() -> None:
    assert Contender("", lambda x: ()).backward_flops((1, 24, 32768, 128)) == 15 * 2 * 24 * 32768**2 * 128


def test_square_matrices_that_cannot_fit_are_not_tried() -> None:
    math = Contender("math", lambda x: (), square_buffers=10)
    assert "480 GiB" in attention.does_not_fit(math, LONG, torch.bfloat16, CPU)
    assert not attention.does_not_fit(math, (1, 2, 64, 64), torch.bfloat16, CPU)
    assert not attention.does_not_fit(Contender(OURS, lambda x: ()), LONG, torch.bfloat16, CPU)


# --- timing --------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_every_call_is_prepared() -> None:
    calls: list[str] = []

    def work(name: str) -> common.Work:
        def prepare() -> str:
            calls.append(f"prepare {name}")
            return name

        return common.Work(calls.append, prepare)

    timings = common.time_together({"a": work("a"), "b": work("b")}, CPU, warm_up=1, least=3, most=3)
    assert calls[-12:] == ["prepare a", "a", "prepare b", "b"] * 3
    assert [timing.calls for timing in timings.values()] == [3, 3]


def test_a_timing_is_the_median_with_its_quartiles() -> None:
    assert common._timing([5.0, 1.0, 2.0, 100.0, 3.0]) == (3.0, 2.0, 5.0, 5)


def test_a_buffer_is_overwritten_until_the_host_has_queued_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """Any two are a millisecond apart."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, _: "Event") -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    scrub = torch.ones(4)
    assert common._sweeps(0.01, scrub) == 1 + 15  # 1.5 times 10 ms
    assert common._sweeps(9.0, scrub) == 1 + 50  # at most 50 ms
    assert common._measure_cuda(common.Work(lambda x: x, lambda: 1), scrub, 3) == 1e-3


def test_a_gpu_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        common.options("").parse_args(["--device", "cuda:1"])
    assert "cuda:1: PyTorch sees no GPU here" in capsys.readouterr().err


# --- the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tangent", [True, False])
def test_float64_results_by_blocks_of_rows_are_those_in_one(
    tangent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 2, 40, 4)
    x, cotangents = attention.make_inputs(shape, torch.float32, CPU)
    leaves = [a.detach().double().requires_grad_() for a in x[: 6 if tangent else 3]]
    output = attention_reference(*(Dual(leaves[i], leaves[i + 3] if tangent else None) for i in range(3)))
    outputs = [a for a in output if a is not None]
    given = [a.double() for a in cotangents[: len(outputs)]]
    expected = [*outputs, *torch.autograd.grad(outputs, leaves, given)]

    monkeypatch.setattr(attention_contenders, "BLOCK_ELEMENTS", 1)  # blocks of 16, 16 and 8 rows
    actual = attention_contenders.float64_results(x, cotangents, tangent)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64 sums in another order


def test_an_error_that_is_not_a_number_is_infinite() -> None:
    x = torch.ones(3)
    assert attention_contenders.relative_error(x * float("nan"), x.double()) == float("inf")
    assert attention_contenders.relative_error(x * 1.5, x.double()) == pytest.approx(0.5)


# --- verdicts and files --------------------------------------------------------------------------------


def test_verdicts_compare_with_the_targets_and_with_right_results_alone() -> None:
    dit = attention_report.DIT_SHAPES[0]
    math = attention_report.MATH
    rows = [
        Row(LONG, OURS, forward_ms=99.0, backward_ms=401.0, memory=12 * 192.0, error_value=1e-3),
        Row(dit, OURS, forward_ms=1.0, backward_ms=2.0, error_value=1e-3),
        Row(dit, f"{math}, eager", forward_ms=3.5, backward_ms=5.0, error_value=1e-3),
        Row(dit, f"{math}, compiled", forward_ms=0.1, backward_ms=0.1, error_value=1.0),
    ]
    found = {v.target: v for v in attention_report.verdicts(rows, itemsize=2) if v.met is not None}
    assert [(v.measured, v.met) for v in found.values()] == [
        (99.0, True),
        (401.0, False),
        (3.5, True),
        (2.5, False),
        (12.0, True),  # 192 MiB is one tensor of 24 × 32768 × 128 numbers of 2 bytes
    ]


def test_results_are_written_under_a_safe_name(tmp_path: Path) -> None:
    assert common.safe_name("NVIDIA H200 / MIG 1g.18gb") == "NVIDIA_H200_MIG_1g.18gb"
    assert common.safe_name("../..") == "unknown"
    folder = common.results_folder(CPU, tmp_path / "new" / "folder")
    facts = common.record(CPU) | {"dtype": "float32"}
    common.write_results(folder, "x", facts, {"rows": [1.5]}, "| a |", lambda figure: figure.add_subplot())
    written = json.loads((folder / "x.json").read_text(encoding="utf-8"))
    assert written["rows"] == [1.5]
    assert written["record"]["torch"] == torch.__version__
    assert {"device", "date", "commit", "triton", "dtype"} <= written["record"].keys()
    text = (folder / "x.md").read_text(encoding="utf-8")
    assert f"- torch: {torch.__version__}" in text
    assert "| a |" in text
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_in_tables_have_three_digits() -> None:
    row = common.table("abcdef", [[1234.5, 12.345, 0.012345, 1.2345e-7, None, 0.0]]).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "1234",
        "12.3",
        "0.0123",
        "1.2e-07",
        "–",
        "0",
    ]


# --- runs ----------------------------------------------------------------------------------------------


def test_attention_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = attention.main(
        ["--device", "cpu", "--quick", "--shapes", "2,2,16,8", "1,3,40,8", "--out", str(tmp_path)]
    )
    assert code == 0
    assert "In short" in capsys.readouterr().out
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert {tuple(row["shape"]) for row in rows} == {(2, 2, 16, 8), (1, 3, 40, 8)}
    assert {row["name"] for row in rows} == {
        OURS,
        attention_report.VALUE_ONLY,
        f"{attention_report.MATH}, eager",
    }
    for row in rows:
        assert row["forward_ms"] > 0
        assert row["backward_ms"] > 0
        assert row["error_gradients"] < attention_report.TOLERANCES[torch.float32]
    assert (tmp_path / "attention.md").exists()
    assert (tmp_path / "attention.png").exists()


def test_a_wrong_tangent_makes_the_benchmark_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attend(q: Dual | torch.Tensor, k: Dual, v: Dual, backend: str) -> Dual | torch.Tensor:
        output = attention_reference(*map(as_dual, (q, k, v)))
        return output.value if output.tangent is None else Dual(output.value, 1.001 * output.tangent)

    monkeypatch.setattr(attention_contenders, "attention", attend)
    arguments = ["--device", "cpu", "--quick", "--shapes", "1,1,16,8", "--out", str(tmp_path)]
    assert attention.main(arguments) == 1
    assert f"WRONG: {OURS} on (1, 1, 16, 8): error 1.0e-03" in capsys.readouterr().out


def test_a_method_that_raises_leaves_the_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: object) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no such kernel\nand much more")

    monkeypatch.setattr(attention_contenders, "math_jvp", broken)
    arguments = ["--device", "cpu", "--quick", "--shapes", "1,1,16,8", "--out", str(tmp_path)]
    assert attention.main(arguments) == 0
    assert "on (1, 1, 16, 8): RuntimeError: no such kernel\n" in capsys.readouterr().out
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["forward_ms"] is not None for row in rows] == [True, True, False]


def test_a_shape_must_be_four_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--shapes", "1,2,3"])
    assert "four positive numbers" in capsys.readouterr().err


# --- the tile sweep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 64, 72, 128, 256])
def test_candidates_begin_with_the_table_and_repeat_nothing(width: int) -> None:
    found = tile_sweep.candidates(width, 2, quick=False)
    assert len(set(found)) == len(found)
    own = tile_sweep.own_candidates(width, 2, tangent=True)
    assert found[: len(own)] == own
    computed = {name for candidate in own for name in candidate.gradients}
    assert computed == {"q", "k", "v", "q_tangent", "k_tangent", "v_tangent"}


def test_the_sweep_runs_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "attention.py", "--sweep", "--device", "cpu", "--quick"]
    command += ["--shapes", "1,1,16,16", "--out", tmp_path]
    subprocess.run(command, env=_environment(TRITON_INTERPRET="1"), check=True, capture_output=True)
    rows = json.loads((tmp_path / "tile_sweep.json").read_text())["rows"]
    launches = {(tuple(row["candidate"]["gradients"]), row["candidate"]["tangent"]) for row in rows}
    assert {((), True), ((), False)} < launches
    for row in rows:
        assert not row["note"]
        assert row["ms"] > 0


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | more


# --- the suite -----------------------------------------------------------------------------------------

# Stands for Python in the suite: looks modules up as Python does, fails where told to, passes the rest.
STAND_IN = """#!/bin/sh
case "$*" in
    {without}) echo {missing} ;;
    -c*) exec {python} "$@" ;;
    {failing}) echo it failed; exit 1 ;;
    *) echo "ran $*" ;;
esac
"""


def run_suite(
    folder: Path, *, failing: str = "none", missing: str = "none"
) -> subprocess.CompletedProcess[str]:
    """Run the suite with stand-ins for its parts.

    Args:
        folder: for everything it writes.
        failing: how the arguments of the part begin that shall fail.
        missing: a module that shall not be installed.
    """
    python = folder / "python"
    without = f'-c*find_spec*" {missing}"*'
    python.write_text(
        STAND_IN.format(without=without, missing=missing, failing=f'"{failing}"*', python=sys.executable)
    )
    python.chmod(0o755)
    environment = _environment(DEVICE="cpu", PYTHON=str(python), LOGS=str(folder / "logs"))
    command = [ROOT / "benchmarks" / "gpu_suite.sh", "--out", folder / "results"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_suite_is_a_valid_script() -> None:
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu_suite.sh"], check=True)


def test_a_failed_part_of_the_suite_hides_no_other(tmp_path: Path) -> None:
    done = run_suite(tmp_path, failing="-m pytest")
    assert done.returncode == 1
    table = done.stdout.split("| --- |")[-1]
    assert "| tests | FAILED (1) |" in table
    for name in ("check", "attention", "training step", "digits"):
        assert f"| {name} | passed |" in table
    assert "- torch: " in done.stdout
    assert "NOT everything passed" in done.stdout.splitlines()[-1]
    assert "ran benchmarks/attention.py --device cpu" in (tmp_path / "logs" / "attention.log").read_text()
    assert (tmp_path / "results" / "suite.md").read_text().strip() in done.stdout


def test_a_part_that_lacks_a_package_is_left_out_by_name(tmp_path: Path) -> None:
    done = run_suite(tmp_path, missing="sklearn")
    assert "| digits | left out | – | not installed: sklearn |" in done.stdout
    assert "| training step | passed |" in done.stdout
    assert done.returncode == 0


def test_tests_that_cannot_run_prove_nothing(tmp_path: Path) -> None:
    done = run_suite(tmp_path, missing="pytest")
    assert "| tests | left out | – | not installed: pytest |" in done.stdout
    assert done.returncode == 1
