"""OmegaConf's configurations in a pickle, looked up in their inert stand-ins.

A pickled `DictConfig` or `ListConfig` has the state {"_content": …, "_parent": …, "_metadata": …}, a node of
it {"_val": …, …} (OmegaConf 2.0 to 2.4). Only `_content`, `_val` and `_parent` are looked at. Any of them
may hold anything, and contain itself: every walk here has an end.
"""

import re
from typing import Any

from tvmatch.safe_pickle.inert import Inert, InertObject

MAX_PARENTS = 50
MAX_STEPS = 200  # of one look-up, those of the interpolations on its way included
MAX_LENGTH = 100  # of a list

Plain = str | int | float | bool
_INTERPOLATION = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")  # an absolute path; OmegaConf knows other kinds besides


def root_of(value: Any) -> Any:
    """The configuration that a pickled part of one belongs to, or None if it is no such part."""
    if not (isinstance(value, InertObject) and value.class_name in ("DictConfig", "ListConfig")):
        return None
    for _ in range(MAX_PARENTS):
        parent = _state(value).get("_parent")
        if not isinstance(parent, InertObject):
            return value
        value = parent
    return None  # a circle


def stated(root: Any, path: str) -> Plain | tuple[Plain, ...] | None:
    """What a configuration says under a dotted path: a plain value, or a tuple of them.

    Interpolations of an absolute path, `${loss.cfg}`, are followed. None stands for everything else: what
    is missing, empty, `???`, of another kind, or refers to what is not in the file.
    """
    lookup = _Lookup(root)
    found = lookup.follow(lookup.find(path))
    if isinstance(found, list) and len(found) <= MAX_LENGTH:
        numbers = [lookup.follow(part) for part in found]
        return tuple(numbers) if all(_is_plain(number) for number in numbers) else None
    return found if _is_plain(found) else None


class _Lookup:
    """One look-up in a configuration, which gives up after a number of steps."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.steps = MAX_STEPS

    def find(self, path: str) -> Any:
        """What stands under a dotted path, an interpolation perhaps; None if nothing does."""
        found = self.root
        for part in path.split("."):
            self.steps -= 1
            content = self.follow(found) if self.steps > 0 else None
            if isinstance(content, dict):
                found = content.get(part)
            elif isinstance(content, list) and part.isdecimal() and len(part) < 9:
                found = content[int(part)] if int(part) < len(content) else None
            else:
                return None
        return found

    def follow(self, node: Any) -> Any:
        """The value of a node, and of that to which it refers: a plain value, a dict or a list."""
        while self.steps > 0:
            self.steps -= 1
            value = _content(node)
            reference = _INTERPOLATION.fullmatch(value) if isinstance(value, str) else None
            if reference is None:
                return value
            node = self.find(reference[1])
        return None


def _content(node: Any) -> Any:
    state = _state(node)
    return state.get("_content", state.get("_val")) if isinstance(node, Inert) else node


def _state(node: Any) -> dict[Any, Any]:
    state = node.state if isinstance(node, Inert) else None
    return state if isinstance(state, dict) else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value != "???" and "${" not in value
    return isinstance(value, int | float)
