"""OmegaConf's configurations as inert stand-ins: what is found in them, and that no hostile one hangs."""

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from authors_files import authors_bytes
from helpers import randomize_, small_dit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_snapshot_facts import content

from tvmatch.errors import InputError
from tvmatch.interop import read_snapshot
from tvmatch.interop.checkpoints.inert_config import root_of, stated
from tvmatch.interop.checkpoints.training_facts import TrainingFacts, read_facts
from tvmatch.safe_pickle.inert import Inert, inert_class
from tvmatch.safe_pickle.unpickler import restricted_load

_VALUES = st.recursive(
    st.integers(-9, 9) | st.booleans() | st.floats(allow_nan=False) | st.text("abc", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner),
)


@given(_VALUES, st.sampled_from([3, 4, 5]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_plain_value_is_found_under_its_path(tmp_path: Path, values: Any, protocol: int) -> None:
    path = tmp_path / "configuration.pkl"
    path.write_bytes(pickle.dumps(OmegaConf.create({"root": values}), protocol))
    root = restricted_load(path)

    def check(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, child in value.items():
                check(child, f"{path}.{name}")
        elif isinstance(value, list):
            if all(isinstance(child, str | int | float) for child in value):
                assert stated(root, path) == tuple(value)
        else:
            assert stated(root, path) == value

    check(values, "root")


# Hostile configurations


def _config(state: Any, class_name: str = "DictConfig") -> Inert:
    stands_in = inert_class(class_name)()
    stands_in.state = state
    return stands_in


def _circle() -> Inert:
    first, second = _config({}), _config({})
    first.state, second.state = {"_parent": second, "_content": {}}, {"_parent": first, "_content": {}}
    return first


def _own_content() -> Inert:
    config = _config({"_parent": None})
    config.state["_content"] = {"loss": config, "cfg": config, "encoder": config, "raw_mean": [config]}
    return config


CONFIGS: dict[str, Inert] = {
    "parents in a circle": _circle(),
    "its own content": _own_content(),
    "state is text": _config("state"),
    "state is a tuple": _config(({"_content": {}}, {})),
    "content is text": _config({"_content": "${loss}", "_parent": None}),
    "content is itself": _config({"_content": "${loss.cfg}", "_parent": None}),
    "content is a number": _config({"_content": 10**400}),
    "sections are lists": _config({"_content": {"loss": [1, 2], "encoder": "a", "network": None}}),
    "values are objects": _config({"_content": {"loss": {"cfg": _config({"_val": _config({})})}}}),
    "a list of lists": _config(
        {"_content": {"encoder": {"raw_mean": [[[1]]], "raw_std": [], "final_std": 1}}}
    ),
    "a long list": _config({"_content": {"encoder": {"raw_mean": [1.0] * 10**6, "final_std": 1}}}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configurations_say_nothing(name: str) -> None:
    facts = read_facts({"_init_kwargs": {"model_kwargs": CONFIGS[name]}})
    assert facts == TrainingFacts()
    assert root_of(CONFIGS[name]) is (None if name == "parents in a circle" else CONFIGS[name])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("${loss.cfg}"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["_content", "_val", "_parent", "loss", "cfg", "encoder"]), inner)
        | st.builds(_config, inner)
        | st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN, PLAIN, PLAIN)
def test_configurations_of_any_kind(loss: Any, encoder: Any, parent: Any) -> None:
    config = _config({"_content": {"loss": loss, "encoder": encoder}, "_parent": parent})
    state = {"_init_kwargs": {"model_kwargs": config}, "_init_args": loss, "do_scale_param": encoder}
    facts = read_facts(state, [parent])
    assert json.dumps(facts.known(), allow_nan=False)


WHOLE = authors_bytes(
    content(network=randomize_(small_dit((4, 2, 2), 1, depth=1, hidden_size=4, heads=1))), 2
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_give_facts_or_an_error(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "changed.pkl"
    path.write_bytes(data)
    with suppress(InputError):
        assert json.dumps(read_snapshot(path).facts.known(), allow_nan=False)


@pytest.mark.parametrize("call", [b"getattr", b"partial"])
def test_what_is_taken_out_of_objects_runs_nothing(
    call: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """getattr(posix, "system")("touch marker"), through an object that is admitted, gives an inert one."""
    module = b"c__builtin__\n" if call == b"getattr" else b"cfunctools\n"
    taken = module + call + b"\n(cargparse\nNamespace\nX\x06\x00\x00\x00systemtR"
    called = taken + b"(X\x0c\x00\x00\x00touch markertR}X\x01\x00\x00\x00aK\x01sb"
    data = b"\x80\x02}(X\x05\x00\x00\x00thing" + called + b"u."
    monkeypatch.chdir(tmp_path)
    Path("snapshot.pkl").write_bytes(data)
    with pytest.raises(InputError, match="no network under ema or net; the file holds thing"):
        read_snapshot(Path("snapshot.pkl"))
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot.pkl"]
