"""Configurations as YAML: read, written and compared."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tvmatch.config.schema import Config
from tvmatch.config.sections import described
from tvmatch.errors import InputError, one_line


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


def to_yaml(config: Config) -> str:
    """A configuration as YAML; data given as tensors from Python are null."""
    text: str = yaml.safe_dump(_plain(described(config)), sort_keys=False, allow_unicode=True)
    return text


def differences(before: Config, after: Config) -> list[str]:
    """The options whose values differ between two configurations, as `name: before → after`."""
    old, new = (flattened(_plain(described(config))) for config in (before, after))
    return [
        f"{name}: {old.get(name)} → {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; an InputError if the file is missing, something else, or has a key twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if isinstance(content, dict):
            flattened(content)  # which has no end where an alias stands for the mapping around it
    except InputError as error:
        raise error.within(path) from None
    except OSError as error:
        raise InputError(path, str(error.strerror)) from None
    except RecursionError:
        raise InputError(path, "nested too deeply, or a mapping that is a part of itself") from None
    except Exception as error:  # of every kind: PyYAML lets through what Python raises for `!!float x`
        raise InputError(path, f"not readable as YAML ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(path, "must hold a mapping of options")
    return content


def flattened(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
