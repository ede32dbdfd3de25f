"""Processes that work together: they exchange small tensors, and an exception of one ends all of them.

Messages go through gloo, on the CPU: they are few, and a GPU may have no part in the work.
"""

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

_JOINING = timedelta(minutes=10)  # until all processes have started
_WAITING = timedelta(days=1)  # for the work of another process; one that has died is noticed at once
_HEARING = timedelta(seconds=5)  # until all have heard of a failure
_FAILED = "failed"  # a key of the store
_MOST_SIZES = 8


@dataclass(frozen=True)
class Processes(Position):
    """Processes that talk to each other; every one must call the same methods in the same order.

    If one has failed or died, the others raise its error, or a `ProcessError`, in place of waiting for it.
    """

    _connection: "_Connection | None" = None  # of several that are joined

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes in the order of their ranks, in the first; in others only its own.

        Args:
            tensor: on the CPU, of any shape but of the same type everywhere.
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
        """The first process's `answer`, in all of them."""
        if self.world_size == 1:
            return answer
        told = torch.tensor([int(answer)], device="cpu")
        with self._reached() as group:
            dist.broadcast(told, 0, group)
        return bool(told)

    def wait(self) -> None:
        """Go on when all have come here."""
        self.raise_any(None)

    def raise_any(self, error: BaseException | None) -> None:
        """Go on when all have come here without an error; else raise that of the lowest rank in all of them.

        Args:
            error: what has gone wrong in this process, if anything.

        Raises:
            BaseException: `error` itself in the process whose it is. In others an `InputError`, `DataError`,
                `OSError` or `KeyboardInterrupt` like it, or a `ProcessError` that quotes it.
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
    def fail_together(self) -> Iterator[None]:
        """A block without collectives that all processes run; if it raises in one, it raises in all.

        Raises:
            BaseException: see `raise_any`.
        """
        error = None
        try:
            yield
        except BaseException as own:
            error = own
        self.raise_any(error)

    @contextmanager
    def _reached(self) -> Iterator[dist.ProcessGroup]:
        if self._connection is None or self._connection.group is None:
            raise RuntimeError("these processes are not joined")
        try:
            yield self._connection.group
        except RuntimeError as error:  # gloo: connection closed by peer
            traceback.clear_frames(error.__traceback__)  # they hold the group, and so its connections
            raise self._connection.reason() from None


ALONE = Processes()


@contextmanager
def joined_processes(backend: str = "gloo") -> Iterator[Processes]:
    """The processes that `torchrun` has started, joined while the context lasts; else this one alone.

    All leave the context together. An exception in one is raised in the others as well, as soon as they wait
    for another process or leave. PyTorch's default process group is made for them.

    Args:
        backend: of the default process group.

    Raises:
        InputError: if RANK and WORLD_SIZE are set, but the processes cannot find each other.
        BaseException: what has gone wrong in any process, see `Processes.raise_any`.
    """
    if not several():
        yield ALONE
        return
    position = launched()
    connection = _join(position, backend)
    try:
        processes = Processes(position.rank, position.world_size, connection)
        yield processes
        processes.wait()
    except BaseException as own:
        error = connection.fail(own)
        raise error from (error.__cause__ if error is own else own)
    finally:
        connection.close()


def _join(position: Position, backend: str) -> "_Connection":
    rank, count = position.rank, position.world_size
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, count, timeout=_JOINING)))
        number = store.add(f"joined {rank}", 1)  # a process may join several times
        store = PrefixStore(f"{number}", store)
        _meet(store, "here", position, _JOINING)  # gloo would wait for them as long as for their work
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_WAITING)
        return _Connection(position, store)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "WORLD_SIZE",
            f"{os.environ['WORLD_SIZE']}, but the processes cannot be joined "
            f"({str(error).splitlines()[0]}); start them with torchrun",
        ) from error


def _meet(store: Store, what: str, position: Position, patience: timedelta) -> None:
    """Wait until all processes have come here; a RuntimeError if one has not."""
    store.set(f"{what} {position.rank}", "")
    store.wait([f"{what} {rank}" for rank in range(position.world_size)], patience)


class _Connection:
    """What joins this process with the others: a group for tensors, and a store to say why it stops."""

    def __init__(self, position: Position, store: Store) -> None:
        self._position, self._store = position, store
        # Not the default group: a network may keep that one, and its connections, after it was destroyed.
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=_WAITING)

    def reason(self) -> BaseException:
        """Why another process cannot be reached."""
        with suppress(RuntimeError):  # the first process keeps the store, and may have been killed
            if self._store.check([_FAILED]):
                return Failure.read(self._store.get(_FAILED)).error()
        return ProcessError(
            "another process has stopped without a word; it may have been killed for want of memory"
        )

    def fail(self, own: BaseException) -> BaseException:
        """Announce an exception and close the connections, so that no process waits for this one.

        Returns:
            `own`, or an exception that another process has announced before; all get the same.
        """
        error, rank = own, self._position.rank
        failure = Failure.of(own, rank)
        with suppress(RuntimeError):  # the store is gone
            first = Failure.read(self._store.compare_set(_FAILED, "", failure.content()))
            if first != failure:
                failure, error = first, first.error()
            self.close()
            self._store.set(f"heard {rank}", "")
            if rank in (0, failure.rank):  # the first process keeps the store
                with suppress(RuntimeError):  # one was killed, or does not listen while it computes
                    _meet(self._store, "heard", self._position, _HEARING)
            # The first process reports it if it has heard of it, else the one that has failed.
            leave_report(error, to_another=rank != 0 and (rank != failure.rank or self._first_has_heard()))
        return error

    def _first_has_heard(self) -> bool:
        return bool(self._store.check(["heard 0"]))

    def close(self) -> None:
        """Close the connections."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            dist.destroy_process_group()
            self.group = None
