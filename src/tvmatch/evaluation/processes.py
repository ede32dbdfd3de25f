"""The processes that share an evaluation: each takes a part, the first one has the results.

Started by `torchrun`, they find each other through its environment variables. Messages go through gloo, on
the CPU: they are few, and a GPU may have no part in them.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tvmatch import torchrun
from tvmatch.errors import InputError

# The first process may decode a million images while the others wait. A process that died is noticed at once.
_PATIENCE = timedelta(days=1)
_MOST_SIZES = 8


@dataclass(frozen=True)
class Processes:
    """One of the processes that share a piece of work; by itself by default.

    Attributes:
        rank: number of this process.
        count: of all processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that has the results."""
        return self.rank == 0

    def share(self, parts: int) -> range:
        """Consecutive numbers of 0 … parts − 1 that are this process's; the first has one if there is any."""
        each, more = divmod(parts, self.count)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes in the order of their numbers, in the first; in others only its own.

        Args:
            tensor: on the CPU, of any shape but of the same type everywhere.
        """
        if self.count == 1:
            return [tensor]
        with _noticing_the_dead():
            if not self.is_first:
                sizes = [tensor.ndim, *tensor.shape]
                dist.send(torch.tensor(sizes + [0] * (_MOST_SIZES - len(sizes)), device="cpu"), 0)
                if tensor.numel():
                    dist.send(tensor.contiguous(), 0)
                return [tensor]
            gathered = [tensor]
            for rank in range(1, self.count):
                header = torch.empty(_MOST_SIZES, dtype=torch.int64, device="cpu")
                dist.recv(header, rank)
                rank_sizes = header[1 : 1 + int(header[0])].tolist()
                received = torch.empty(rank_sizes, dtype=tensor.dtype, device="cpu")
                if received.numel():
                    dist.recv(received, rank)
                gathered.append(received)
            return gathered

    def as_first(self, answer: bool) -> bool:
        """The first process's `answer`, in all of them."""
        if self.count == 1:
            return answer
        told = torch.tensor([int(answer)], device="cpu")
        with _noticing_the_dead():
            dist.broadcast(told, 0)
        return bool(told)

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            with _noticing_the_dead():
                dist.barrier()


ALONE = Processes()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """The processes that `torchrun` has started, joined while the context lasts; else this one alone.

    Raises:
        InputError: if RANK and WORLD_SIZE are set, but the processes cannot find each other.
    """
    if not torchrun.several():
        yield ALONE
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "WORLD_SIZE",
            f"{os.environ['WORLD_SIZE']}, but the processes cannot be joined "
            f"({str(error).splitlines()[0]}); start them with torchrun",
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _noticing_the_dead() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: connection closed by peer
        raise ConnectionResetError(
            errno.ECONNRESET, "it has stopped", "another process of this evaluation"
        ) from error
