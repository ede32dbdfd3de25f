"""Exceptions: mistakes of the user (`InputError`) and failures of a data set (`DataError`)."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import overload

_NAMES: ContextVar[Mapping[str, str]] = ContextVar("names of arguments", default=MappingProxyType({}))


class InputError(ValueError):
    """A mistake in an argument, option, file or data set, described in one line.

    `InputError(subject, message)` names the argument, option or file, and says what is wrong with it,
    including the value; its text is `subject: message`. `InputError(message)` has no subject. The command
    line prints the text without a traceback and exits with code 2. In Python it is a `ValueError`.
    """

    args: tuple[str] | tuple[str, str]  # kept by pickling and copying

    @overload
    def __init__(self, message: str, /) -> None: ...

    @overload
    def __init__(self, subject: str | os.PathLike[str] | None, message: str, /) -> None: ...

    def __init__(self, first: str | os.PathLike[str] | None, message: str | None = None, /) -> None:
        super().__init__(*(str(part) for part in (first, message) if part is not None))

    @property
    def subject(self) -> str | None:
        """The argument, option or file; None if there is none."""
        return self.args[0] if len(self.args) == 2 else None

    @property
    def message(self) -> str:
        """The description of the mistake."""
        return self.args[-1]

    def __str__(self) -> str:
        return ": ".join(self.args)

    def about(self, subject: str | os.PathLike[str] | None) -> "InputError":
        """The same message with another subject, such as the option for an argument."""
        return type(self)(subject, self.message)

    def within(self, place: str | os.PathLike[str]) -> "InputError":
        """The error with the place where it was found, such as a file: `place: subject: message`."""
        return type(self)(place, str(self))

    def with_hint(self, hint: str) -> "InputError":
        """The error with a hint appended: `subject: message; hint`."""
        return type(self)(self.subject, f"{self.message}; {hint}")


class NotRegisteredError(InputError):
    """A file or configuration names a network or an objective that no imported module registers."""


class DataError(RuntimeError):
    """A data set failed with an unexpected error, or a process that reads it ended.

    The message quotes the error. The command line prints it without a traceback and exits with code 1.
    """


@contextmanager
def arguments_named(names: Mapping[str, str]) -> Iterator[None]:
    """Context in which the subject of an `InputError` is renamed by `names`.

    For programs that offer arguments of a function under other names, for example
    `with arguments_named({"count": "--images"}): …`. Outer contexts rename inner names.
    """
    around = _NAMES.get()
    token = _NAMES.set({**around, **{name: around.get(own, own) for name, own in names.items()}})
    try:
        yield
    except InputError as error:
        name = names.get(error.subject or "")
        if name is None:
            raise
        raise error.about(name) from error
    finally:
        _NAMES.reset(token)


def name_of(argument: str) -> str:
    """The caller's name of an argument, for messages that mention other arguments than their subject."""
    return _NAMES.get().get(argument, argument)


def one_line(error: BaseException) -> str:
    """An exception's message, or its class name if it is empty, as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
