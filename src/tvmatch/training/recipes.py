"""Named complete runs: recipe, then a user's YAML file, then dotted overrides."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from tvmatch.errors import InputError
from tvmatch.option_checks import (
    LIST_OF_NUMBERS,
    PAIR_OF_NUMBERS,
    PAIR_OF_WHOLE_NUMBERS,
    THREE_WHOLE_NUMBERS,
    check_value,
    suggestion,
)
from tvmatch.training.config import Config
from tvmatch.training.sections import (
    KIND_OPTIONS,
    config_class,
    described,
    present_arguments,
    section_kinds,
    with_kinds,
)


class OneLineParser(ArgumentParser):
    """An argument parser whose errors are an `InputError` of one line, and that takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what went wrong as an `InputError`."""
        text = readable(str(message))
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", text)
        if unknown:
            text = f"{unknown[1]}: no such option{suggestion(unknown[1], self._option_string_actions)}"
        raise InputError(text) from None

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """As jsonargparse's, which lets through what `float` says of a whole number beyond its range."""
        try:
            return super().parse_args(*arguments, **options)
        except OverflowError as error:
            raise InputError(f"a number among the options is too large ({error})") from None


_TYPES = {
    r"<class 'int'>": "a whole number",
    r"<class 'float'>": "a number",
    r"<class 'bool'>": "true or false",
    r"<class 'str'>": "text",
    r"<class 'NoneType'>": "null",
    r"tuple\[float, \.\.\.\]": LIST_OF_NUMBERS,
    r"tuple\[int, int, int\]": THREE_WHOLE_NUMBERS,
    r"tuple\[float, float\]|tuple with 2 elements|<class 'tuple'>": PAIR_OF_NUMBERS,
    r"tuple\[int, int\]": PAIR_OF_WHOLE_NUMBERS,
    r"typing\.Literal\[(.*?)\]": r"one of \1",
    r"^\[(.*), (.*)\]$": r"\1 or \2",
}


def readable(message: str) -> str:
    """jsonargparse's nested, multi-line report as one line: `training.steps: must be …, got …`."""
    text = " ".join(stripped for line in message.splitlines() if (stripped := line.strip(" -")))
    text = text.removeprefix("Parser key ")
    match = re.fullmatch(r'"(.+?)": Expected an? (.*)\. Got value: (.*)', text) or re.fullmatch(
        r'"(.+?)": Does not validate .* Subtypes: (\[.*\]) Errors: .* Given value: (.*)', text
    )
    if not match:
        return text
    key, kind, value = match.groups()
    for pattern, words in _TYPES.items():
        kind = re.sub(pattern, words, kind)
    return f"{key}: must be {kind}, got {value}"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's plain types, without keys that are given twice, of which PyYAML takes the last.

    `<<` takes keys over from another mapping, or from each of a list. A mapping's own keys come before those,
    and of several mappings the first that has a key gives it, as the description of `<<` has it for lists.
    PyYAML's own answer hangs on its version (seen with 6.0.3 and 6.0.4).
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace `<<` by what it takes over; an InputError for a key that is there already."""
        given, node.value = node.value, []
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for pair in given:
            if pair[0].tag == "tag:yaml.org,2002:merge":
                merged += self._taken_over(node, pair[1])
            else:
                node.value.append(pair)
        keys: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise InputError(key, f"given twice, again in line {key_node.start_mark.line + 1}")
            keys.append(key)
        for pair in merged:
            key = self.construct_object(pair[0], deep=True)
            if key not in keys:
                keys.append(key)
                node.value.append(pair)

    def _taken_over(self, node: yaml.MappingNode, source: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """The keys and values of the mapping after `<<`, or of each in a list of them."""
        for mapping in source.value if isinstance(source, yaml.SequenceNode) else [source]:
            if not isinstance(mapping, yaml.MappingNode):
                problem = f"expected a mapping or a list of mappings after <<, but found {mapping.id}"
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping", node.start_mark, problem, mapping.start_mark
                )
            self.flatten_mapping(mapping)
            yield from mapping.value


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
        raise InputError("recipe", f"no recipe {name!r}; there are {', '.join(recipe_names())}")
    return (resources.files("tvmatch") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def recipe(name: str) -> Config:
    """The configuration of a recipe, to be changed at will before it is trained.

    Data that a recipe leaves to the user (a path) hold a placeholder until set.

    Raises:
        InputError: if there is no recipe of this name.
    """
    return parse_config(yaml.safe_load(recipe_text(name)), f"recipe {name}")


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
        key: value for key, value in _flatten(content).items() if not (value is None and key in sections)
    }
    for key, value in values.items():
        if key not in known:
            raise InputError(source, f"{key}: no such option{suggestion(key, known)}")
        if key in sections:
            raise InputError(source, f"{key}: must be a section of options, got {value!r}")
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    try:
        for key, value in values.items():
            # Null, which jsonargparse takes for any type; --out and --resume are null without a value.
            if value is None and kinds[key] is not None and parser.get_default(key) is not None:
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


def to_yaml(config: Config) -> str:
    """A configuration as YAML; data given as tensors from Python are null."""
    text: str = yaml.safe_dump(_plain(described(config)), sort_keys=False, allow_unicode=True)
    return text


def differences(before: Config, after: Config) -> list[str]:
    """The options whose values differ between two configurations, as `name: before → after`."""
    old, new = (_flatten(_plain(described(config))) for config in (before, after))
    return [
        f"{name}: {old.get(name)} → {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; an InputError if the file is missing, something else, or has a key twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if isinstance(content, dict):
            _flatten(content)  # which has no end where an alias stands for the mapping around it
    except InputError as error:
        raise error.within(path) from None
    except OSError as error:
        raise InputError(path, str(error.strerror)) from None
    except RecursionError:
        raise InputError(path, "nested too deeply, or a mapping that is a part of itself") from None
    except Exception as error:  # of every kind: PyYAML lets through what Python raises for `!!float x`
        reason = readable(str(error)) or type(error).__name__
        raise InputError(path, f"not readable as YAML ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(path, "must hold a mapping of options")
    return content


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
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
