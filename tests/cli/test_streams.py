"""Commands print to terminals and files of every encoding, and to none."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from runs import SHORT_RUN, TINY_POINTS, environment, images, tiny_config

from tvmatch.cli import COMMANDS, main
from tvmatch.training import Trainer

ENCODINGS = ["ascii", "latin-1", "cp1252", "cp437", "koi8-r", "shift_jis", "utf-8", "utf-16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose folder has a name that is in few encodings."""
    folder = tmp_path_factory.mktemp("runs") / "θ → naïve…"
    Trainer(tiny_config(2), images(), folder).run()
    return folder


def printed(encoding: str, errors: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What a command writes to standard output and error, which take this encoding alone."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            code = main(arguments)
        except SystemExit as stop:  # of argparse, after its help
            code = int(stop.code or 0)
    assert code == 0, arguments
    return [stream.buffer.getvalue() for stream in streams]  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_prints(encoding: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        [],
        *([command] for command in COMMANDS if command != "demo"),
        ["train", "imagenet512_w2.5"],
    ):
        printed(encoding, "strict", [*arguments, "--help"], monkeypatch)
    for arguments in (["info", str(run)], ["recipes"], ["recipes", "imagenet256_w2"]):
        output, error = printed(encoding, "strict", arguments, monkeypatch)
        assert error == b""
        output.decode(encoding)


def test_symbols_in_ascii(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = printed("ascii", "strict", ["info", str(run)], monkeypatch)
    lines = dict(line.split(maxsplit=1) for line in output.decode("ascii").splitlines() if " " in line)
    assert lines["generates"] == "image, shape 1\\xd74\\xd74"
    assert "\\u03b8 \\u2192 na\\xefve\\u2026" in lines["checkpoint"]
    output, _ = printed("utf-8", "strict", ["info", str(run)], monkeypatch)
    assert "1×4×4" in output.decode()


@pytest.mark.exhaustive
def test_training_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars, tables and paths, as they come from a run, on standard error as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tvmatch.cli.train.NUMBERS_OF_STEPS", (1,))
    command = ["train", "checkerboard", *TINY_POINTS, *SHORT_RUN[1:], "--out=naïve…"]
    output, error = printed("ascii", "strict", command, monkeypatch)
    assert b"step 4/4" in error
    assert b"na\\xefve\\u2026/metrics.json" in output


def test_no_standard_output_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `>&-` makes of it."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info", str(run)]) == 0


def test_python_s_own_variable(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tvmatch", "info", str(run)],
        env=environment() | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"1\xd74\xd74" in done.stdout
