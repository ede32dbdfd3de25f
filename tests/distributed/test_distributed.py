"""Processes that work together agree on a failure: programs of a user's own, joined as torchrun would."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import pytest
import torch

from tvmatch import cli
from tvmatch.distributed import (
    ALONE,
    Position,
    Processes,
    device_of_process,
    is_reported_by_another,
    joined_processes,
    launched,
    print_once,
    processes,
)
from tvmatch.errors import DataError, InputError

Body = Callable[[Processes], object]
# Every wait of the package itself is longer, but for the one for processes that were killed.
PATIENCE = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables; and processes that were killed are not waited for as long."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_RECEIVE_TIMEOUT", timedelta(seconds=1))


class Ended(NamedTuple):
    """How a process has ended: its exit code, and what it says of its exception or result."""

    code: int | None
    said: Any


def run_together(body: Body, count: int = 2, before: Body | None = None) -> list[Ended]:
    """Processes as torchrun starts them, without torchrun itself, which would end all after the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # PyTorch is imported already
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    started = [
        context.Process(target=run_one, args=(body, before, rank, count, port, inside))
        for rank, (_, inside) in enumerate(pipes)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    ended = [
        Ended(process.exitcode, outside.recv() if outside.poll() else None)
        for process, (outside, _) in zip(started, pipes, strict=True)
    ]
    for process in started:
        process.kill()
    return ended


def run_one(body: Body, before: Body | None, rank: int, count: int, port: int, pipe: Connection) -> None:
    """What a user's program does, with the exit codes of the command line."""
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in variables.items()}

    def command(_: list[str]) -> int:
        if before is not None:
            with suppress(InputError), joined_processes() as joined:
                before(joined)
        try:
            with joined_processes() as joined:
                pipe.send(body(joined))
            return 0
        except BaseException as error:
            notes = "".join(getattr(error, "__notes__", []))
            pipe.send((type(error).__name__, str(error), notes, is_reported_by_another(error)))
            raise

    cli._run = lambda _, arguments: command(arguments)
    os._exit(cli.main(["evaluate"]))


def agreed(ended: list[Ended], code: int, kind: str, message: str, *, failed: int) -> None:
    """All have the same exit code and message; others than the one that failed know which it was."""
    assert [own_code for own_code, _ in ended] == [code] * len(ended)
    for rank, (_, said) in enumerate(ended):
        assert said[:2] == (kind, message)
        assert said[2].startswith(f"In process {failed}:\nTraceback") or (rank == failed and not said[2])
        assert said[3] == (rank != 0), "the first one reports it"


def raising(failed: int, error: BaseException, joined: Processes) -> None:
    """One raises, the others wait for it or for the first one."""
    if joined.rank == failed:
        raise error
    joined.gather(torch.ones(3))
    joined.as_first(True)
    joined.wait()


@pytest.mark.parametrize(("failed", "count"), [(0, 2), (1, 2), (2, 3)])
def test_one_raises_while_others_wait(failed: int, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    error = InputError("data.path", "there is no file ü")
    ended = run_together(partial(raising, failed, error), count)
    agreed(ended, 2, "InputError", "data.path: there is no file ü", failed=failed)
    assert capfd.readouterr().err.splitlines().count("tvmatch: error: data.path: there is no file ü") == 1


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (DataError("the data set failed"), 1, "DataError", "the data set failed"),
        (OSError(28, "No space", "out.json"), 2, "OSError", "[Errno 28] No space: 'out.json'"),
        (FileNotFoundError(2, "No file", b"x"), 2, "FileNotFoundError", "[Errno 2] No file: \"b'x'\""),
        (OSError("odd"), 2, "OSError", "odd"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt", ""),
    ],
)
def test_the_same_error_in_all(error: BaseException, code: int, kind: str, message: str) -> None:
    ended = run_together(partial(raising, 1, error))
    assert ended[0].said[:2] == (kind, message)
    assert [own_code for own_code, _ in ended] == [code, code]


def mistaken(joined: Processes) -> None:
    """A mistake of the program."""
    if joined.rank == 1:
        raise ZeroDivisionError("in\ntwo lines")
    joined.wait()


def test_an_error_of_the_program_is_quoted() -> None:
    first, second = run_together(mistaken)
    assert first.said[:2] == ("ProcessError", "process 1 has failed: ZeroDivisionError: in two lines")
    assert second.said[0] == "ZeroDivisionError"
    assert first.code == 1


@contextmanager
def fail_together(joined: Processes) -> Iterator[None]:
    """Code without collectives that all processes run: an error in one is raised in all."""
    error = None
    try:
        yield
    except BaseException as own:
        error = own
    joined.raise_any(error)


def failing_together(joined: Processes) -> None:
    """Two fail, before any waits in a collective of the work."""
    with fail_together(joined):
        pass
    with fail_together(joined):
        if joined.rank:
            raise DataError(f"row {joined.rank}")
    os._exit(9)


def test_an_agreed_failure_is_that_of_the_lowest_rank() -> None:
    agreed(run_together(failing_together, 3), 1, "DataError", "row 1", failed=1)


def surviving(joined: Processes) -> object:
    """An agreed failure is no end: a program may go on with other work."""
    try:
        with fail_together(joined):
            if joined.rank:
                raise InputError("batch_size", "too large")
    except InputError as error:
        return [str(error), joined.as_first(joined.is_first)]


def test_work_may_go_on_after_an_agreed_failure() -> None:
    assert run_together(surviving) == [Ended(0, ["batch_size: too large", True])] * 2


def late(joined: Processes) -> None:
    """The first has long done its part."""
    if joined.rank:
        time.sleep(0.5)
        raise InputError("late")


def test_a_failure_after_the_others_have_finished() -> None:
    ended = run_together(late)
    assert [code for code, _ in ended] == [2, 2]


def dying(killed: int, joined: Processes) -> None:
    """One is killed while the others wait."""
    joined.wait()
    if joined.rank == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    joined.wait()


@pytest.mark.parametrize(("killed", "count"), [(0, 2), (1, 2), (1, 3)])
def test_one_is_killed(killed: int, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody hears from it. Of those that are left one says so, and none waits for it."""
    ended = run_together(partial(dying, killed), count)
    assert ended.pop(killed) == (-signal.SIGKILL, None)
    for code, said in ended:
        assert code == 1
        assert said[:2] == (
            "ProcessError",
            "another process ended without an error message; it may have been killed for lack of memory",
        )
    assert capfd.readouterr().err.count("tvmatch: error: another process ended") >= 1


def working(joined: Processes) -> object:
    """All that they tell each other."""
    rank = joined.rank
    with fail_together(joined):
        share = list(joined.share(5))
    parts = joined.gather(torch.full((rank, 2), float(rank)))
    scalars = joined.gather(torch.tensor(rank + 0.5, dtype=torch.float64))
    joined.wait()
    return [
        rank,
        share,
        [part.tolist() for part in parts],
        list(map(float, scalars)),
        joined.as_first(rank == 0),
    ]


def test_what_is_told_arrives() -> None:
    assert run_together(working, 3) == [
        (0, [0, [0, 1], [[], [[1.0, 1.0]], [[2.0, 2.0]] * 2], [0.5, 1.5, 2.5], True]),
        (0, [1, [2, 3], [[[1.0, 1.0]]], [1.5], True]),
        (0, [2, [4], [[[2.0, 2.0]] * 2], [2.5], True]),
    ]


def test_processes_may_join_again() -> None:
    """For another work, after one that has failed."""
    assert [code for code, _ in run_together(working, before=late)] == [0, 0]


def test_a_process_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert launched() == Position()
    ALONE.wait()
    with pytest.raises(InputError, match=r"^a: b$"), fail_together(ALONE):
        raise InputError("a", "b")
    tensor = torch.ones(2)
    assert ALONE.gather(tensor)[0] is tensor
    assert ALONE.as_first(False) is False
    assert list(ALONE.share(3)) == [0, 1, 2]
    print_once("one", 2)
    assert capsys.readouterr().out == "one\n2\n"


def test_only_the_first_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    print_once("one")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("rank", ["", "one", "-1"])
def test_variables_of_another_launcher(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(InputError, match="LOCAL_RANK: must be torchrun's, 0, 1, …, got"):
        device_of_process("auto")
    assert device_of_process("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(InputError, match="RANK and WORLD_SIZE must be torchrun's"), joined_processes():
        pass
