"""Configurations as YAML: read, written and compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tvmatch.config.schema import Config
from tvmatch.config.sections import described
from tvmatch.errors import InputError, one_line


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader of plain types that refuses duplicate keys; PyYAML would use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, after a check for duplicate keys."""
        keys: list[Any] = []
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise InputError(key, f"given twice, again in line {key_node.start_mark.line + 1}")
            keys.append(key)
        content: dict[Any, Any] = super().construct_mapping(node, deep)
        return content


def to_yaml(config: Config) -> str:
    """A configuration as YAML; data passed from Python are null."""
    text: str = yaml.safe_dump(_plain(described(config)), sort_keys=False, allow_unicode=True)
    return text


def differences(before: Config, after: Config) -> list[str]:
    """The options whose values differ between two configurations, as `name: before → after`."""
    old, new = (flattened(_plain(described(config))) for config in (before, after))
    return [
        f"{name}: {old.get(name)} → {new.get(name)}" for name in old | new if old.get(name) != new.get(name)
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises InputError if it is missing or invalid, or has a duplicate key."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if isinstance(content, dict):
            flattened(content)  # infinite recursion if an alias refers to an enclosing mapping
    except InputError as error:
        raise error.within(path) from None
    except OSError as error:
        raise InputError(path, str(error.strerror)) from None
    except RecursionError:
        raise InputError(path, "nested too deeply, or a mapping that is a part of itself") from None
    except Exception as error:  # of any type: PyYAML does not catch errors of Python, as for `!!float x`
        raise InputError(path, f"not readable as YAML ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(path, "must hold a mapping of options")
    return content


def flattened(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """Convert tuples to lists."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
