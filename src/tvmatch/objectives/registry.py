"""The objectives by the names that options and files know them by."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from tvmatch.errors import InputError
from tvmatch.objectives.base import Objective

Class = TypeVar("Class", bound=type[Objective])
_CLASSES: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[Class], Class]:
    """A decorator that makes an objective known as `--objective.name NAME` and in YAML files.

        @register_objective("mine")
        @dataclass
        class Mine(Objective): ...

    Raises:
        InputError: if another objective has the name.
    """

    def register(objective_class: Class) -> Class:
        if _CLASSES.setdefault(name, objective_class) is not objective_class:
            raise InputError("name", f"an objective {name!r} is registered already")
        return objective_class

    return register


def objectives_by_name() -> Mapping[str, type[Objective]]:
    """All registered objectives, in the order of registration."""
    return MappingProxyType(_CLASSES)
