"""One case of the fuzz: a call of the command line in this process, and what must hold of its end."""

import io
import os
import random
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from runs import tree

from tvmatch.cli import main

SECONDS = 200  # for one case, which takes a fraction of a second where nothing else runs
DEEP = 3_000  # brackets, more than Python's stack
PLAIN: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    2**70,
    "",
    "x",
    "a\x00\x1b\n",
    "9" * 300,
]
PLAIN += [[], {}, [1], [[1], [2, 3]], {"a": {"b": None}}, [None], ["x", 1], "run", "photos", "null", "2"]
# What Python, PyTorch or Pillow say for themselves; ours begin with "tvmatch: ".
FOREIGN = ("Traceback", "Warning:", 'File "', "Exception ignored", "[rank", "During handling")


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


# Lines that may stand before an error: what was found, and how far it came.
KNOWN = r"tvmatch: |step \d|changed in this run|data\.|left out|no samples|these latents|saved |\s*$"
# Others' code draws from random streams of the whole process.
ALLOWED = {
    "demo": ("Python's random numbers",)  # Gradio
}


class Case(NamedTuple):
    """A call, what is done to the working directory before it, and that in words."""

    arguments: list[str]
    prepare: Callable[[Path], None] = lambda _: None
    done: object = ""


class Outcome(NamedTuple):
    """The end of a call: its exit code and what it printed."""

    code: int
    out: str
    err: str


class TookTooLong(BaseException):
    """Not an `Exception`, which a command may catch."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """`TookTooLong` after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def call(arguments: list[str]) -> Outcome:
    """Run `tvmatch` with these arguments; an exception other than the parser's exit passes through."""
    streams = [  # as Python opens them
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    ]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams
    try:
        with limited(SECONDS), captured_descriptor() as foreign:
            code = main(arguments)
    except SystemExit as end:  # of --help
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout, sys.stderr = before
    out, err = (stream.buffer.getvalue().decode(errors="replace") for stream in streams)  # type: ignore[attr-defined]
    return Outcome(code, out, "".join(foreign) + err)


@contextmanager
def captured_descriptor() -> Iterator[list[str]]:
    """What is written to file descriptor 2 by libraries in C, and by loggers that were set up before."""
    written: list[str] = []
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield written
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            written.append(file.read().decode(errors="replace"))


def global_state() -> dict[str, Any]:
    """What a call must leave as it was."""
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "NumPy's random numbers": str(np.random.get_state()),  # noqa: NPY002
        "Python's random numbers": random.getstate(),
        "working directory": os.getcwd(),
        "environment": {
            k: v for k, v in os.environ.items() if k != "GRADIO_TEMP_DIR"
        },  # of `demo`, to its end
        "warning filters": list(warnings.filters),
        "signal handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "default type": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "floating-point errors": np.geterr(),
        "module path": list(sys.path),
    }


def _difference(after: Any, before: Any) -> str:
    if isinstance(after, dict):
        return str({key: value for key, value in after.items() if before.get(key) != value})[:300]
    return str(after)[:300]


def run_case(arguments: list[str], folder: Path) -> Outcome:
    """Call the command line in `folder`, the working directory, and check all that must hold.

    A success says something. A refusal is one line that begins with "tvmatch: error: ", printable, the last
    of stderr; nothing that was there before is changed, and nothing is left but by `encode`, which can go on,
    and by an upload that fails once the folder is written. Exit code 1 is of losses that are not finite, data
    that fail while they are read, and checks that are off.
    """
    files, state = tree(folder), global_state()
    outcome = call(arguments)
    for name, value in global_state().items():
        if name in ALLOWED.get(arguments[0] if arguments else "", ()):
            continue
        assert value == state[name], f"{name} changed: {_difference(value, state[name])}"
    for words in FOREIGN:
        assert words not in outcome.err, outcome.err
        assert words not in outcome.out, outcome.out
    assert outcome.code in (0, 1, 2), outcome
    if outcome.code == 0:
        assert outcome.out, "a success that says nothing"
        return outcome
    lines = outcome.err.splitlines()
    if outcome.code == 1 and "are off" in outcome.out:
        return outcome  # of `check`
    if not arguments:
        return outcome  # the help
    assert lines, outcome
    assert [line for line in lines if line.startswith("tvmatch: error: ")] == lines[-1:], outcome.err
    assert all(re.match(KNOWN, line) for line in lines[:-1]), outcome.err
    assert lines[-1].isprintable(), ascii(lines[-1])
    assert 20 < len(lines[-1]) < 3000, lines[-1]
    if outcome.code == 1:
        return outcome  # of a run that had begun
    after = tree(folder)
    assert {name: after.get(name) for name in files} == files, "a refused call changed files"
    if arguments[0] != "encode" and not any(word.startswith("--push") for word in arguments):
        assert after.keys() == files.keys(), f"a refused call left {sorted(after.keys() - files.keys())}"
    return outcome
