"""The exceptions of the package."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import overload

_NAMES: ContextVar[Mapping[str, str]] = ContextVar("names of arguments", default=MappingProxyType({}))


class InputError(ValueError):
    """A mistake in an argument, option, file or data set, told in one line.

    `InputError(subject, message)` names the argument or file and says what is wrong with it, including
    the offending value; its text is `subject: message`. `InputError(message)` is about nothing in
    particular. The command line prints the text without a traceback and exits with code 2; from Python it
    is an ordinary `ValueError`.
    """

    args: tuple[str] | tuple[str, str]  # all that pickling and copying keep

    @overload
    def __init__(self, message: str, /) -> None: ...

    @overload
    def __init__(self, subject: str | os.PathLike[str] | None, message: str, /) -> None: ...

    def __init__(self, first: str | os.PathLike[str] | None, message: str | None = None, /) -> None:
        super().__init__(*(str(part) for part in (first, message) if part is not None))

    @property
    def subject(self) -> str | None:
        """The argument, option or file; None if the error is about none."""
        return self.args[0] if len(self.args) == 2 else None

    @property
    def message(self) -> str:
        """What is wrong with it."""
        return self.args[-1]

    def __str__(self) -> str:
        return ": ".join(self.args)

    def about(self, subject: str | os.PathLike[str] | None) -> "InputError":
        """The same message about another subject, such as the option that an argument was given by."""
        return type(self)(subject, self.message)

    def within(self, place: str | os.PathLike[str]) -> "InputError":
        """The error at the place where it was found, an option in a file say: `place: subject: message`."""
        return type(self)(place, str(self))

    def with_hint(self, hint: str) -> "InputError":
        """The error with what the caller can say about a way out: `subject: message; hint`."""
        return type(self)(self.subject, f"{self.message}; {hint}")


class NotRegisteredError(InputError):
    """A file or configuration names a network or an objective that no imported module registers."""


class DataError(RuntimeError):
    """A data set failed, by an error of its own or because a process that reads it has ended.

    The message quotes the error. The command line prints it without a traceback and exits with code 1.
    """


@contextmanager
def arguments_named(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, an `InputError` about an argument in `names` is about the name that it has there.

    For a program that offers arguments of a function under names of its own:
    `with arguments_named({"count": "--images"}): …`. Names within it are those of the next one around it.
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
    """What the caller calls an argument, for a message that mentions another one than its subject."""
    return _NAMES.get().get(argument, argument)


def one_line(error: BaseException) -> str:
    """An exception's message, or its kind if it has none, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
