"""OmegaConf's configurations in a pickle, read from their inert stand-ins.

A pickled `DictConfig` or `ListConfig` has the state {"_content": …, "_parent": …, "_metadata": …}, a leaf
{"_val": …, …} (OmegaConf 2.0 to 2.4). Interpolations such as `${loss.cfg}` are not followed.
"""

from typing import Any

from tvmatch.safe_pickle.inert import Inert

MAX_PARENTS = 50

Plain = str | int | float | bool


def root_of(value: Any) -> Any:
    """The root of the configuration that a pickled node belongs to; None for anything else."""
    if not (isinstance(value, Inert) and value.class_name in ("DictConfig", "ListConfig")):
        return None
    for _ in range(MAX_PARENTS):
        parent = _state(value).get("_parent")
        if not isinstance(parent, Inert):
            return value
        value = parent
    return None  # its parents form a circle


def stated(root: Any, path: str) -> Plain | tuple[Plain, ...] | None:
    """The value of a configuration under a dotted path: a plain value, or a tuple of them.

    None stands for everything else: missing, empty, `???`, interpolated, or of another type.
    """
    found = _content(root)
    for part in path.split("."):
        found = _content(found.get(part)) if isinstance(found, dict) else None
    if isinstance(found, list):
        numbers = [_content(part) for part in found]
        return tuple(numbers) if all(map(_is_plain, numbers)) else None
    return found if _is_plain(found) else None


def _content(node: Any) -> Any:
    """A leaf's value, or the dict or list of a section."""
    state = _state(node)
    return state.get("_content", state.get("_val")) if isinstance(node, Inert) else node


def _state(node: Any) -> dict[Any, Any]:
    state = node.state if isinstance(node, Inert) else None
    return state if isinstance(state, dict) else {}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value != "???" and "${" not in value
    return isinstance(value, int | float)
