"""PyTorch modules of a pickle as state dicts: names and stored tensors from their inert stand-ins."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.interop.checkpoints.authors import WRAPPERS
from tvmatch.safe_pickle.inert import Inert, shown
from tvmatch.safe_pickle.tensors import StoredTensor

MAX_MODULES = 20_000
MAX_DEPTH = 50
COUNTERS = frozenset({"n_averaged"})  # of `torch.optim.swa_utils.AveragedModel`


def kind(value: Any) -> str:
    """The kind of a value, for messages: "a dict", "an object of class Adam"."""
    if isinstance(value, Inert) and not isinstance(value, StoredTensor):
        return f"an object of class {shown(value.class_name)}"
    name = "tensor" if isinstance(value, StoredTensor) else type(value).__name__.lower()
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def modules(root: Any, entry: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Paths and states of a pickled module and its submodules, without the levels that wrappers add.

    Args:
        root: the module.
        entry: its name in messages.

    Raises:
        InputError: if something else than a module is among them, or there are too many.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    count = 0
    while waiting:
        path, module = waiting.pop()
        where = ".".join((entry, *path))
        count += 1
        if count > MAX_MODULES or len(path) > MAX_DEPTH:  # a module can contain itself
            raise InputError(
                f"{entry} has more than {MAX_MODULES} modules, or nests them more than {MAX_DEPTH} deep"
            )
        state = _state(module)
        if state is None:
            raise InputError(f"{shown(where)} is {kind(module)}, not a PyTorch module")
        children = {name: child for name, child in state["_modules"].items() if child is not None}
        is_wrapper = len(children) == 1 and children.keys() <= {"module", *WRAPPERS}
        is_wrapper = is_wrapper and not any(True for _ in own_tensors(state))
        waiting += [(path if is_wrapper else (*path, name), child) for name, child in children.items()]
        if not is_wrapper:
            yield path, state


def _state(module: Any) -> dict[str, Any] | None:
    """The state of a pickled PyTorch module, or None for anything else."""
    if not isinstance(module, Inert):
        return None
    if module.class_name == "OptimizedModule" and module.arguments:
        return {"_parameters": {}, "_buffers": {}, "_modules": {"_orig_mod": module.arguments[0]}}
    state = module.state
    state = state[0] if isinstance(state, tuple) and state else state  # (__dict__, slots)
    if not isinstance(state, dict):
        return None
    for part in ("_parameters", "_buffers", "_modules"):
        names = state.get(part)
        if not isinstance(names, dict) or any(not isinstance(x, str) or "." in x for x in names):
            return None
    return state


def own_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A module's own parameters and buffers that its state dict has."""
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, set) else set()
    for name, value in (*state["_parameters"].items(), *state["_buffers"].items()):
        if value is not None and name not in transient and name not in COUNTERS:
            yield name, value


def tensors_of(stored: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        InputError: if something else is among them, or a tensor does not fit into its storage.
    """
    tensors = {}
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor | Tensor):
            raise InputError(f"{shown(name)} is {kind(value)} where a tensor was expected")
        tensors[name] = value.tensor() if isinstance(value, StoredTensor) else value
    return tensors
