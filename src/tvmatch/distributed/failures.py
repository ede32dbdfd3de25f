"""An exception of one process, for the others to raise."""

import json
import traceback
from typing import Any, NamedTuple

from tvmatch.errors import DataError, InputError

_FAILURE = "_failure_of_a_process"  # an attribute of exceptions
_KINDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (InputError, DataError, OSError, KeyboardInterrupt)
}


class ProcessError(RuntimeError):
    """Another process has failed by an error that is no user's mistake, or has stopped without a word."""


class Failure(NamedTuple):
    """An exception as text, since not every exception can be pickled.

    Attributes:
        rank: of the process that has raised it.
        kind: name of the class that others raise, so that all end with the same exit code.
        arguments: of that class.
        trace: the traceback.
    """

    rank: int
    kind: str
    arguments: list[Any]
    trace: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "Failure":
        """Of an exception that the process `rank` has raised, or was told of."""
        told: Failure | None = getattr(error, _FAILURE, None)
        if told is not None:
            return told
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

    @classmethod
    def read(cls, content: bytes) -> "Failure":
        """From `content()`."""
        return cls(*json.loads(content))

    def content(self) -> str:
        """As JSON."""
        return json.dumps(self)

    def error(self) -> BaseException:
        """An exception like the one of the other process."""
        error = _KINDS.get(self.kind, ProcessError)(*self.arguments)
        error.add_note(f"In process {self.rank}:\n{self.trace}")
        setattr(error, _FAILURE, self)
        return error
