"""Data workers in every condition: what they read, how they fail, and that none is left behind.

Processes of the tests' own have a deadline: what must not happen is that they never end.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import TINY_MLP, Disturbed, environment, images, newest, tiny_config

from tvmatch.data.base import Batch
from tvmatch.data.densities import Density
from tvmatch.data.read_ahead import read_ahead
from tvmatch.errors import DataError, InputError
from tvmatch.training import Trainer
from tvmatch.training.log import read_log

DEADLINE = 60  # seconds, for a machine that does something else besides


class UnpicklableError(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(lambda: one)


def local_error() -> Exception:
    class LocalError(Exception):
        pass

    return LocalError("of a class that cannot be found again")


def speechless() -> Exception:
    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise ValueError

    return SpeechlessError()


def square(number: int) -> torch.Tensor:
    return torch.tensor([number**2])


@pytest.mark.parametrize("workers", [0, 1, 3, 20])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_results_come_in_order(workers: int, count: int) -> None:
    before = torch.get_rng_state()
    with read_ahead(square, range(5, 5 + count), workers) as read:
        assert [int(result) for result in read] == [number**2 for number in range(5, 5 + count)]
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are the caller's"


ERRORS: dict[str, tuple[Callable[[], BaseException], str]] = {
    "an error": (lambda: KeyError("column"), r"KeyError: 'column'"),
    "an error of the system": (
        lambda: FileNotFoundError(2, "No such file or directory", "images/7.png"),
        r"FileNotFoundError: \[Errno 2\] No such file or directory: 'images/7.png'",
    ),
    "one that cannot be pickled": (lambda: UnpicklableError(1, 2), r".*UnpicklableError: <function .*>"),
    "one of a local class": (local_error, r".*LocalError: of a class that cannot be found again"),
    "one that cannot be printed": (speechless, r".*SpeechlessError: <exception str\(\) failed>"),
    "one without words": (AssertionError, "AssertionError"),
    "one of several lines": (lambda: ValueError("one\ntwo"), "ValueError: one two"),
    "an end of iteration": (StopIteration, "StopIteration"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_quoted(kind: str, workers: int) -> None:
    make, expected = ERRORS[kind]

    def fail(number: int) -> int:
        if number == 3:
            raise make()
        return number

    done: list[int] = []
    with pytest.raises(DataError) as caught, read_ahead(fail, range(9), workers) as read:
        done.extend(read)
    assert done == [0, 1, 2]
    assert re.fullmatch(f"the data set failed: {expected}", str(caught.value))
    if workers:
        assert "in fail" in caught.value.__notes__[0], "where in the data set"
    else:
        assert caught.value.__cause__ is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_of_the_user_stays_one(workers: int) -> None:
    def fail(number: int) -> int:
        raise InputError(f"data.path: image {number} is broken")

    with pytest.raises(InputError) as caught, read_ahead(fail, [7], workers) as read:
        next(read)
    assert str(caught.value) == "data.path: image 7 is broken"


def leave(number: int) -> None:
    sys.exit(f"{number}")


def test_a_result_that_cannot_be_sent() -> None:
    """PyTorch refuses a tensor in the middle of a graph; a lambda cannot be pickled."""
    weight = torch.ones(1, requires_grad=True)
    results: list[Callable[[int], object]] = [lambda _: 2 * weight, lambda _: lambda: 0]
    for result, expected in zip(results, ("requires_grad", "pickle"), strict=True):
        with pytest.raises(DataError, match=expected), read_ahead(result, [0], 1) as read:
            next(read)
    with pytest.raises(DataError, match="failed: SystemExit: 0"), read_ahead(leave, [0], 1) as read:
        next(read)


ENDS: dict[str, tuple[Callable[[], None], str]] = {
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        "was killed by SIGKILL, perhaps for lack of mem",
    ),
    "a limit": (lambda: os.kill(os.getpid(), signal.SIGXCPU), "was killed by SIGXCPU$"),
    "an exit": (lambda: os._exit(3), "has ended with exit code 3$"),
    "an exit in peace": (lambda: os._exit(0), "has ended with exit code 0$"),
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_process_that_ends_is_told(kind: str) -> None:
    end, expected = ENDS[kind]

    def die(number: int) -> torch.Tensor:
        if number == 3:
            end()
        return torch.ones(number)

    with (
        pytest.raises(DataError, match=rf"^the process \d+ that reads data {expected}"),
        read_ahead(die, range(9), 2) as read,
    ):
        list(read)


def test_processes_end_with_the_context() -> None:
    """Idle, busy, and with a thread that would keep them alive; and not those of somebody else."""

    def hang(number: int) -> int:
        if number == 2:
            time.sleep(1000)
        return os.getpid()

    with read_ahead(hang, range(9), 3) as read:
        numbers = {next(read), next(read)}
        assert len(numbers) == 2
        assert all(alive(number) for number in numbers)
    assert not any(alive(number) for number in numbers)


def test_results_end_early() -> None:
    def hang(number: int) -> int:
        if number == 2:
            time.sleep(1000)
        return number

    with read_ahead(hang, range(9), 2, stopped=lambda: True) as read:
        assert list(read) in ([], [0], [0, 1])


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Training


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_folder_is_not_blamed(workers: int, tmp_path: Path) -> None:
    """The step, the data's own error, and what there is to go back to; the steps before it are logged."""

    def fail(step: int, batch: Batch) -> None:
        if step == 5:
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError) as caught:
        Trainer(tiny_config(data_workers=workers), Disturbed(images(), fail), tmp_path).run()
    assert str(caught.value) == (
        "step 5: the data set failed: OSError: [Errno 5] Input/output error; "
        f"the last good checkpoint is {tmp_path}/checkpoints/step_0000003"
    )
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("gone")])
def test_nor_is_it_where_data_are_taken_for_a_picture(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data: Density, count: int, seed: int) -> Batch:
        raise error

    monkeypatch.setattr(Density, "take", fail)
    config = tiny_config(6, sample_every=4)
    config.network = TINY_MLP
    with pytest.raises(DataError) as caught:
        Trainer(config, Density("moons"), tmp_path).run()
    assert str(caught.value) == (
        f"step 4: the data set failed: {type(error).__name__}: {error}; "
        f"the last good checkpoint is {tmp_path}/checkpoints/step_0000003"
    )


# A run in a process of its own for each condition of its workers. All are forked from one, which imports what
# they need, and end as Python does.
RUNS = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from runs import Disturbed, images, tiny_config
import tvmatch.cli
from tvmatch.training import Interrupted, Trainer

def disturb(step, batch):
    if step != 6:
        return
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "fails":
        raise KeyError("column")
    elif what == "hangs at exit":
        threading.Thread(target=time.sleep, args=(1000,)).start()
    elif what == "group":
        os.killpg(0, signal.SIGTERM)
    elif what in ("terminated", "abandoned", "orphaned"):
        (run / "worker").write_text(str(os.getpid()))
        end = {"terminated": signal.SIGTERM, "orphaned": signal.SIGKILL}
        os.kill(first, end.get(what, 0))
        time.sleep(1000)

def train(*_):
    config = tiny_config(8 if what == "hangs at exit" else 1000, data_workers=2)
    try:
        Trainer(config, Disturbed(images(), disturb), run).run()
    except Interrupted as stop:
        return 128 + stop.signal_number
    return 0

folder, kinds, children = Path(sys.argv[1]), sys.argv[2:], {}
Trainer(tiny_config(1), images(), folder / "first").run()
for what in kinds:
    children[what] = os.fork()
    if children[what] == 0:
        break
else:
    for what, child in children.items():
        print(what, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep="\\t")
    sys.exit()

os.setsid()
first, run = os.getpid(), folder / what
os.dup2(os.open(f"{run}.err", os.O_WRONLY | os.O_CREAT), 2)
if what == "abandoned":
    threading.Thread(target=train, daemon=True).start()
    while not (run / "checkpoints/step_0000006").exists():  # after it the thread waits, and prints nothing
        time.sleep(0.02)
    time.sleep(0.2)
    sys.exit(0)
tvmatch.cli._run = train
sys.exit(tvmatch.cli.main(["train"]))
"""
CHECKPOINT = "the last good checkpoint is {run}/checkpoints/step_0000006"
OUTCOMES = {  # the exit code, and the one line of an error
    "killed": (1, r"step \d: the process \d+ that reads data was killed by SIGKILL, perhaps .*step_000000\d"),
    "fails": (1, rf"step 6: the data set failed: KeyError: 'column'; {CHECKPOINT}"),
    "hangs at exit": (0, None),
    "group": (143, None),
    "terminated": (143, None),  # while a batch is waited for that never comes
    "abandoned": (0, None),  # Python ends while a thread trains
    "orphaned": (-signal.SIGKILL, None),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder of all the runs, and their exit codes."""
    folder = tmp_path_factory.mktemp("runs")
    script = [sys.executable, "-c", RUNS, str(folder), *OUTCOMES]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    codes = dict(line.split("\t") for line in done.stdout.splitlines())
    return folder, {what: int(code) for what, code in codes.items()}


@pytest.mark.parametrize("what", OUTCOMES)
def test_a_run_ends_whatever_its_workers_do(what: str, ended: tuple[Path, dict[str, int]]) -> None:
    """With its exit code, in one line, with everything saved where it was asked to end; no worker stays."""
    folder, codes = ended
    code, line = OUTCOMES[what]
    run = folder / what
    printed = Path(f"{run}.err").read_text()
    assert codes[what] == code, printed
    errors = [text for text in printed.splitlines() if not text.startswith(("step ", "training "))]
    if line is None:
        assert errors == []
    else:
        (error,) = errors
        assert re.fullmatch("tvmatch: error: " + line.format(run=re.escape(str(run))), error)
    if code == 143:
        assert 1 <= read_log(run)[-1]["step"] == int(newest(run).name.removeprefix("step_")) < 1000
    if (run / "worker").exists():
        worker = int((run / "worker").read_text())
        deadline = time.monotonic() + DEADLINE
        while alive(worker):
            assert time.monotonic() < deadline, "a worker outlives its trainer"
            time.sleep(0.02)
