"""Hostile arguments: the options of every command, found in its parser, with values that are not for them."""

import functools
from contextlib import suppress
from typing import NamedTuple
from unittest.mock import patch

from fuzz_cases import Case, words
from fuzz_material import CALLS
from hypothesis import strategies as st

from tvmatch.cli import COMMANDS, main
from tvmatch.config.parser import OneLineParser

NUMBERS = words("-1 0 1 2 3 7 1.5 -0.0 1e-3 1e3 1_0 0x10 １ nan -nan inf -inf 1e400 1e-400 1e308")
NUMBERS += [str(2**31), str(2**63), str(2**64), str(-(2**63) - 1), "9" * 400]
WORDS = words(
    "- -- --- = -x ~ true False yes null None auto none measured cpu cuda cuda:9 cpu:7 meta gpu cat"
)
WORDS += [
    "größe",
    "日本",
    "--out",
    "@mine.yaml",
    "",
    " ",
    "a b",
    "a\nb",
    "a\tb",
    "\x1b[31mred",
    "\x00",
    "\u202eabc",
    "\udcff",
]
LISTS = words(
    "[] {} [1,2] [2,1] [1 1] 1,2 2,1 1,1 1,,2 , ,1 a,b [nan,1] [[1],[2]] 1/2 3/2 0/0 1,2,3,4 1,0.5,0"
)
LISTS += ["1,nan,0", "inf,0", "{a: 1}", "{1: [2, {3: 4}]}", "key: [1,", "- - -", "? a"]
ODD = ["[bold]x[/]", "%s%n{}{0}", "$HOME", "`x`", "a" * 5_000, "&a [*a]", "*a", "'", '"', "# x"]
ODD += ["!!python/object/apply:os.system [touch marker]"]
PATHS = words(
    "nowhere /no/where / . .. run run/ points latent photos photos/a photos/a/0.png photos.zip z vae"
)
PATHS += words("photos.parquet hub snapshot.pkl weights.safetensors reference.npz mine.yaml run/config.yaml")
PATHS += words("run/config.yaml/x run/metrics.json new new.png new/new /dev/null digits imagenet256_w2")
PATHS += words("small_extractor:SmallExtractor json:loads os:getcwd torch.nn:Identity")
VALUES = [*NUMBERS, *WORDS, *LISTS, *ODD, *PATHS]
# Too much is asked for: these would only take their time, as their users want.
AMOUNTS = ("count", "samples", "steps", "batch_size", "resolution", "world_size", "shard_size", "first")
LONG = {"1e3", str(2**31)}


class Option(NamedTuple):
    """An option of a parser: its names, whether it takes a value, and the values it names itself."""

    names: tuple[str, ...]
    takes_value: bool
    choices: tuple[str, ...]


class _Seen(Exception):  # noqa: N818  (no error)
    pass


@functools.cache
def options_of(call: str) -> tuple[Option, ...]:
    """The options of the parser that a call of CALLS comes to."""
    parsers: list[OneLineParser] = []

    def seen(self: OneLineParser, *_: object, **__: object) -> None:
        parsers.append(self)
        raise _Seen

    arguments, caps = CALLS[call]
    with patch.object(OneLineParser, "parse_args", seen), suppress(_Seen):
        main([*arguments, *caps])
    options = []
    for action in parsers[0]._actions:
        kind = getattr(action, "_typehint", None)
        choices = tuple(str(value) for value in getattr(kind, "__args__", ()) if isinstance(value, str | int))
        options.append(Option(tuple(action.option_strings), action.nargs != 0, choices))
    return tuple(option for option in options if option.names)


def options(calls: list[str]) -> st.SearchStrategy[Case]:
    """Calls with one to three faults in them; what keeps them short stands last."""
    return st.sampled_from(calls).flatmap(_faulty).map(Case)


def _faulty(call: str) -> st.SearchStrategy[list[str]]:
    valid, caps = CALLS[call]
    fault = st.one_of(
        st.tuples(st.just("option"), st.sampled_from(options_of(call)).flatmap(_with_value)),
        st.tuples(st.just("option"), st.sampled_from(options_of(call)).flatmap(_with_value)),
        st.tuples(st.just("value"), st.tuples(st.integers(1, len(valid) - 1), st.sampled_from(VALUES))),
        st.tuples(st.just("drop"), st.integers(0, len(valid) - 1)),
        st.tuples(st.just("twice"), st.integers(0, len(valid) - 1)),
        st.tuples(
            st.just("more"), st.sampled_from([*VALUES, *COMMANDS, "--help", "--print_config", "--nothing=1"])
        ),
    )

    def apply(faults: list[tuple[str, object]]) -> list[str]:
        line = list(valid)
        for kind, fault in faults:
            if kind == "option":
                line += fault  # type: ignore[arg-type]
            elif kind == "more":
                line.append(str(fault))
            elif not line:
                break
            elif kind == "value":
                place, value = fault  # type: ignore[misc]
                name, equals, _ = line[min(place, len(line) - 1)].partition("=")
                if value not in LONG or name.removeprefix("--") not in AMOUNTS:
                    line[min(place, len(line) - 1)] = f"{name}={value}" if equals else value
            else:
                place = min(int(fault), len(line) - 1)  # type: ignore[call-overload]
                line[place : place + 1] = [] if kind == "drop" else [line[place]] * 2
        return [*line, *caps]

    return st.lists(fault, min_size=1, max_size=3).map(apply)


def _with_value(option: Option) -> st.SearchStrategy[list[str]]:
    """`--name=value` or `--name value`; at times shortened, or without its value."""
    name = max(option.names, key=len)
    values = [*VALUES, *option.choices * 20]
    if name.rpartition(".")[2].removeprefix("--") in AMOUNTS:
        values = [value for value in values if value not in LONG]
    if not option.takes_value:
        return st.sampled_from([[name], [f"{name}=1"], [name, name], [name, "x"]])
    return st.one_of(
        st.sampled_from(values).map(lambda value: [f"{name}={value}"]),
        st.sampled_from(values).map(lambda value: [f"{name}={value}"]),
        st.sampled_from(values).map(lambda value: [name, value]),
        st.sampled_from([[name], [name[:-1] + "=1"], [name.upper() + "=1"], [f"{name}+=1"], [f"{name}.x=1"]]),
    )
