"""The objectives by the names that options and files know them by."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from tvmatch.errors import InputError
from tvmatch.objectives.base import Objective

Class = TypeVar("Class", bound=type[Objective])
LOGGED = {"step", "loss", "gradient_norm", "learning_rate"}
"""Names of the log that no term may have."""
_CLASSES: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[Class], Class]:
    """A decorator that makes an objective known as `--objective.name NAME` and in YAML files.

        @register_objective("mine")
        @dataclass
        class Mine(Objective): ...

    Raises:
        InputError: if another objective has the name, or a term has a name of the log's own.
    """

    def register(objective_class: Class) -> Class:
        taken = LOGGED & getattr(objective_class, "term_times", {}).keys()
        if taken:
            raise InputError("term_times", f"the log has a quantity {taken.pop()} already; rename the term")
        known = _CLASSES.get(name, objective_class)
        # A class of the same place is the same one, defined again: a notebook's cell, a module reloaded.
        if (known.__module__, known.__qualname__) != (
            objective_class.__module__,
            objective_class.__qualname__,
        ):
            raise InputError("name", f"an objective {name!r} is registered already")
        _CLASSES[name] = objective_class
        return objective_class

    return register


def objectives_by_name() -> Mapping[str, type[Objective]]:
    """All registered objectives, in the order of registration."""
    return MappingProxyType(_CLASSES)
