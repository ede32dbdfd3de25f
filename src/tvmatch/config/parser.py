"""Parse command-line options and YAML content to a `Config`, with jsonargparse."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from tvmatch.config.schema import Config
from tvmatch.config.sections import KIND_OPTIONS, config_class, present_arguments, section_kinds, with_kinds
from tvmatch.config.yaml_files import flattened
from tvmatch.errors import InputError
from tvmatch.option_checks import check_value, suggestion, type_in_words


class OneLineParser(ArgumentParser):
    """An argument parser that raises an `InputError` of one line, and does not accept abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an `InputError` that names the option, its type and the value."""
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
        """The types of options, by dotted name."""
        kinds = {action.dest: getattr(action, "_typehint", None) or action.type for action in self._actions}
        return {name: kind for name, kind in kinds.items() if kind is not None}

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As in jsonargparse, but an integer that `float` cannot represent is an `InputError`."""
        try:
            return super().parse_args(*arguments, **options)
        except OverflowError as error:
            raise InputError(f"a number among the options is too large ({error})") from None


def config_parser(cls: type[Config], **options: Any) -> OneLineParser:
    """A parser for a `sections.config_class`; `add_defaults` sets the values of a recipe."""
    parser = OneLineParser(**options)
    parser.add_argument("--config", action="config", help="YAML file on top of the recipe")
    parser.add_argument("recipe", nargs="?", type=str, default="custom", help="name of the run")
    parser.add_class_arguments(cls, as_group=True, skip={"recipe"})
    for section, option in KIND_OPTIONS.items():
        kinds = ", ".join(section_kinds(section))
        groups = parser.groups or {}
        groups[section].add_argument(
            f"--{section}.{option}", type=str, help=f"{kinds}; determines the other options of this section"
        )
    return parser


def add_defaults(parser: OneLineParser, content: Mapping[str, Any], source: str) -> None:
    """Set the values of a YAML file as defaults of a parser.

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
            # jsonargparse accepts null for any type; the defaults of --out and --resume are null.
            if value is None and key in kinds and parser.get_default(key) is not None:
                check_value(key, value, kinds[key])
        checked = parser.parse_object(values)
    except InputError as error:
        raise error.within(source) from None
    except OverflowError as error:  # a whole number beyond the range of `float`
        raise InputError(source, str(error)) from None
    parser.set_defaults({key: checked[key] for key in values})


def parse_config(content: Mapping[str, Any], source: str, arguments: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file's content; command-line arguments override it."""
    content = with_kinds(content, source)
    parser = config_parser(config_class(content))
    add_defaults(parser, content, source)
    return instantiate(parser, parser.parse_args(present_arguments(arguments)))


def instantiate(parser: ArgumentParser, parsed: Namespace) -> Config:
    """The configuration of a parsed namespace. Raises InputError for invalid values."""
    for section, option in KIND_OPTIONS.items():
        parsed.pop(f"{section}.{option}")
    names = {field.name for field in dataclasses.fields(Config)}
    values = parser.instantiate(parsed)
    return Config(**{name: value for name, value in vars(values).items() if name in names})
