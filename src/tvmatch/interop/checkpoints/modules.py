"""PyTorch modules of a pickle as state dicts: names and stored tensors from their inert stand-ins."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tvmatch.interop.checkpoints.authors import WRAPPERS
from tvmatch.safe_pickle.inert import Inert, InertObject, Refused, shown
from tvmatch.safe_pickle.torch_files import StoredTensor

MAX_MODULES = 20_000
MAX_DEPTH = 50
MAX_NAME = 200
COUNTERS = frozenset({"n_averaged"})  # of `torch.optim.swa_utils.AveragedModel`


def kind(value: Any) -> str:
    """What a value is, in a word or two."""
    if isinstance(value, InertObject):
        return f"an object of class {shown(value.class_name)}"
    name = "tensor" if isinstance(value, StoredTensor) else type(value).__name__
    name = "object" if isinstance(value, Inert) else name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def modules(root: Any, entry: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Paths and states of a pickled module and all below it, without the levels that wrappers add.

    Args:
        root: the module.
        entry: what it is called in messages.

    Raises:
        Refused: for anything else than modules within modules, or too many.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    count = 0
    while waiting:
        path, module = waiting.pop()
        where = ".".join((entry, *path))
        count += 1
        if count > MAX_MODULES or len(path) > MAX_DEPTH:  # also where an object contains itself
            raise Refused(
                f"{entry} has more than {MAX_MODULES} modules, or nests them more than {MAX_DEPTH} deep"
            )
        state = _state(module)
        if state is None:
            raise Refused(f"{shown(where)} is {kind(module)}, no PyTorch module")
        children = {name: child for name, child in state["_modules"].items() if child is not None}
        is_wrapper = len(children) == 1 and children.keys() <= {"module", *WRAPPERS}
        is_wrapper = is_wrapper and not any(True for _ in own_tensors(state))
        waiting += [(path if is_wrapper else (*path, name), child) for name, child in children.items()]
        if not is_wrapper:
            yield path, state


def _state(module: Any) -> dict[str, Any] | None:
    """The state of a pickled PyTorch module, or None for anything else."""
    if isinstance(module, InertObject) and module.class_name == "OptimizedModule" and module.arguments:
        return {"_parameters": {}, "_buffers": {}, "_modules": {"_orig_mod": module.arguments[0]}}
    state = module.state if isinstance(module, Inert) else None
    state = state[0] if isinstance(state, tuple) and state else state  # (__dict__, slots)
    if not isinstance(state, dict):
        return None
    for part in ("_parameters", "_buffers", "_modules"):
        names = state.get(part)
        if not isinstance(names, dict) or any(not isinstance(x, str) or "." in x for x in names):
            return None
    return state


def own_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A module's own parameters and buffers, those that a state dict has."""
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, set) else set()
    for name, value in (*state["_parameters"].items(), *state["_buffers"].items()):
        if value is not None and name not in transient and name not in COUNTERS:
            yield name, value


def tensors_of(stored: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, read.

    Raises:
        Refused: if something else is among them, or they are views of fewer numbers.
    """
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise Refused(f"{shown(name)} is {kind(value)} where a tensor was expected")
        if len(name) > MAX_NAME or not name.isprintable():
            raise Refused(f"a tensor cannot be called {shown(name)}")
    # No two weights of a network share numbers; views of one storage could be a network of any size.
    needed = sum(math.prod(value.shape) * value.storage.dtype.itemsize for value in stored.values())
    there = sum(x.count * x.dtype.itemsize for x in {value.storage for value in stored.values()})
    if needed > there:
        raise Refused(f"its tensors overlap: they take {needed:,} bytes, of which the file has {there:,}")
    return {name: value.tensor() for name, value in stored.items()}
