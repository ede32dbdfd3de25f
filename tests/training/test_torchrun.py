"""Training is for one process: of several that torchrun starts all are refused, and the first says why."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import environment, images, tiny_config

import tvmatch
from tvmatch.cli import main
from tvmatch.errors import InputError
from tvmatch.training import Trainer

LINE = "WORLD_SIZE: 2 processes, but training is for one; start it without torchrun"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and no launcher's variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_is_refused(
    rank: int, alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(tiny_config(1), images(), "../run").run()
    capsys.readouterr()
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "digits"]) == 2
    assert capsys.readouterr() == ("", "" if rank else f"tvmatch: error: {LINE}\n")
    for resume in (False, True):
        with pytest.raises(InputError, match=f"^{LINE}$"):
            tvmatch.train(tiny_config(), images(), "../run" if resume else "new", resume=resume)
    assert list(alone.iterdir()) == []
    assert main(["info", "../run"]) == 0


def test_the_others_wait_for_the_first_to_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends all processes when one has failed."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["train", "digits"]) == 2
        assert len(waits) == rank
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "", "RANK": "3"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # sbatch --ntasks 4, one process
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},  # a folder each, perhaps
    ],
    ids=str,
)
def test_one_process_is_not_refused(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tvmatch.train(tiny_config(1), images(), "run").step == 1


@pytest.mark.exhaustive
def test_torchrun_itself(alone: Path, tmp_path: Path) -> None:
    script = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--log-dir={tmp_path}", "--redirects=3"]
    done = subprocess.run(
        [sys.executable, *script, "-m", "tvmatch", "train", "digits"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr.count("exitcode  : 2 ") == 2, done.stderr
    printed = {
        path.parent.name: path.read_text() for path in tmp_path.rglob("std*.log") if path.stat().st_size
    }
    assert printed == {"0": f"tvmatch: error: {LINE}\n"}
    assert list(alone.iterdir()) == []
