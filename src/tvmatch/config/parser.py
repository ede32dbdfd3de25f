"""Command-line options and YAML content as a checked `Config`, by jsonargparse."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from tvmatch.config.schema import Config
from tvmatch.config.sections import (
    KIND_OPTIONS,
    config_class,
    present_arguments,
    section_kinds,
    with_kinds,
)
from tvmatch.config.yaml_files import flattened
from tvmatch.errors import InputError
from tvmatch.option_checks import check_value, suggestion, type_in_words


class OneLineParser(ArgumentParser):
    """An argument parser whose errors are an `InputError` of one line, and that takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an `InputError` that names the option, the type that it needs and the value."""
        text = " ".join(line.strip(" -") for line in str(message).splitlines()).removeprefix("Parser key ")
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", text)
        if unknown:
            known = suggestion(unknown[1], self._option_string_actions)
            raise InputError(unknown[1], f"no such option{known}") from None
        wrong = re.match(r'"(.+?)": .*(?:Got|Given) value: (.*)', text)
        kind = None if wrong is None else self.types().get(wrong[1])
        if wrong is None or kind is None:
            raise InputError(text) from None
        raise InputError(wrong[1], f"must be {type_in_words(kind)}, got {wrong[2]}") from None

    def types(self) -> dict[str, Any]:
        """The type of each option that has one, by its dotted name."""
        kinds = {action.dest: getattr(action, "_typehint", None) or action.type for action in self._actions}
        return {name: kind for name, kind in kinds.items() if kind is not None}

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As jsonargparse's, which lets through what `float` says of a whole number beyond its range."""
        try:
            return super().parse_args(*arguments, **options)
        except OverflowError as error:
            raise InputError(f"a number among the options is too large ({error})") from None


def config_parser(cls: type[Config], **options: Any) -> OneLineParser:
    """A parser of a `sections.config_class`; `add_defaults` gives it a recipe's values."""
    parser = OneLineParser(**options)
    parser.add_argument("--config", action="config", help="YAML file on top of the recipe")
    parser.add_argument("recipe", nargs="?", type=str, default="custom", help="the name it goes by")
    parser.add_class_arguments(cls, as_group=True, skip={"recipe"})
    for section, option in KIND_OPTIONS.items():
        kinds = ", ".join(section_kinds(section))
        groups = parser.groups or {}
        groups[section].add_argument(
            f"--{section}.{option}", type=str, help=f"{kinds}; decides the other options here"
        )
    return parser


def add_defaults(parser: OneLineParser, content: Mapping[str, Any], source: str) -> None:
    """Make a YAML file's values the defaults of a parser, on top of those that it has.

    Raises:
        InputError: for an unknown key or a value of another type, naming `source` and the key.
    """
    known = {action.dest for action in parser._actions} - {"help", "config", "print_config"}
    sections = {key.rpartition(".")[0] for key in known}
    values = {
        key: value for key, value in flattened(content).items() if not (value is None and key in sections)
    }
    for key, value in values.items():
        if key not in known:
            raise InputError(source, f"{key}: no such option{suggestion(key, known)}")
        if key in sections:
            raise InputError(source, f"{key}: must be a section of options, got {value!r}")
    kinds = parser.types()
    try:
        for key, value in values.items():
            # Null, which jsonargparse takes for any type; --out and --resume are null without a value.
            if value is None and key in kinds and parser.get_default(key) is not None:
                check_value(key, value, kinds[key])
        checked = parser.parse_object(values)
    except InputError as error:
        raise error.within(source) from None
    except OverflowError as error:  # a whole number beyond the range of `float`
        raise InputError(source, str(error)) from None
    parser.set_defaults({key: checked[key] for key in values})


def parse_config(content: Mapping[str, Any], source: str, arguments: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file's content with command-line arguments on top."""
    content = with_kinds(content, source)
    parser = config_parser(config_class(content))
    add_defaults(parser, content, source)
    return instantiate(parser, parser.parse_args(present_arguments(arguments)))


def instantiate(parser: ArgumentParser, parsed: Namespace) -> Config:
    """The dataclasses of a parsed namespace; what they refuse is an InputError."""
    for section, option in KIND_OPTIONS.items():
        parsed.pop(f"{section}.{option}")
    names = {field.name for field in dataclasses.fields(Config)}
    values = parser.instantiate(parsed)
    return Config(**{name: value for name, value in vars(values).items() if name in names})
