"""The programs in examples/ run, shortened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("program", sorted(EXAMPLES.glob("*.py")), ids=lambda program: program.stem)
def test_it_runs(program: Path, tmp_path: Path) -> None:
    """From another folder, as a user copies it; its run folder is complete."""
    command = [sys.executable, str(program), "--out", "run", "--steps", "3"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert (tmp_path / "run" / "checkpoints" / "step_0000003" / "model.safetensors").is_file()
    assert os.listdir(tmp_path) == ["run"]
