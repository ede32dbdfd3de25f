"""Networks in files of other projects, read without executing anything: snapshots, state dicts, safetensors.

The TVM authors' snapshots are pickles of whole Python objects, which carry their own source code
(`torch_utils.persistence`). The tensors in them are used, and what their configuration says of the training;
the code is not even looked at.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.interop.checkpoints.authors import (
    guess_attention,
    network_from_authors,
    split_prefix,
    without_prefix,
)
from tvmatch.interop.checkpoints.modules import COUNTERS, kind, modules, own_tensors, tensors_of
from tvmatch.interop.checkpoints.sit import is_sit, network_from_sit, sit_heads
from tvmatch.interop.checkpoints.training_facts import TrainingFacts, read_facts
from tvmatch.models import DiT
from tvmatch.safe_pickle.inert import NUMPY_ARRAYS, InertObject, Refused, shown
from tvmatch.safe_pickle.machine import load
from tvmatch.safe_pickle.streams import Stream, map_file
from tvmatch.safe_pickle.torch_files import TENSORS, StoredTensor, is_torch_file, load_torch

ENTRIES = ("ema", "net")  # in order of preference

# Objects of these modules' classes stand beside the weights; a compiled network brings its compiler along, a
# configuration its types. Which they are does not matter: nothing is made of them. The lists only tell a
# snapshot from something else.
_PACKAGES = (
    *("torch.nn", "torch.optim", "torch.utils", "torch._dynamo", "torch._inductor", "torch._functorch"),
    *("timm", "diffusers", "omegaconf", "torch_utils", "dnnlib", "training", "models", "networks"),
)
_TYPES = ("object", "dict", "list", "tuple", "int", "float", "complex", "bool", "str", "type")
_OTHERS = {
    "torch": ("_TorchCompileInductorWrapper", "_TorchCompileWrapper"),
    "torch._C._nn": ("gelu", "silu"),
    "builtins": (*_TYPES, "getattr"),
    "__builtin__": (*_TYPES, "getattr", "long", "unicode"),  # as protocol 2 calls them
    "typing": ("Any", "Dict", "List", "Optional", "Tuple", "Union"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    **dict.fromkeys(("operator", "_operator"), ("getitem",)),  # of the types in `typing`
    "contextlib": ("nullcontext",),
    "functools": ("partial",),
    "collections": ("defaultdict",),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
}
_RECONSTRUCTION = ("torch_utils.persistence", "_reconstruct_persistent_obj")


def _persistent(description: Any, /) -> InertObject:
    """What `_reconstruct_persistent_obj` would have made by executing source code: class name and state."""
    if not isinstance(description, dict) or not isinstance(description.get("class_name"), str):
        raise TypeError
    stands_in = InertObject(description["class_name"])
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
        return partial(InertObject, name)


@dataclass(frozen=True)
class Snapshot:
    """The tensors of one network in a file.

    Attributes:
        tensors: by their names in the file, without the levels that wrappers add.
        entry: which network of the file, "ema" or "net" for example; "" if the file is one state dict.
        beside: what else the file holds, as `name: kind`, unused.
        options: numbers and words that the file says the network was made with; nothing relies on them.
        facts: what the file says of its training.
    """

    tensors: dict[str, Tensor]
    entry: str = ""
    beside: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    facts: TrainingFacts = field(default_factory=TrainingFacts)


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


def read_snapshot(path: Path, entry: str | None = None, admit: Iterable[str] = ()) -> Snapshot:
    """Find a network's tensors in a pickled snapshot, a file of `torch.save`, or a safetensors file.

    The kind of file is told from its content. Nothing in it is executed or imported.

    Args:
        path: the file.
        entry: which network of a file that holds several, by its key; by default "ema", else "net".
        admit: packages or modules whose names a pickle may have besides those that are usual. Objects of
            their classes are inert like all others.

    Raises:
        InputError: if the file cannot be read, is damaged, refers to anything unexpected, contradicts itself,
            or holds no network of this name.
    """
    try:
        data, names = map_file(path), _Names(admit)
        if bytes(data[8:9]) == b"{":
            return _one_network(_safetensors(path), entry)
        content = load_torch(data, names) if is_torch_file(data) else load(Stream(data), names)
        return _from_content(content, entry)
    except Refused as error:
        raise InputError(path, str(error)) from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Refused(f"truncated or not a safetensors file ({shown(error)})") from None


def _from_content(content: Any, entry: str | None) -> Snapshot:
    """The network in what a file holds: a state dict, or a dict that has one or a module under its name."""
    if not isinstance(content, dict):
        raise Refused(f"it holds {kind(content)} where a dict with a network under ema or net was expected")
    if content and all(isinstance(value, StoredTensor) for value in content.values()):
        return _one_network(tensors_of(content), entry)
    for name in ENTRIES if entry is None else (entry,):
        network = content.get(name)
        if network is None:
            continue
        beside = tuple(f"{shown(key)}: {kind(value)}" for key, value in content.items() if key != name)
        if isinstance(network, dict):
            facts = read_facts({}, content.values())
            return Snapshot(_unwrapped(tensors_of(network)), name, beside, facts=facts)
        states = dict(modules(network, name))
        stored = {
            ".".join((*path, leaf)): x for path, state in states.items() for leaf, x in own_tensors(state)
        }
        tensors = _unwrapped(tensors_of(stored))
        return Snapshot(tensors, name, beside, _options(states), read_facts(states[()], content.values()))
    found = ", ".join(shown(key) for key in list(content)[:8]) or "nothing"
    raise Refused(f"no network under {shown(entry or 'ema or net')}; the file holds {found}")


def _one_network(tensors: dict[str, Tensor], entry: str | None) -> Snapshot:
    """The network of a state dict, or one of several whose names begin with ema, net, …"""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        levels = split_prefix(name)[0]
        group = next((level for level in ENTRIES if level in levels), "")
        groups.setdefault(group, {})[name] = tensor
    if entry is not None and entry not in groups:
        raise Refused(f"it holds the tensors of one network; there is no {shown(entry)} to choose")
    chosen = next((name for name in (*ENTRIES, "") if name in groups), "") if entry is None else entry
    beside = tuple(
        f"{name or 'others'}: {len(group)} tensors" for name, group in groups.items() if name != chosen
    )
    return Snapshot(_unwrapped(groups.get(chosen, {})), chosen, beside)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under names without wrappers, and without what averages count."""
    weights = {name: tensor for name, tensor in tensors.items() if name.split(".")[-1] not in COUNTERS}
    try:
        return without_prefix(weights)
    except InputError as error:
        raise Refused(str(error)) from None


def _options(states: dict[tuple[str, ...], dict[str, Any]]) -> dict[str, str]:
    """Plain values among the arguments that the outermost module says it was made with."""
    arguments = states[()].get("_init_kwargs")
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
    label_dropout: bool = True,
) -> ImportedNetwork:
    """Our network with the weights of a file, in the authors' names or in SiT's.

    Args:
        tensors: of a `Snapshot`.
        heads: number of attention heads; by default as the tensors or the presets tell.
        modulation_norm: whether the network normalises its modulation vectors, which no tensor tells.
        data_time: of a SiT, the time that stands for data.
        label_dropout: whether it was trained with dropped labels; see `network_from_authors`.

    Raises:
        InputError: if a tensor is missing, left over, of another shape or type, or not finite in float32.
    """
    others = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if others:
        raise InputError("state_dict", f"{len(others)} tensors are not of floating point, {others[:3]}")
    single = {name: tensor.float() for name, tensor in tensors.items()}
    broken = [name for name, tensor in single.items() if not tensor.isfinite().all()]
    if broken:
        raise InputError("state_dict", f"numbers that are not finite in {len(broken)} tensors, {broken[:3]}")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    is_flow = is_sit(single)
    if is_flow:
        heads = sit_heads(single) if heads is None else heads
        network = network_from_sit(single, heads=heads, data_time=data_time, label_dropout=label_dropout)
    else:
        guessed_heads, qk_norm = guess_attention(single)
        heads = guessed_heads if heads is None else heads
        network = network_from_authors(
            single,
            heads=heads,
            qk_norm=qk_norm,
            modulation_norm=modulation_norm,
            label_dropout=label_dropout,
        )
    return ImportedNetwork(network.requires_grad_(False).eval(), is_flow, tuple(dtypes))
