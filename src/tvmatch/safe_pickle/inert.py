"""Objects that replace what a pickle names."""

from collections.abc import Callable, Iterable
from typing import Any

from tvmatch.errors import InputError


class Inert:
    """An object of a pickle, which records what it was made from and has no behaviour.

    The unpickler calls the methods below for its opcodes; each of them only stores its arguments.

    Attributes:
        class_name: name of its class, or of the function that would have returned it.
        arguments: of the call that made it.
        state: the argument of `__setstate__`, or its former `__dict__`.
        entries: its items, if it was a kind of dict.
        elements: its elements, if it was a kind of list or set.
    """

    class_name = "object"
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any]
    elements: list[Any]

    # Not in __init__, which the unpickler does not call for NEWOBJ.
    def __new__(cls, *arguments: Any, **keywords: Any) -> "Inert":
        self = super().__new__(cls)
        self.arguments = (*arguments, *keywords.values())
        self.state, self.entries, self.elements = None, {}, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, element: Any) -> None:
        """Store one element."""
        self.elements.append(element)

    add = append

    def extend(self, elements: Iterable[Any]) -> None:
        """Store elements."""
        self.elements.extend(elements)

    def __call__(self, *arguments: Any, **keywords: Any) -> "Inert":
        """Replace the result of a function that another function returned."""
        return inert_class(self.class_name)(*arguments, **keywords)


def inert_class(name: str) -> type[Inert]:
    """A new class for a name in a pickle."""
    if not isinstance(name, str):
        raise InputError("a damaged pickle: the name of a class is not text")
    return type("Inert", (Inert,), {"class_name": name})


class Dict(dict[Any, Any]):
    """Replaces subclasses of dict. Attributes that a pickle sets on it are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class Function:
    """A function of ours that a pickle may call. A pickle cannot set attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise InputError("a damaged pickle: it sets attributes of a function")


def shown(text: object) -> str:
    """Text from a file for a message: at most 80 printable characters."""
    try:
        words = str(text)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deeply nested object
        words = f"something of type {type(text).__name__}"
    words = words if len(words) <= 80 else words[:79] + "…"
    return "".join(letter if letter.isprintable() else "?" for letter in words)
