"""Sections of a configuration that have several kinds: data, network, objective.

The options `data.kind`, `network.kind` and `objective.name` choose the kind.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

from tvmatch.config.schema import Config
from tvmatch.data.config import DATA_KINDS
from tvmatch.errors import InputError, NotRegisteredError
from tvmatch.models import config_class_of, network_kinds
from tvmatch.objectives import objectives_by_name

# The option that chooses the kind of a section.
KIND_OPTIONS = {"data": "kind", "network": "kind", "objective": "name"}


def section_kinds(section: str) -> Mapping[str, type[Any]]:
    """The dataclasses of a section by kind."""
    networks = {kind: config_class_of(kind) for kind in network_kinds()}
    return {"data": DATA_KINDS, "network": networks, "objective": objectives_by_name()}[section]


def section_class(section: str, kind: object) -> type[Any]:
    """The dataclass of a kind of a section.

    Raises:
        InputError: for an unknown kind; a NotRegisteredError for networks and objectives.
    """
    kinds = section_kinds(section)
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind]
    option, message = f"{section}.{KIND_OPTIONS[section]}", f"must be one of {', '.join(kinds)}, got {kind!r}"
    if section == "data" or not isinstance(kind, str):
        raise InputError(option, message)
    raise NotRegisteredError(option, f"{message}; import the module that registers another first")


def section_kind(section: str, value: Any) -> str | None:
    """The kind of a section's dataclass; None for data passed from Python."""
    return next((kind for kind, known in section_kinds(section).items() if type(value) is known), None)


def described(config: Config) -> dict[str, Any]:
    """A configuration as plain values, including the kinds of sections."""
    content = dataclasses.asdict(config)
    for section, option in KIND_OPTIONS.items():
        kind = section_kind(section, getattr(config, section))
        if kind is not None:
            content[section] = {option: kind, **content[section]}
    return content


def with_kinds(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The content of a complete configuration file, with the kind of each section.

    Files of earlier versions have no kinds. In these, data with a `path` are images, with `latents` latents,
    with a `name` a density, and others digits; the network is an MLP for densities and otherwise a DiT; the
    objective is TVM.

    Raises:
        InputError: if there are no data, or a kind is unknown.
    """
    content = with_present_names(content, source)
    data = content.get("data")
    if not isinstance(data, Mapping):
        raise InputError(
            source,
            "no data section; a run on data passed from Python is resumed from Python, "
            "with tvmatch.train(…, resume=True)",
        )
    keys = {"path": "images", "latents": "latents", "name": "density"}
    inferred = {"data": data.get("kind", next((keys[key] for key in keys if key in data), "digits"))}
    inferred |= {"network": "mlp" if inferred["data"] == "density" else "dit", "objective": "tvm"}
    for section, option in KIND_OPTIONS.items():
        given = content.get(section)
        if given is None:
            content[section] = {option: inferred[section]}
        elif isinstance(given, Mapping) and option not in given:
            content[section] = {option: inferred[section], **given}
        if isinstance(content[section], Mapping):
            try:
                section_class(section, content[section][option])
            except InputError as error:
                raise error.within(source) from None
    return content


def with_present_names(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A file's content with options of earlier versions renamed."""
    content = dict(content)
    if "times" in content:
        times, objective = content.pop("times"), content.get("objective") or {}
        if isinstance(objective, Mapping):
            if "times" in objective:
                raise InputError(source, "times: given again as objective.times")
            content["objective"] = {**objective, "times": times}
    return content


def present_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with options of earlier versions renamed."""
    return [re.sub(r"^--times(?=[.=]|$)", "--objective.times", argument) for argument in arguments]


def with_chosen_kinds(content: Mapping[str, Any], chosen: Mapping[str, str]) -> dict[str, Any]:
    """A complete configuration with other kinds of sections, keeping the options that both kinds have.

    Args:
        content: with the kind of each section.
        chosen: kinds by section.

    Raises:
        InputError: if a kind is unknown.
    """
    content = dict(content)
    for section, kind in chosen.items():
        known = {field.name for field in dataclasses.fields(section_class(section, kind))}
        given, option = content[section], KIND_OPTIONS[section]
        if isinstance(given, Mapping) and given.get(option) != kind:
            kept = {name: value for name, value in given.items() if name in known}
            content[section] = {option: kind, **kept}
    return content


def config_class(content: Mapping[str, Any]) -> type[Config]:
    """A subclass of `Config` whose sections have the dataclasses of these kinds as types, for a parser."""
    fields: list[Any] = []
    for section, option in KIND_OPTIONS.items():
        given = content[section]
        # If it is not a mapping, the parser of any kind refuses it.
        kind = given.get(option) if isinstance(given, Mapping) else next(iter(section_kinds(section)))
        cls = section_class(section, kind)
        required = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        hints = get_type_hints(cls)
        if any(hints[name] is not str for name in required):
            raise InputError(
                f"{section}.{option}",
                f"{cls.__name__} has no default for {', '.join(required)}; configuration files and the "
                "command line need one",
            )
        # A required option, such as a path, is empty until it is set.
        empty = cls(**dict.fromkeys(required, ""))
        fields.append((section, cls, dataclasses.field(default_factory=partial(copy.deepcopy, empty))))
    made = dataclasses.make_dataclass("Config", fields, bases=(Config,), kw_only=True)
    made.__doc__ = Config.__doc__
    return made
