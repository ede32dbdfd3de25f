"""Read items ahead in worker processes: results in order, every failure reported, no process left behind.

PyTorch's `DataLoader` is not used: there, a dying process raises an exception anywhere in this one, even in
an optimiser step; an error or batch that cannot be pickled blocks forever; and processes may outlive a
killed parent. Here each process has its own pipe, and its state is checked when its answer is due.
"""

import atexit
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.multiprocessing  # teaches ForkingPickler to pass tensors in shared memory

from tvmatch.errors import DataError, InputError

_AHEAD = 2  # items requested from a process in advance
_POLL = 0.2  # seconds between two calls of `stopped`
_GRACE = 1.0  # seconds for a process to exit
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HINTS = {"SIGKILL": "perhaps for lack of memory", "SIGBUS": "perhaps for lack of shared memory, /dev/shm"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def read_ahead(
    read: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    *,
    stopped: Callable[[], object] = bool,
) -> Iterator[Iterator[Result]]:
    """Iterate over `read(item)` in the order of the items, computed ahead by worker processes.

    Args:
        read: a function of the item alone. Processes that are not forked receive it pickled.
        items: to read.
        workers: number of processes, which ignore SIGINT and SIGTERM; 0 reads in this process.
        stopped: called while waiting for a process; the iteration ends early if it returns a true value.

    Raises:
        InputError: `read` raises it.
        DataError: `read` raises another error, which is quoted, or a process ends.
    """
    if workers < 1:
        yield map(partial(read_here, read), items)
        return
    started: list[_Worker] = []
    abandon = partial(_abandon, started)
    atexit.register(abandon)
    try:
        while len(started) < min(workers, len(items)):
            started.append(_Worker(read, items, len(started)))
        yield _in_order(started, len(items), stopped)
        _dismiss(started)
    finally:
        _end(started)
        atexit.unregister(abandon)


def read_here(read: Callable[[Item], Result], item: Item) -> Result:
    """`read(item)` in this process, with the exceptions of `read_ahead`."""
    try:
        return read(item)
    except InputError:
        raise
    except Exception as error:
        raise DataError(_quoted(error)) from error


def _in_order(workers: "list[_Worker]", count: int, stopped: Callable[[], object]) -> Iterator[Any]:
    """Item k is read by process k mod W."""
    ahead = _AHEAD * len(workers)
    for number in range(min(ahead, count)):
        workers[number % len(workers)].ask(number)
    for number in range(count):
        worker = workers[number % len(workers)]
        while not worker.ready(_POLL):
            if stopped():
                return
        result = worker.answer()
        if number + ahead < count:
            worker.ask(number + ahead)
        yield result


def _dismiss(workers: "list[_Worker]") -> None:
    """Ask the processes to exit."""
    for worker in workers:
        worker.ask(None)
    deadline = time.monotonic() + _GRACE
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))


def _end(workers: "list[_Worker]") -> None:
    """Kill the processes, which have nothing to save."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(_GRACE)  # a process in an uninterruptible read stays
        worker.pipe.close()


def _abandon(workers: "list[_Worker]") -> None:
    """Kill the processes as Python exits while another thread reads: it would wait for them forever."""
    for worker in workers:
        worker.abandoned = True
        worker.process.kill()


class _Failure(NamedTuple):
    """An exception of another process as text, since not every exception can be pickled."""

    of_input: bool
    subject: str | None
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> "_Failure":
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, InputError):
            return cls(True, error.subject, error.message, trace)
        return cls(False, None, _quoted(error), trace)

    def error(self) -> InputError | DataError:
        error = InputError(self.subject, self.message) if self.of_input else DataError(self.message)
        error.add_note(f"In the process that reads:\n{self.trace}")
        return error


def _quoted(error: BaseException) -> str:
    return "the data set failed: " + " ".join("".join(traceback.format_exception_only(error)).split())


class _Worker:
    """Handle of a worker process."""

    def __init__(self, read: Callable[[Any], Any], items: Sequence[Any], number: int) -> None:
        self.abandoned = False
        self.pipe, inside = multiprocessing.Pipe()
        forked = multiprocessing.get_start_method() == "fork"
        # Pickled here and not by `Process`, so that an error of unpickling is reported like any other.
        work = (read, items) if forked else _pickled((read, items))
        self.process = multiprocessing.Process(target=_serve, args=(work, inside, number), daemon=True)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until it ignores them
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            inside.close()

    def ask(self, number: int | None) -> None:
        """Request the item of this index; None asks the process to exit."""
        with suppress(OSError):  # it has ended, which is reported when its answer is due
            self.pipe.send(number)

    def ready(self, seconds: float) -> bool:
        """Wait for an answer or the end of the process, at most this long."""
        return bool(wait([self.pipe, self.process.sentinel], seconds))

    def answer(self) -> Any:
        """The result of the next requested item."""
        try:
            if not self.pipe.poll():
                raise EOFError
            # Tensors are fetched from the process itself, which must still be alive.
            answer = ForkingPickler.loads(self.pipe.recv_bytes())
        except Exception as error:
            if self.abandoned:
                threading.Event().wait()  # this thread ends with Python; printing now could abort it
            self.process.join(_GRACE)
            if wait([self.process.sentinel], 0):
                raise DataError(self._end()) from None
            raise DataError(_quoted(error)) from error
        if isinstance(answer, _Failure):
            raise answer.error()
        return answer

    def _end(self) -> str:
        code = self.process.exitcode
        if code is None or code >= 0:
            how = "has ended" + ("" if code is None else f" with exit code {code}")
        else:
            name = signal.Signals(-code).name
            how = ", ".join(filter(None, [f"was killed by {name}", _HINTS.get(name)]))
        return f"the process {self.process.pid} that reads data {how}"


def _pickled(content: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(content))
    except Exception as error:
        raise DataError(_quoted(error)) from error


def _serve(work: Any, pipe: Connection, worker: int) -> None:
    """Main loop of a worker process."""
    # Ctrl-C and a batch system's SIGTERM reach every process; the main one needs data until it has saved.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # For data sets that use global random generators: forked processes would all draw the same numbers.
    random.seed(worker), np.random.seed(worker), torch.manual_seed(worker)  # noqa: NPY002
    failure = None
    try:
        read, items = ForkingPickler.loads(work) if isinstance(work, bytes) else work
    except BaseException as error:
        failure = _Failure.of(error)
    while (number := pipe.recv()) is not None:
        if failure is not None:
            pipe.send(failure)
            continue
        try:
            pipe.send_bytes(ForkingPickler.dumps(read(items[number])))
        except BaseException as error:
            pipe.send(_Failure.of(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
