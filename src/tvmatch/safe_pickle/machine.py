"""Pickles read as data: a small machine for their opcodes that looks up nothing and calls only stand-ins.

Python's own unpickler imports what a file names and calls it; PyTorch's `weights_only` one admits calls such
as `bytearray(10**10)`. Here the opcodes, decoded by the standard library's `pickletools`, act on lists, dicts
and numbers alone. A name in the file must be a key of an allow-list, and means a function of ours.
"""

import pickletools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from tvmatch.errors import InputError
from tvmatch.safe_pickle.inert import (
    CONTAINERS,
    NUMPY_ARRAYS,
    Global,
    Inert,
    InertObject,
    Refused,
    StandIns,
    fill_array,
    key,
    shown,
)
from tvmatch.safe_pickle.streams import LONG_READ, Stream, map_file

__all__ = ["CONTAINERS", "NUMPY_ARRAYS", "Inert", "Refused", "StandIns", "restricted_load"]

MAX_OPERATIONS, MAX_NESTING = 4_000_000, 500  # a network of a thousand tensors takes 100,000 operations
MAX_USES = 4  # how often all of a file may be handed to stand-ins, which copy what they are given


def restricted_load(data: bytes | Path, allowed: StandIns, *, what: str) -> Any:
    """The content of a pickle, without running anything of it.

    Numbers, text, tuples, lists, dicts and sets come as they are, bytes of a megabyte or more as read-only
    memory views. A name in the pickle must be a key (module, name) of `allowed`; its value is called in place
    of what the name means, and must be harmless whatever its arguments. State that a pickle gives to an
    object goes to `Inert` stand-ins and NumPy arrays; that of a dict is dropped.

    Args:
        data: the pickle, or the path of the file that holds it.
        allowed: stand-ins, such as `CONTAINERS | NUMPY_ARRAYS`.
        what: the file's name in error messages.

    Raises:
        InputError: for a name that is not allowed, arguments that a stand-in does not take, a truncated
            pickle or something else, one of absurd length or nesting or that unfolds to far more than its
            size, or a file that cannot be read.
    """
    try:
        return load(Stream(memoryview(data) if isinstance(data, bytes) else map_file(data)), allowed)
    except Refused as error:
        raise InputError(what, str(error)) from None


def load(stream: Stream, allowed: StandIns, persistent: Callable[[Any], Any] | None = None) -> Any:
    """As `restricted_load`, from where the stream stands to just behind the pickle.

    Args:
        persistent: what stands in for a persistent id; without it they are refused.

    Raises:
        Refused: in place of an `InputError`.
    """
    machine = _Machine(allowed, persistent, LONG_READ + MAX_USES * len(stream.data))
    operations = pickletools.genops(cast(IO[bytes], stream))
    for _ in range(MAX_OPERATIONS):
        try:
            opcode, argument, _ = next(operations)
        # AttributeError: Python 2's strings are decoded by a method that long views lack.
        except (ValueError, OverflowError, AttributeError, AssertionError) as error:
            raise Refused(f"not a pickle, or a damaged or truncated one ({shown(error)})") from None
        if opcode.name == "STOP":
            content = machine.pop()
            _check_nesting(content)
            return content
        machine.step(opcode.name, argument)
    raise Refused(f"a pickle of more than {MAX_OPERATIONS:,} operations")


_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_COLLECTED: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": lambda items: _insert({}, items),
    "FROZENSET": lambda items: frozenset(map(key, items)),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LONG = (str, bytes, bytearray, memoryview, list, tuple, dict)
_FROM_MEMO = {"GET", "BINGET", "LONG_BINGET"}
_TO_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


class _Machine:
    """Stack, marks and memo of one pickle. All that is on the stack is plain data or a stand-in's result."""

    def __init__(self, allowed: StandIns, persistent: Callable[[Any], Any] | None, budget: int) -> None:
        self.allowed = allowed
        self.persistent = persistent
        self.budget = budget  # of letters, bytes and elements that stand-ins may still be given
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """The topmost object above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("a damaged pickle: it takes what is not there")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """All objects above the last mark, which goes with them."""
        if not self.marks:
            raise Refused("a damaged pickle: it takes what is not there")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, name: str, argument: Any) -> None:
        """Carry out one operation."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _COLLECTED:
            self.stack.append(_COLLECTED[name](self.pop_to_mark()))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in _FROM_MEMO:
            if int(argument) not in self.memo:
                raise Refused("a damaged pickle: it refers to what is not there")
            self.stack.append(self.memo[int(argument)])
        elif name in _TO_MEMO or name == "MEMOIZE":
            place = len(self.memo) if name == "MEMOIZE" else int(argument)
            if not 0 <= place < MAX_OPERATIONS:
                raise Refused("a damaged pickle: it numbers its objects beyond their number")
            self.memo[place] = self._top()
        elif name not in ("PROTO", "FRAME"):
            self._rarer_step(name, argument)

    def _rarer_step(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                if len(self.marks) >= MAX_NESTING:
                    raise Refused(f"nested more than {MAX_NESTING} levels deep")
                self.marks.append(len(self.stack))
            case "POP_MARK":
                self.pop_to_mark()
            case "POP" if self.marks and self.marks[-1] == len(self.stack):
                self.marks.pop()
            case "POP":
                self.pop()
            case "DUP":
                self.stack.append(self._top())
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
                _extend(self._top(), items)
            case "SETITEM" | "SETITEMS":
                items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark()
                target = self._top()
                _insert(target.entries if isinstance(target, Inert) else target, items)
            case "GLOBAL":
                self.stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                self.stack.append(self._global(module, attribute))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                keywords = self.pop() if name == "NEWOBJ_EX" else {}
                arguments, called = self.pop(), self.pop()
                self._spend(arguments, keywords)
                self.stack.append(_call(called, arguments, keywords))
            case "BUILD":
                state = self.pop()
                self._spend(state)
                _set_state(self._top(), state)
            case "PERSID" | "BINPERSID" if self.persistent is not None:
                self.stack.append(self.persistent(argument if name == "PERSID" else self.pop()))
            case _:  # persistent ids, the extension registry, Python 2's instances, buffers from elsewhere
                raise Refused(f"a pickle with the operation {name}, which is not admitted here")

    def _top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def _spend(self, *given: Any) -> None:
        """Refuse what hands the same long piece to a stand-in over and over, each time for another copy."""
        for whole in given:
            if isinstance(whole, tuple):
                self.budget -= sum(len(part) for part in whole if isinstance(part, _LONG))
            self.budget -= len(whole) if isinstance(whole, tuple | dict) else 0
        if self.budget < 0:
            raise Refused("a pickle that unfolds to far more than its size")

    def _global(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("a damaged pickle: a name that is not text")
        try:
            return Global(module, name, self.allowed[module, name])
        except KeyError:
            words = shown(f"{module}.{name}")
            raise Refused(f"it refers to {words}, which is not admitted here; nothing was run") from None


def _insert(target: Any, items: list[Any]) -> Any:
    """Set the items [key, value, key, value, …] of a dict, and return it."""
    if not isinstance(target, dict) or len(items) % 2:
        raise Refused("a damaged pickle: items for what is not a dict")
    target.update((key(items[i]), items[i + 1]) for i in range(0, len(items), 2))
    return target


def _extend(target: Any, items: list[Any]) -> None:
    """Add elements to a list or set."""
    if isinstance(target, set):
        target.update(map(key, items))
    elif isinstance(target, list | Inert):
        (target.elements if isinstance(target, Inert) else target).extend(items)
    else:
        raise Refused("a damaged pickle: elements for what is not a list")


# What a stand-in of ours may raise at arguments of any kind.
_UNFIT = (TypeError, ValueError, AttributeError, LookupError, OverflowError)


def _call(called: Any, arguments: Any, keywords: Any) -> Any:
    """What the stand-in of a global makes of its arguments."""
    if isinstance(called, Global):
        stand_in = called.stand_in
    elif isinstance(called, InertObject):
        stand_in = called.called
    else:
        raise Refused("a damaged pickle: it calls what is not a name")
    names_are_text = type(keywords) is dict and all(type(name) is str for name in keywords)
    if type(arguments) is not tuple or not names_are_text:
        raise Refused(f"a damaged pickle: {shown(called)} called without a list of arguments")
    try:
        return stand_in(*arguments, **keywords)
    except Refused:
        raise
    except _UNFIT:
        raise Refused(f"{shown(called)} with arguments that it does not take") from None


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, Inert):
        target.state = state
    elif type(target) is np.ndarray:
        try:
            fill_array(target, state)
        except Refused:
            raise
        except _UNFIT:
            raise Refused("a damaged array") from None
    elif not isinstance(target, dict):
        raise Refused(f"a damaged pickle: state for an object of type {type(target).__name__}")


_NESTING = (dict, list, tuple, set, frozenset, Inert)


def _check_nesting(root: Any) -> None:
    """Refuse what those who walk through it recursively would fail at."""
    seen: set[int] = set()
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_NESTING:
            raise Refused(f"nested more than {MAX_NESTING} levels deep")
        if id(node) in seen:
            continue
        seen.add(id(node))
        children: Iterable[Any] = ()
        if isinstance(node, dict):
            children = node.values()
        elif isinstance(node, list | tuple | set | frozenset):
            children = node
        elif isinstance(node, Inert):
            children = vars(node).values()
        waiting += [(child, depth + 1) for child in children if isinstance(child, _NESTING)]
