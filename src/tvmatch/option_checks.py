"""Checks of the fields of options dataclasses: names, types, ranges."""

import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tvmatch.errors import InputError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    tuple[float, float]: "a pair of numbers like [1,2]",
    tuple[int, int]: "a pair of whole numbers like [1,2]",
    tuple[float, ...]: "a list of numbers like [1,2,3]",
    tuple[int, int, int]: "three whole numbers like [4,32,32]",
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean …?", or empty if no name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_fields(section: Any, name: str, *, but: tuple[str, ...] = ()) -> None:
    """Check that a dataclass has only its declared fields, with values of their types. A list may be a tuple.

    Args:
        section: the dataclass.
        name: prefix of its options, such as "training"; empty for the configuration itself.
        but: fields of any type.

    Raises:
        InputError: naming the option and, for a value of another type, the value.
    """
    kinds = get_type_hints(type(section))
    prefix = f"{name}." if name else ""
    for attribute, value in vars(section).items():
        if attribute not in kinds:
            close = suggestion(f"{prefix}{attribute}", (f"{prefix}{known}" for known in kinds))
            raise InputError(f"{prefix}{attribute}", f"no such option{close}")
        if attribute not in but:
            check_value(f"{prefix}{attribute}", value, kinds[attribute])


def check_value(name: str, value: Any, kind: Any) -> None:
    """Check that the value of the option `name` is of the type `kind`. A list may be a tuple.

    Raises:
        InputError: naming the option and the value.
    """
    if not _fits(value, kind):
        raise InputError(name, f"must be {type_in_words(kind)}, got {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Any:
        return True
    if origin is list or (origin is tuple and parts[-1] is ...):
        return isinstance(value, list | tuple) and all(_fits(x, parts[0]) for x in value)
    if origin is tuple:
        same_length = isinstance(value, list | tuple) and len(value) == len(parts)
        return same_length and all(_fits(x, part) for x, part in zip(value, parts, strict=True))
    if origin is not None:  # a container type that no option here has: its elements are not checked
        return isinstance(value, origin)
    if isinstance(value, bool):  # which Python counts among the whole numbers
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def type_in_words(kind: Any) -> str:
    """An annotation as the words of a message: "a whole number or null"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_in_words, parts))
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def require(name: str, value: float, condition: bool, expected: str) -> None:
    """Check that an option is finite and a condition on it holds.

    Raises:
        InputError: naming the option, what is expected of it, such as "positive", and the value.
    """
    if not math.isfinite(value):
        expected = f"finite and {expected}"
    elif condition:
        return
    raise InputError(name, f"must be {expected}, got {value}")


def require_whole(name: str, value: int, least: int) -> None:
    """Check that an option is at least `least`.

    Raises:
        InputError: naming the option and the value.
    """
    if value < least:
        raise InputError(name, f"must be a whole number of at least {least}, got {value}")
