"""Recipes: complete configurations by name, as YAML files in the package."""

import functools
from importlib import resources

import yaml

from tvmatch.config.parser import parse_config
from tvmatch.config.schema import Config
from tvmatch.errors import InputError


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """The names of the recipes."""
    folder = resources.files("tvmatch") / "recipes"
    return tuple(
        sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    )


def recipe_text(name: str) -> str:
    """The YAML of a recipe, with comments. Raises InputError for an unknown name."""
    if name not in recipe_names():
        raise InputError("recipe", f"no recipe {name!r}; there are {', '.join(recipe_names())}")
    return (resources.files("tvmatch") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe(name: str) -> Config:
    """The configuration of a recipe, which can be changed before training.

    A path that the user must choose is a placeholder.

    Raises:
        InputError: if there is no recipe of this name.
    """
    return parse_config(yaml.safe_load(recipe_text(name)), f"recipe {name}")
