"""Registry of networks: kind (the name in files), configuration class, network class."""

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
    """A registered network."""

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
    """Register a network under a name for configurations, checkpoints and the command line.

        @register_network("residual", ResidualConfig)
        class Residual(nn.Module): ...

    Checkpoints contain the kind and the configuration's fields. Loading never imports modules: import the
    module that registers the kind first (`tvmatch COMMAND --import MODULE`).

    Args:
        kind: the name, as in model.json.
        config_class: a dataclass whose fields can be stored as JSON: numbers, strings, booleans, None, lists.
        network_class: with constructor and `forward` as in `BaseNetwork`. If omitted, returns a decorator.

    Raises:
        InputError: if kind or configuration class are already registered for another network, or the
            configuration class is not a dataclass or has a field `kind`.
    """
    if not (isinstance(config_class, type) and is_dataclass(config_class)):
        raise InputError("config_class", f"must be a dataclass, got {config_class!r}")
    if any(field.name == "kind" for field in fields(config_class)):
        raise InputError("config_class", f"{config_class.__name__} has a field kind, which files reserve")

    def register(network_class: N) -> N:
        for other in _KINDS.values():
            # A reloaded module, or a notebook cell that is run again, replaces its own registration.
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
    """The registered kinds."""
    return tuple(_KINDS)


def config_class_of(kind: str) -> type:
    """The configuration class of a kind.

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
    """The kind of a configuration.

    Raises:
        InputError: if its class is not registered.
    """
    return _kind_of(config).name


def network_class_of(config: Any) -> type[BaseNetwork]:
    """The network class of a configuration; raises like `kind_of`."""
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
    """Convert a configuration to plain values, including its kind; `config_from` is the inverse."""
    return {"kind": kind_of(config), **asdict(config)}


def config_from(content: Mapping[str, Any]) -> Any:
    """The configuration for the plain values of `describe_config`.

    Raises:
        NotRegisteredError: for a kind that is not registered.
        InputError: for values out of range.
        KeyError, TypeError: if fields are missing or unknown.
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
    """Build the network of a configuration, in float32 on PyTorch's default device.

    Args:
        config: of a registered class.
        shape: of one element of the data.
        class_count: number of classes K; 0 for an unconditional network.
        seed: of the initial weights; None: the network chooses.
        embedding_size: of the embeddings of the data; None for data without embeddings.

    Raises:
        InputError: if the class of `config` is not registered, or the network does not fit the data.
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
        network.to(torch.float32)  # PyTorch's default dtype may be another
    return network


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed PyTorch's global CPU generator in this context, and restore its state afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


register_network("dit", DiTConfig, DiT)
register_network("mlp", MLPConfig, MLP)
