"""Networks in files of other projects, read without executing anything: snapshots, state dicts, safetensors.

The TVM authors' snapshots are pickles of whole Python objects, which carry their own source code
(`torch_utils.persistence`). Only the tensors in them are used, and their configuration of the training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from tvmatch.safe_pickle.inert import shown
from tvmatch.safe_pickle.tensors import StoredTensor
from tvmatch.safe_pickle.unpickler import restricted_load

ENTRIES = ("ema", "net")  # in order of preference


@dataclass(frozen=True)
class Snapshot:
    """The tensors of one network in a file.

    Attributes:
        tensors: by their names in the file, without the levels that wrappers add.
        entry: which network of the file, "ema" or "net" for example; "" if the file is one state dict.
        unused: names of the file's other entries.
        facts: what the file says about its training.
    """

    tensors: dict[str, Tensor]
    entry: str = ""
    unused: tuple[str, ...] = ()
    facts: TrainingFacts = field(default_factory=TrainingFacts)


class ImportedNetwork(NamedTuple):
    """A network with a file's weights.

    Attributes:
        network: in float32.
        is_flow: whether the file's network takes one time only (the layout of SiT).
        dtypes: the precisions of the weights in the file.
    """

    network: DiT
    is_flow: bool
    dtypes: tuple[str, ...]


def read_snapshot(path: Path, entry: str | None = None) -> Snapshot:
    """Find a network's tensors in a pickled snapshot, a file of `torch.save`, or a safetensors file.

    The kind of file is detected from its content. Nothing in it is executed or imported.

    Args:
        path: the file.
        entry: which network of a file that holds several, by its key; by default "ema", else "net".

    Raises:
        InputError: if the file cannot be read, is damaged, contradicts itself, or holds no network of this
            name.
    """
    content = _safetensors(path) if _is_safetensors(path) else restricted_load(path)
    try:
        return _from_content(content, entry)
    except InputError as error:
        raise error.within(path) from None


def _is_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False  # restricted_load reports it


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"truncated or not a safetensors file ({shown(error)})") from None


def _from_content(content: Any, entry: str | None) -> Snapshot:
    """The network in a file's content: a state dict, or a dict that has one or a module under its name."""
    if not isinstance(content, dict):
        raise InputError(f"it holds {kind(content)}, expected a dict with a network under ema or net")
    if content and all(isinstance(value, StoredTensor | Tensor) for value in content.values()):
        return _one_network(tensors_of(content), entry)
    for name in ENTRIES if entry is None else (entry,):
        network = content.get(name)
        if network is None:
            continue
        unused = tuple(shown(key) for key in content if key != name)
        if isinstance(network, dict):
            stored, state = network, {}
        else:
            states = dict(modules(network, name))
            stored = {
                ".".join((*path, leaf)): x for path, state in states.items() for leaf, x in own_tensors(state)
            }
            state = states[()]
        facts = read_facts(state, content.values())
        return Snapshot(_unwrapped(tensors_of(stored)), name, unused, facts)
    found = ", ".join(shown(key) for key in list(content)[:8]) or "nothing"
    raise InputError(f"no network under {shown(entry or 'ema or net')}; the file holds {found}")


def _one_network(tensors: dict[str, Tensor], entry: str | None) -> Snapshot:
    """The network of a state dict, or one of several whose names begin with ema, net, …"""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        levels = split_prefix(name)[0]
        group = next((level for level in ENTRIES if level in levels), "")
        groups.setdefault(group, {})[name] = tensor
    if entry is not None and entry not in groups:
        raise InputError(f"it holds the tensors of one network; there is no {shown(entry)} to choose")
    chosen = next(name for name in (*ENTRIES, "") if name in groups) if entry is None else entry
    unused = tuple(name or "others" for name in groups if name != chosen)
    return Snapshot(_unwrapped(groups[chosen]), chosen, unused)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under names without wrappers, and without the counters of averages."""
    return without_prefix({name: x for name, x in tensors.items() if name.split(".")[-1] not in COUNTERS})


def import_network(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    modulation_norm: bool = True,
    label_dropout: bool = True,
) -> ImportedNetwork:
    """A DiT with the weights of a file, in the authors' tensor names or in SiT's.

    Args:
        tensors: of a `Snapshot`.
        heads: number of attention heads; by default from the tensors or the presets.
        modulation_norm: whether the network normalises its modulation vectors.
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
        network = network_from_sit(single, heads=heads, label_dropout=label_dropout)
    else:
        guessed_heads, qk_norm = guess_attention(single)
        heads = guessed_heads if heads is None else heads
        network = network_from_authors(
            single, heads=heads, qk_norm=qk_norm, modulation_norm=modulation_norm, label_dropout=label_dropout
        )
    return ImportedNetwork(network.requires_grad_(False).eval(), is_flow, tuple(dtypes))
