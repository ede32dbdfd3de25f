"""Named complete runs: recipe, then a user's YAML file, then dotted overrides."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from tvmatch.errors import InputError
from tvmatch.training.config import Config, DensityConfig, DigitsConfig, ImagesConfig


class OneLineParser(ArgumentParser):
    """An argument parser whose errors are an `InputError` of one line, and that takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what went wrong as an `InputError`."""
        raise InputError(_one_line(message)) from None


def _one_line(message: str) -> str:
    """jsonargparse's nested, multi-line report as one line."""
    lines = [line.strip(" -") for line in str(message).splitlines()]
    return " ".join(line for line in lines if line).replace("Parser key ", "")


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    folder = resources.files("tvmatch") / "recipes"
    return tuple(
        sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))
    )


def recipe_text(name: str) -> str:
    """The YAML of a recipe, comments included; an InputError if there is none of this name."""
    if name not in recipe_names():
        raise InputError(f"recipe: no recipe {name!r}; there are {', '.join(recipe_names())}")
    return (resources.files("tvmatch") / "recipes" / f"{name}.yaml").read_text()


def recipe(name: str) -> Config:
    """The configuration of a recipe, to be changed at will before it is trained.

    Data that a recipe leaves to the user (a path) hold a placeholder until set.

    Raises:
        InputError: if there is no recipe of this name.
    """
    content = yaml.safe_load(recipe_text(name))
    return parse_config(content, [])


def config_class(content: Mapping[str, Any]) -> type[Config]:
    """The configuration class for a YAML file's content: its data section says which."""
    data = content.get("data")
    if not isinstance(data, Mapping):
        raise InputError(
            "data: the configuration has no data section; tensors given from Python train from Python"
        )
    if "path" in data:
        return ImagesConfig
    return DensityConfig if "name" in data else DigitsConfig


def config_parser(content: Mapping[str, Any], **options: Any) -> OneLineParser:
    """A parser of configurations like `content`, whose values are its defaults."""
    parser = OneLineParser(**options)
    parser.add_argument("--config", action="config", help="YAML file on top of the recipe")
    parser.add_argument("recipe", nargs="?", type=str, default="custom", help="the name it goes by")
    parser.add_class_arguments(config_class(content), as_group=True, skip={"recipe"})
    known = {action.dest for action in parser._actions}
    for key, value in _flatten(content).items():
        if key not in known:
            raise InputError(f"{key}: no such option")
        parser.set_defaults({key: value})
    return parser


def parse_config(content: Mapping[str, Any], arguments: Sequence[str]) -> Config:
    """The configuration of `content` with command-line arguments on top."""
    parser = config_parser(content)
    return instantiate(parser, parser.parse_args(list(arguments)), config_class(content))


def instantiate(parser: ArgumentParser, parsed: Namespace, cls: type[Config]) -> Config:
    """The dataclasses of a parsed namespace; what they refuse is an InputError."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = parser.instantiate(parsed)
    return cls(**{name: value for name, value in vars(values).items() if name in names})


def to_yaml(config: Config) -> str:
    """A configuration as YAML; data given as tensors from Python are null."""
    content = dataclasses.asdict(config)
    text: str = yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True)
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; an InputError if the file is missing or something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({_one_line(str(error))})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a mapping")
    return content


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
