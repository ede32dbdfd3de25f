"""Exceptions that one process raises and that the others raise, too."""

import traceback
from typing import Any, NamedTuple

from tvmatch.errors import DataError, InputError

_FAILURE = "_failure_of_a_process"  # an attribute of exceptions
_KINDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (InputError, DataError, OSError, KeyboardInterrupt)
}


class ProcessError(RuntimeError):
    """Another process failed with an unexpected error, or ended."""


class Failure(NamedTuple):
    """An exception as text, since not all exceptions can be pickled.

    Attributes:
        rank: of the process that raised it.
        kind: name of the class that the other processes raise; it determines the exit code.
        arguments: arguments of that class.
        trace: the traceback.
    """

    rank: int
    kind: str
    arguments: list[Any]
    trace: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "Failure":
        """The failure for an exception of process `rank`, or of the process where it occurred first."""
        received: Failure | None = getattr(error, _FAILURE, None)
        if received is not None:
            return received
        kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), ProcessError.__name__)
        arguments: list[Any] = [str(error)]
        if isinstance(error, InputError | KeyboardInterrupt):
            arguments = list(error.args)
        elif isinstance(error, OSError) and error.errno is not None:
            arguments = [error.errno, error.strerror, error.filename and str(error.filename)]
        elif not isinstance(error, DataError | OSError | ProcessError):
            quoted = " ".join("".join(traceback.format_exception_only(error)).split())
            arguments = [f"process {rank} has failed: {quoted}"]
        failure = cls(rank, kind, arguments, "".join(traceback.format_exception(error)))
        setattr(error, _FAILURE, failure)
        return failure

    def error(self) -> BaseException:
        """The exception to raise in another process."""
        error = _KINDS.get(self.kind, ProcessError)(*self.arguments)
        error.add_note(f"In process {self.rank}:\n{self.trace}")
        setattr(error, _FAILURE, self)
        return error
