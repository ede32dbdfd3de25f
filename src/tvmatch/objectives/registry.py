"""Registry of objectives by their names in options and files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from tvmatch.errors import InputError
from tvmatch.objectives.base import Objective

Class = TypeVar("Class", bound=type[Objective])
LOGGED = {"step", "loss", "gradient_norm", "learning_rate"}
"""Reserved names in the log, which a term must not have."""
_CLASSES: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[Class], Class]:
    """Decorator that registers an objective for `--objective.name NAME` and YAML files.

        @register_objective("mine")
        @dataclass
        class Mine(Objective): ...

    Raises:
        InputError: if another objective has the name, or a term has a reserved name of the log.
    """

    def register(objective_class: Class) -> Class:
        taken = LOGGED & getattr(objective_class, "term_times", {}).keys()
        if taken:
            raise InputError("term_times", f"the log has a quantity {taken.pop()} already; rename the term")
        known = _CLASSES.get(name, objective_class)
        # A notebook cell that is run again, or a reloaded module, replaces its own class.
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
