"""The tests that depend on PyTorch, and the GPU suite's form for a CPU, in one environment after another.

    python tests/versions.py oldest=.venv-versions/oldest/bin/python pinned=.venv/bin/python

`make test-versions` builds the environments and calls this. It prints a table of what ran on which versions;
the exit code is 1 unless everything passed. Results lie in runs/versions/.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Derivative rules, networks, compilation, attention and its forward mode, the estimate, training; and what
# has shown to hang on the versions of other packages.
TESTS = (
    "test_dual",
    "test_higher_derivatives",
    "test_compilation",
    "test_acceleration",
    "test_networks",
    "test_reference",
    "test_attention",
    "test_attention_drop_in",
    "test_attention_forward_mode",
    "test_attention_kernels",
    "test_attention_replacement",
    "test_forward_mode_norms",
    "test_forward_mode_refusals",
    "test_argument_checks",
    "test_default_tensors",
    "test_initial_values",
    "test_check",
    "test_estimate",
    "test_training",
    "test_training_benchmark",
    "test_config",
    "test_pictures",
)
FACTS = """
import json, platform, numpy, torch
try:
    from triton import __version__ as triton
except ImportError:
    triton = "none"
print(json.dumps([torch.__version__, triton, numpy.__version__, platform.python_version()]))
"""


def main(arguments: list[str]) -> int:
    """Run all environments, `name=python` each, and print the table."""
    rows, passed = [], True
    for argument in arguments:
        name, _, python = argument.partition("=")
        python = os.path.abspath(python)  # not resolved: a link decides which environment it is
        folder = ROOT / "runs" / "versions" / name
        folder.mkdir(parents=True, exist_ok=True)
        facts = json.loads(subprocess.run([python, "-c", FACTS], capture_output=True, check=True).stdout)
        results = [run_tests(python, folder), run_suite(python, folder)]
        rows.append([name, *facts, *(text for _, text in results)])
        passed &= all(right for right, _ in results)
        print(table(rows), flush=True)
    return 0 if passed else 1


def run_tests(python: str, folder: Path) -> tuple[bool, str]:
    """Whether all tests passed, and how many did."""
    files = [str(next(ROOT.glob(f"tests/**/{name}.py")).relative_to(ROOT)) for name in TESTS]
    command = [
        python,
        "-m",
        "pytest",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--show-capture=no",
        *files,
    ]
    code, text = run(command, folder / "tests.log", {"OMP_NUM_THREADS": "1"})
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", text.splitlines()[-1] if text else "")
    return code == 0, ", ".join(counts) or f"exit code {code}"


def run_suite(python: str, folder: Path) -> tuple[bool, str]:
    """Whether no part of the suite failed, and which did."""
    variables = {"DEVICE": "cpu", "PYTHON": python, "LOGS": str(folder / "suite")}
    command = ["benchmarks/gpu_suite.sh", "--out", str(folder / "results")]
    code, text = run(command, folder / "suite.log", variables)
    failed = re.findall(r"^\[\d+ s\] (.*): (?:FAILED|STOPPED).*$", text, re.MULTILINE)
    return code == 0, "passed" if code == 0 else f"not passed: {', '.join(failed)}"


def run(command: list[str], log: Path, variables: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command in the repository's root, and what it printed, which goes to a file too."""
    started = time.perf_counter()
    print("running", *command, flush=True)
    with log.open("w+", encoding="utf-8") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    print(f"exit code {done.returncode} after {time.perf_counter() - started:.0f} s: {log}", flush=True)
    return done.returncode, text


def table(rows: list[list[str]]) -> str:
    """As Markdown."""
    head = ["", "PyTorch", "Triton", "NumPy", "Python", "tests", "GPU suite on a CPU"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
