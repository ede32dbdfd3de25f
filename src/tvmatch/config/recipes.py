"""Named complete runs: the YAML files that come with the package."""

import functools
from importlib import resources

import yaml

from tvmatch.config.parser import parse_config
from tvmatch.config.schema import Config
from tvmatch.errors import InputError


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    folder = resources.files("tvmatch") / "recipes"
    return tuple(
        sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    )


def recipe_text(name: str) -> str:
    """The YAML of a recipe, with comments; raises an InputError for an unknown name."""
    if name not in recipe_names():
        raise InputError("recipe", f"no recipe {name!r}; there are {', '.join(recipe_names())}")
    return (resources.files("tvmatch") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe(name: str) -> Config:
    """The configuration of a recipe, which can be changed before training.

    Data that a recipe leaves to the user (a path) hold a placeholder until set.

    Raises:
        InputError: if there is no recipe of this name.
    """
    return parse_config(yaml.safe_load(recipe_text(name)), f"recipe {name}")
