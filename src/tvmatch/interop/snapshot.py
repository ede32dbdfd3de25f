"""Networks in files of other projects, read without executing anything: snapshots, state dicts, safetensors.

The TVM authors' snapshots are pickles of whole Python objects, which carry their own source code
(`torch_utils.persistence`). Only the tensors in them are used; the code is not even looked at.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.interop.authors import guess_attention, network_from_authors
from tvmatch.interop.inert import NUMPY_ARRAYS, Inert, Refused, shown
from tvmatch.interop.pickles import Stream, load, map_file
from tvmatch.interop.sit import is_sit, network_from_sit, sit_heads
from tvmatch.interop.torch_files import TENSORS, StoredTensor, is_torch_file, load_torch
from tvmatch.models import DiT

Entry = Literal["ema", "net"]
ENTRIES: tuple[Entry, ...] = ("ema", "net")  # in order of preference

MAX_MODULES = 20_000
MAX_DEPTH = 50
MAX_NAME = 200

# Objects of these modules' classes stand beside the weights; a compiled network brings its compiler along.
# Which they are does not matter: nothing is made of them. The lists only tell a snapshot from something else.
_PACKAGES = (
    *("torch.nn", "torch.optim", "torch.utils", "torch._dynamo", "torch._inductor", "torch._functorch"),
    *("timm", "diffusers", "torch_utils", "dnnlib", "training", "models", "networks"),
)
_OTHERS = {
    "torch": ("_TorchCompileInductorWrapper", "_TorchCompileWrapper"),
    "torch._C._nn": ("gelu", "silu"),
    **dict.fromkeys(
        ("builtins", "__builtin__"), ("object", "dict", "list", "tuple", "int", "float", "str", "getattr")
    ),
    "contextlib": ("nullcontext",),
    "functools": ("partial",),
    "collections": ("defaultdict",),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
}
_RECONSTRUCTION = ("torch_utils.persistence", "_reconstruct_persistent_obj")


class _Object(Inert):
    """An object of a class whose name is all that is known of it."""

    def __init__(self, class_name: str, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.class_name = class_name


def _persistent(description: Any, /) -> _Object:
    """What `_reconstruct_persistent_obj` would have made by executing source code: class name and state."""
    if not isinstance(description, dict) or not isinstance(description.get("class_name"), str):
        raise TypeError
    stands_in = _Object(description["class_name"])
    stands_in.state = description.get("state")
    return stands_in


class _Names(dict[tuple[str, str], Callable[..., Any]]):
    """The names that a snapshot may refer to: tensors, arrays, and classes of packages that are admitted."""

    def __init__(self, packages: Iterable[str]) -> None:
        super().__init__({**NUMPY_ARRAYS, **TENSORS, _RECONSTRUCTION: _persistent})
        self.packages = (*_PACKAGES, *packages)

    def __missing__(self, key: tuple[str, str]) -> Callable[..., Any]:
        module, name = key
        of_package = any(f"{module}.".startswith(f"{package}.") for package in self.packages)
        if "." in name or not (of_package or name in _OTHERS.get(module, ())):
            words = shown(f"{module}.{name}")
            raise Refused(
                f"it refers to {words}, which no network needs; nothing was run (admit={shown(module)} "
                "reads on, still without running anything)"
            )
        return partial(_Object, name)


@dataclass(frozen=True)
class Snapshot:
    """The tensors of one network in a file.

    Attributes:
        tensors: by their names in the file, without the levels that compilation and DDP add.
        entry: which network of the file, "ema" or "net"; "" if the file is one state dict.
        beside: what else the file holds, as `name: kind`, unused.
        options: numbers and words that the file says the network was made with; nothing relies on them.
    """

    tensors: dict[str, Tensor]
    entry: str = ""
    beside: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)


class ImportedNetwork(NamedTuple):
    """A network of ours with a file's weights.

    Attributes:
        network: in float32.
        is_flow: whether the file's network knows one time only (the layout of SiT).
        dtypes: the precisions that the weights have in the file.
    """

    network: DiT
    is_flow: bool
    dtypes: tuple[str, ...]


def read_snapshot(path: Path, entry: Entry | None = None, admit: Iterable[str] = ()) -> Snapshot:
    """Find a network's tensors in a pickled snapshot, a file of `torch.save`, or a safetensors file.

    The kind of file is told from its content. Nothing in it is executed or imported.

    Args:
        path: the file.
        entry: which network of a file that holds several; by default "ema", else "net".
        admit: packages or modules whose names a pickle may have besides those that are usual. Objects of
            their classes are inert like all others.

    Raises:
        InputError: if the file cannot be read, is damaged, refers to anything unexpected, or holds no network
            of this name.
    """
    try:
        data, names = map_file(path), _Names(admit)
        if bytes(data[8:9]) == b"{":
            return _one_network(_unwrapped(_safetensors(path)), entry)
        content = load_torch(data, names) if is_torch_file(data) else load(Stream(data), names)
        return _from_content(content, entry)
    except Refused as error:
        raise InputError(f"{path}: {error}") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Refused(f"truncated or not a safetensors file ({shown(error)})") from None


def _one_network(tensors: dict[str, Tensor], entry: Entry | None) -> Snapshot:
    if entry is not None:
        raise Refused(f"it holds the tensors of one network; there is no {entry} to choose")
    return Snapshot(tensors)


def _from_content(content: Any, entry: Entry | None) -> Snapshot:
    """The network in what a file holds: a state dict, or a dict that has one or a module under its name."""
    if not isinstance(content, dict):
        raise Refused(f"it holds {_kind(content)} where a dict with a network under ema or net was expected")
    if content and all(isinstance(value, StoredTensor) for value in content.values()):
        return _one_network(_tensors(content), entry)
    for name in ENTRIES if entry is None else (entry,):
        network = content.get(name)
        if network is None:
            continue
        beside = tuple(f"{shown(key)}: {_kind(value)}" for key, value in content.items() if key != name)
        if isinstance(network, dict):
            return Snapshot(_tensors(network), name, beside)
        modules = dict(_modules(network, name))
        stored = {".".join((*path, leaf)): x for path, state in modules.items() for leaf, x in _own(state)}
        return Snapshot(_tensors(stored), name, beside, _options(modules))
    found = ", ".join(shown(key) for key in list(content)[:8]) or "nothing"
    raise Refused(f"no network under {entry or 'ema or net'}; the file holds {found}")


def _kind(value: Any) -> str:
    """What a value is, in a word or two."""
    if isinstance(value, _Object):
        return f"an object of class {shown(value.class_name)}"
    kind = "tensor" if isinstance(value, StoredTensor) else type(value).__name__
    kind = "object" if isinstance(value, Inert) else kind
    return f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"


def _modules(root: Any, entry: str) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Paths and states of a pickled module and all below it, without the levels of compilation and of DDP."""
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
            raise Refused(f"{shown(where)} is {_kind(module)}, no PyTorch module")
        children = {name: child for name, child in state["_modules"].items() if child is not None}
        is_wrapper = children.keys() in ({"_orig_mod"}, {"module"}) and not any(True for _ in _own(state))
        waiting += [(path if is_wrapper else (*path, name), child) for name, child in children.items()]
        if not is_wrapper:
            yield path, state


def _state(module: Any) -> dict[str, Any] | None:
    """The state of a pickled PyTorch module, or None for anything else."""
    if isinstance(module, _Object) and module.class_name == "OptimizedModule" and module.arguments:
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


def _own(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A module's own parameters and buffers, those that a state dict has."""
    transient = state.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, set) else set()
    for name, value in (*state["_parameters"].items(), *state["_buffers"].items()):
        if value is not None and name not in transient:
            yield name, value


def _tensors(stored: dict[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, read, under names without the levels of compilation and of DDP."""
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise Refused(f"{shown(name)} is {_kind(value)} where a tensor was expected")
    # No two weights of a network share numbers; views of one storage could be a network of any size.
    needed = sum(math.prod(value.shape) * value.storage.dtype.itemsize for value in stored.values())
    there = sum(x.count * x.dtype.itemsize for x in {value.storage for value in stored.values()})
    if needed > there:
        raise Refused(f"its tensors overlap: they take {needed:,} bytes, of which the file has {there:,}")
    return _unwrapped({name: value.tensor() for name, value in stored.items()})


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in tensors:
        if len(name) > MAX_NAME or not name.isprintable():
            raise Refused(f"a tensor cannot be called {shown(name)}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    # The level may stand anywhere: what is compiled may be a part of a network.
    names = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in tensors}
    if len(set(names.values())) < len(names):
        raise Refused("it holds a network both compiled and not compiled under one name")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _options(modules: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, str]:
    """Plain values among the arguments that the outermost module says it was made with."""
    arguments = modules[()].get("_init_kwargs")
    if not isinstance(arguments, dict):
        return {}
    plain = {name: value for name, value in arguments.items() if isinstance(value, str | int | float | bool)}
    return {shown(name): shown(value) for name, value in plain.items()}


def import_network(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    modulation_norm: bool = True,
    data_time: Literal[0, 1] = 1,
) -> ImportedNetwork:
    """Our network with the weights of a file, in the authors' names or in SiT's.

    Args:
        tensors: of a `Snapshot`.
        heads: number of attention heads; by default as the tensors or the presets tell.
        modulation_norm: whether the network normalises its modulation vectors, which no tensor tells.
        data_time: of a SiT, the time that stands for data.

    Raises:
        InputError: if a tensor is missing, left over, of another shape or type, or not finite in float32.
    """
    others = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if others:
        raise InputError(f"state_dict: {len(others)} tensors are not of floating point, {others[:3]}")
    single = {name: tensor.float() for name, tensor in tensors.items()}
    broken = [name for name, tensor in single.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError(f"state_dict: numbers that are not finite in {len(broken)} tensors, {broken[:3]}")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    is_flow = is_sit(single)
    if is_flow:
        heads = sit_heads(single) if heads is None else heads
        network = network_from_sit(single, heads=heads, data_time=data_time)
    else:
        guessed_heads, qk_norm = guess_attention(single)
        heads = guessed_heads if heads is None else heads
        network = network_from_authors(single, heads=heads, qk_norm=qk_norm, modulation_norm=modulation_norm)
    return ImportedNetwork(network.requires_grad_(False).eval(), is_flow, tuple(dtypes))
