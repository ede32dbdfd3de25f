"""Rank and number of processes, from the environment variables of `torchrun`."""

import os
import signal
import time
from dataclasses import dataclass

import torch

from tvmatch.errors import InputError

_REPORTED = "_reported_by_another_process"  # an attribute of exceptions
_REPORTING = 30  # seconds to wait for the process that reports an error, before exiting


@dataclass(frozen=True)
class Position:
    """Rank of a process among several; by default the only one.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process collects the results and prints to the terminal."""
        return self.rank == 0

    def share(self, parts: int) -> range:
        """This process's consecutive share of 0 … parts − 1; lower ranks get the larger shares."""
        each, more = divmod(parts, self.world_size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))


def launched() -> Position:
    """The position of this process; the only one if the variables are not set.

    Raises:
        InputError: if the variables have invalid values.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return Position()
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise InputError(f"RANK and WORLD_SIZE must be torchrun's, 0 … N−1 and N, got {rank!r} and {count!r}")
    return Position(int(rank), int(count))


def several() -> bool:
    """Whether there are several processes."""
    return os.environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1")


def is_first() -> bool:
    """Whether this process prints to the terminal."""
    return os.environ.get("RANK", "0") == "0"


def print_once(*lines: object) -> None:
    """Print lines in the first process only."""
    if is_first():
        print(*lines, sep="\n", flush=True)


def device_of_process(name: str) -> str:
    """The device of this process: the GPU of its LOCAL_RANK if `name` does not specify a GPU.

    Raises:
        InputError: if LOCAL_RANK is not a number.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    if not rank.isdecimal():
        raise InputError("LOCAL_RANK", f"must be torchrun's, 0, 1, …, got {rank!r}")
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def refuse_several(what: str) -> None:
    """Refuse to run in several processes; the first one reports the error.

    Raises:
        InputError: if there are several.
    """
    if several():
        error = InputError(
            "WORLD_SIZE",
            f"{os.environ['WORLD_SIZE']} processes, but {what} is for one; start it without torchrun",
        )
        leave_report(error, to_another=not is_first())
        raise error


def leave_report(error: BaseException, *, to_another: bool) -> None:
    """Mark an error that all processes raise: whether another process prints it."""
    setattr(error, _REPORTED, to_another)


def is_reported_by_another(error: BaseException) -> bool:
    """Whether another process prints this error."""
    return bool(getattr(error, _REPORTED, False))


def leave_last(code: int) -> int:
    """Wait until another process has reported the error, then return the exit code.

    torchrun ends all processes as soon as one fails.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(_REPORTING)
    return code
