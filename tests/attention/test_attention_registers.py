"""The kernels compiled ahead of time for a Hopper GPU: no register spills, and matrix products by wgmma.

This runs the real compiler, in a process without the interpreter's variable; it needs no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tvmatch.attention.tiles import HOPPER_SHARED_MEMORY

ROOT = Path(__file__).parents[2]
EXPECTED = {  # launches of each kernel, by (head_dim, tangent)
    (64, False): ["attention_forward", "query_gradients", "key_gradients"],
    (64, True): ["attention_forward", "query_gradients", "key_gradients"],
    (128, False): ["attention_forward", "query_gradients", "key_gradients"],
    (128, True): ["attention_forward"] + 2 * ["query_gradients"] + 3 * ["key_gradients"],
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The default tiles at D = 64 and 128 in bfloat16, with and without tangent and causal mask."""
    path = tmp_path_factory.mktemp("registers") / "reports.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(path.parent / "cache"), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / "registers.py"), "--json", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_every_kernel_was_compiled(reports: list[dict[str, Any]]) -> None:
    for (head_dim, tangent), kernels in EXPECTED.items():
        for causal in (False, True):
            case = [head_dim, tangent, causal]
            found = [r["kernel"] for r in reports if [r["head_dim"], r["tangent"], r["causal"]] == case]
            assert found == kernels, case


def test_no_spills(reports: list[dict[str, Any]]) -> None:
    spilled = [report for report in reports if report["spilled_bytes"]]
    assert not spilled


def test_matrix_products_are_wgmma_and_not_serialized(reports: list[dict[str, Any]]) -> None:
    assert not [report for report in reports if not report["wgmma"] or report["serialized"]]


def test_shared_memory_fits(reports: list[dict[str, Any]]) -> None:
    assert max(report["shared_memory"] for report in reports) <= HOPPER_SHARED_MEMORY
