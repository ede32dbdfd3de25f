"""The kinds of networks: a name in files, the class of its configuration, the class of the network."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar, cast, overload

import torch
from torch import nn

from tvmatch.errors import InputError, NotRegisteredError
from tvmatch.models.base import BaseNetwork
from tvmatch.models.dit import DiT, DiTConfig
from tvmatch.models.mlp import MLP, MLPConfig
from tvmatch.models.wrapper import ThroughJVP, optional_arguments

N = TypeVar("N", bound=type[nn.Module])


class Kind(NamedTuple):
    """What belongs to one name."""

    name: str
    config_class: type
    network_class: type[BaseNetwork]


_KINDS: dict[str, Kind] = {}


@overload
def register_network(kind: str, config_class: type, network_class: type[nn.Module]) -> None: ...


@overload
def register_network(kind: str, config_class: type) -> Callable[[N], N]: ...


def register_network(
    kind: str, config_class: type, network_class: type[nn.Module] | None = None
) -> Callable[[N], N] | None:
    """Make a network known by name, to configurations, checkpoints and the command line.

        @register_network("residual", ResidualConfig)
        class Residual(nn.Module): ...

    Checkpoints name the kind and hold the configuration's fields. They never import anything: a process that
    loads one imports the module that registers the kind first (`tvmatch COMMAND --import MODULE`).

    Args:
        kind: the name, as in model.json.
        config_class: a dataclass whose fields JSON can hold: numbers, text, booleans, None, lists of them.
        network_class: constructor and call as in `BaseNetwork`. Left out, the result is a decorator for it.

    Raises:
        InputError: if the kind or the configuration's class belongs to another network already, or the
            configuration's class is no dataclass or has a field called kind.
    """
    if not (isinstance(config_class, type) and is_dataclass(config_class)):
        raise InputError("config_class", f"must be a dataclass, got {config_class!r}")
    if any(field.name == "kind" for field in fields(config_class)):
        raise InputError("config_class", f"{config_class.__name__} has a field kind, a name that files need")

    def register(network_class: N) -> N:
        for other in _KINDS.values():
            # A module that is reloaded, or a cell of a notebook that is run again, replaces its own.
            replaced = other.name == kind and _place(other.network_class) == _place(network_class)
            if not replaced and (other.name == kind or other.config_class is config_class):
                raise InputError(
                    "kind",
                    f"cannot register {_place(network_class)} as {kind!r}: {_place(other.network_class)} is "
                    f"registered as {other.name!r} with {other.config_class.__name__}",
                )
        _KINDS[kind] = Kind(kind, config_class, _with_answers(network_class))
        return network_class

    if network_class is None:
        return register
    register(network_class)
    return None


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _with_answers(network_class: type[nn.Module]) -> type[BaseNetwork]:
    """The class, or a subclass with what it lacks: a tangent, and the default answers."""
    bases: list[type] = [network_class]
    if not getattr(network_class, "takes_dual", False):
        bases.insert(0, ThroughJVP)
    if not issubclass(network_class, BaseNetwork):
        bases.append(BaseNetwork)
    if len(bases) == 1:
        return cast(type[BaseNetwork], network_class)
    names = ("__module__", "__qualname__", "__doc__")
    copied = {name: getattr(network_class, name) for name in names}
    return type(network_class.__name__, tuple(bases), copied)


def network_kinds() -> tuple[str, ...]:
    """The names that are registered."""
    return tuple(_KINDS)


def config_class_of(kind: str) -> type:
    """The configuration's class of a kind.

    Raises:
        NotRegisteredError: if nothing is registered under this name.
    """
    if kind not in _KINDS:
        raise NotRegisteredError(
            "network.kind",
            f"no network is registered as {kind!r:.100}, only {', '.join(_KINDS)}; import the module that "
            "registers it first",
        )
    return _KINDS[kind].config_class


def kind_of(config: Any) -> str:
    """The kind that a configuration is of.

    Raises:
        InputError: if its class is not registered.
    """
    return _kind_of(config).name


def network_class_of(config: Any) -> type[BaseNetwork]:
    """The class of the networks that a configuration describes; raises as `kind_of`."""
    return _kind_of(config).network_class


def _kind_of(config: Any) -> Kind:
    for kind in _KINDS.values():
        if type(config) is kind.config_class:
            return kind
    known = ", ".join(f"{kind.config_class.__name__} ({kind.name})" for kind in _KINDS.values())
    raise InputError(
        "network", f"must be the configuration of a registered network ({known}), got {config!r:.200}"
    )


def describe_config(config: Any) -> dict[str, Any]:
    """A configuration as plain values, with its kind; `config_from` reads them back."""
    return {"kind": kind_of(config), **asdict(config)}


def config_from(content: Mapping[str, Any]) -> Any:
    """The configuration of a description.

    Raises:
        NotRegisteredError: for a kind that is not registered.
        InputError: for values out of range.
        KeyError, TypeError: if it describes none.
    """
    values = dict(content)
    kind = values.pop("kind")
    if not isinstance(kind, str):
        raise TypeError(f"kind {kind!r:.100}")
    return config_class_of(kind)(**values)


def build_network(
    config: Any,
    shape: tuple[int, ...],
    class_count: int = 0,
    seed: int | None = None,
    *,
    embedding_size: int | None = None,
) -> BaseNetwork:
    """The network of a configuration, with initial weights in float32 on PyTorch's default device.

    Args:
        config: of a registered class.
        shape: of one element of the data.
        class_count: number of classes K; 0 for an unconditional network.
        seed: of the initial weights; None leaves it to the network.
        embedding_size: of the data's embeddings; None for data without.

    Raises:
        InputError: if its class is not registered, or the network does not fit the data.
    """
    cls = network_class_of(config)
    needed = {"labels": f"{class_count} classes"} if class_count else {}
    if embedding_size is not None:
        needed["embeddings"] = f"embeddings of size {embedding_size}"
    for argument, what in needed.items():
        if argument not in optional_arguments(cls):
            raise InputError(
                "network", f"{cls.__name__}.forward has no argument {argument}, the data have {what}"
            )
    with nullcontext() if seed is None or cls.draws_from_seed else _global_seed(seed):
        network: BaseNetwork = cls(config, shape, class_count, seed=seed)
    if not hasattr(network, "config"):
        network.config = config
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in network.parameters()):
        network.to(torch.float32)  # whatever PyTorch's default is
    return network


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """PyTorch's global generator on the CPU has this seed meanwhile, and its own state afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


register_network("dit", DiTConfig, DiT)
register_network("mlp", MLPConfig, MLP)
