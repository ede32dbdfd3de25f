"""Processes that exchange small tensors; an exception in one of them ends all.

Messages use gloo on the CPU: they are few, and the work may not use a GPU.
"""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tvmatch.distributed.failures import Failure, ProcessError
from tvmatch.distributed.launch import Position, launched, leave_report, several
from tvmatch.errors import InputError

_CONNECT_TIMEOUT = timedelta(minutes=10)  # until all processes have started
_WORK_TIMEOUT = timedelta(days=1)  # for the work of another process; if it ends, gloo fails immediately
_RECEIVE_TIMEOUT = timedelta(seconds=5)  # until all processes have received a failure
_FAILED = "failed"  # a key of the store
_MOST_SIZES = 8


@dataclass(frozen=True)
class Processes(Position):
    """Connected processes; all must call the same methods in the same order.

    If one of them fails or ends, the others raise its error or a `ProcessError` instead of waiting for it.
    """

    _connection: "_Connection | None" = None  # None: a single process

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather the tensors of all processes in the first one, ordered by rank; others get their own.

        Args:
            tensor: on the CPU; the shape may differ between processes, the dtype may not.
        """
        if self.world_size == 1:
            return [tensor]
        with self._reached() as group:
            if not self.is_first:
                sizes = [tensor.ndim, *tensor.shape]
                dist.send(torch.tensor(sizes + [0] * (_MOST_SIZES - len(sizes)), device="cpu"), 0, group)
                if tensor.numel():
                    dist.send(tensor.contiguous(), 0, group)
                return [tensor]
            gathered = [tensor]
            for rank in range(1, self.world_size):
                header = torch.empty(_MOST_SIZES, dtype=torch.int64, device="cpu")
                dist.recv(header, rank, group)
                rank_sizes = header[1 : 1 + int(header[0])].tolist()
                received = torch.empty(rank_sizes, dtype=tensor.dtype, device="cpu")
                if received.numel():
                    dist.recv(received, rank, group)
                gathered.append(received)
            return gathered

    def as_first(self, answer: bool) -> bool:
        """Broadcast the `answer` of the first process."""
        if self.world_size == 1:
            return answer
        broadcast = torch.tensor([int(answer)], device="cpu")
        with self._reached() as group:
            dist.broadcast(broadcast, 0, group)
        return bool(broadcast)

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        self.raise_any(None)

    def raise_any(self, error: BaseException | None) -> None:
        """Wait for all processes; if some have an error, raise the one of the lowest rank in all of them.

        Args:
            error: the error of this process, or None.

        Raises:
            BaseException: `error` itself in the process that it comes from. In other processes an equal
                `InputError`, `DataError`, `OSError` or `KeyboardInterrupt`, or a `ProcessError`.
        """
        failures = [None if error is None else Failure.of(error, self.rank)]
        if self.world_size > 1:
            own, failures = failures[0], [None] * self.world_size
            with self._reached() as group:
                dist.all_gather_object(failures, own, group)
        first = next(filter(None, failures), None)
        if first is not None:
            raise first.error() if error is None or Failure.of(error, self.rank) != first else error

    @contextmanager
    def _reached(self) -> Iterator[dist.ProcessGroup]:
        if self._connection is None or self._connection.group is None:
            raise RuntimeError("these processes are not connected")
        try:
            yield self._connection.group
        except RuntimeError as error:  # gloo: connection closed by peer
            traceback.clear_frames(error.__traceback__)  # they keep the group and its connections alive
            raise self._connection.reason() from None


ALONE = Processes()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Connect the processes that `torchrun` started, within this context; without torchrun, only this one.

    All processes leave the context together. An exception in one is raised in the others when they wait for
    another process or leave the context. PyTorch's default process group is initialised with gloo.

    Raises:
        InputError: if RANK and WORLD_SIZE are set, but the processes cannot connect.
        BaseException: an error of any process, see `Processes.raise_any`.
    """
    if not several():
        yield ALONE
        return
    position = launched()
    connection = _join(position)
    try:
        processes = Processes(position.rank, position.world_size, connection)
        yield processes
        processes.wait()
    except BaseException as own:
        error = connection.fail(own)
        raise error from (error.__cause__ if error is own else own)
    finally:
        connection.close()


def _join(position: Position) -> "_Connection":
    rank, count = position.rank, position.world_size
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, count, timeout=_CONNECT_TIMEOUT)))
        number = store.add(f"joined {rank}", 1)  # a process may connect several times
        store = PrefixStore(f"{number}", store)
        _meet(store, "here", position, _CONNECT_TIMEOUT)  # with a shorter timeout than gloo's
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_WORK_TIMEOUT)
        return _Connection(position, store)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "WORLD_SIZE",
            f"{os.environ['WORLD_SIZE']}, but the processes cannot be joined "
            f"({str(error).splitlines()[0]}); start them with torchrun",
        ) from error


def _meet(store: Store, what: str, position: Position, timeout: timedelta) -> None:
    """Wait until all processes have called this; raises a RuntimeError after the timeout."""
    store.set(f"{what} {position.rank}", "")
    store.wait([f"{what} {rank}" for rank in range(position.world_size)], timeout)


class _Connection:
    """The connection to the other processes: a group for tensors, and a store for failures."""

    def __init__(self, position: Position, store: Store) -> None:
        self._position, self._store = position, store
        # Not the default group: a network may keep its connections open after it was destroyed.
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=_WORK_TIMEOUT)

    def reason(self) -> BaseException:
        """The error to raise if another process cannot be reached."""
        with suppress(RuntimeError):  # the first process hosts the store, and may have been killed
            if self._store.check([_FAILED]):
                return Failure(*json.loads(self._store.get(_FAILED))).error()
        return ProcessError(
            "another process ended without an error message; it may have been killed for lack of memory"
        )

    def fail(self, own: BaseException) -> BaseException:
        """Announce an exception and close the connections, so that no process waits for this one.

        Returns:
            `own`, or the exception that another process announced first; it is the same in all processes.
        """
        error, rank = own, self._position.rank
        failure = Failure.of(own, rank)
        with suppress(RuntimeError):  # the store is gone
            first = Failure(*json.loads(self._store.compare_set(_FAILED, "", json.dumps(failure))))
            if first != failure:
                failure, error = first, first.error()
            self.close()
            self._store.set(f"received {rank}", "")
            if rank in (0, failure.rank):  # the first process hosts the store
                with suppress(RuntimeError):  # a process was killed, or is still computing
                    _meet(self._store, "received", self._position, _RECEIVE_TIMEOUT)
            # The first process reports it if it received it in time, otherwise the process that failed.
            to_first = rank != 0 and (rank != failure.rank or self._store.check(["received 0"]))
            leave_report(error, to_another=to_first)
        return error

    def close(self) -> None:
        """Close the connections."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            dist.destroy_process_group()
            self.group = None
