"""Labels as people write them, where names of classes may hold commas, digits and blanks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize_, small_dit
from hypothesis import given
from hypothesis import strategies as st

from tvmatch.cli import main
from tvmatch.data.spec import DataSpec
from tvmatch.demo.generation import Demonstration
from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel

SWIMWEAR = ("maillot", "maillot, tank suit", "bikini, two-piece", "3", "0")


def spec(*names: str) -> DataSpec:
    return DataSpec("image", (3, 4, 4), names, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("maillot, tank suit", [1]),
        (" maillot, tank suit ", [1]),
        ("maillot", [0]),
        ("maillot,maillot", [0, 0]),
        ("maillot, tank suit, maillot", [1, 0]),
        ("maillot,maillot, tank suit", [0, 1]),
        ("bikini, two-piece,maillot, tank suit", [2, 1]),
        ("1, bikini, two-piece ,4", [1, 2, 4]),
        ("3,0", [3, 4]),  # their names, not their numbers
        ("1, 2", [1, 2]),
    ],
)
def test_names_with_commas(text: str, expected: list[int]) -> None:
    assert spec(*SWIMWEAR).labels_in(text).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maillot, tank", "no class is named ' tank'"),
        ("tank suit", "no class is named 'tank suit'"),
        ("maillot,tank suit", "no class is named 'tank suit'"),
        ("3,nonsense", "no class is named 'nonsense'"),
        ("maillot, tank suit,", "must be names or numbers like 3,cat, got 'maillot, tank suit,'"),
        (",", "must be names or numbers"),
        ("", "must be names or numbers"),
        ("1,5", "5 is outside 0 … 4"),
        ("-1", "-1 is outside 0 … 4"),
    ],
)
def test_what_no_class_is_called(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"labels: {message}"):
        spec(*SWIMWEAR).labels_in(text)


def test_more_than_one_reading() -> None:
    """An error that says how to write each; the whole name of one class is one reading only."""
    several = spec("a", "b", "a, b", "b, c", "c")
    with pytest.raises(
        InputError, match=r"labels: 'a, b, c' can be cut .* write their numbers, 0,3 or 0,1,4$"
    ):
        several.labels_in("a, b, c")
    with pytest.raises(InputError, match="in several ways"):
        several.labels_in("c,a, b")
    assert several.labels_in("a, b").tolist() == [2]
    assert several.labels_in("0,3").tolist() == [0, 3]
    assert several.labels_in("a,b").tolist() == [0, 1]  # no name is written so
    assert spec(" ,a", " ", "a").labels_in(" ,a").tolist() == [0]  # blanks and all
    long = spec("a", "a,a").labels_in
    with pytest.raises(InputError) as caught:
        long(",".join("a" * 5000))
    assert len(str(caught.value)) < 400


NAMES = st.lists(st.text("ab0, ", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@given(names=NAMES, draws=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_a_list_of_names_is_read_back_or_refused(names: list[str], draws: list[int]) -> None:
    """Against all ways to cut the text."""
    classes = spec(*names)
    text = ",".join(names[draw % len(names)] for draw in draws)
    parts, readings = text.split(","), set()
    for cuts in itertools.product((False, True), repeat=len(parts) - 1):
        ends = [k + 1 for k, cut in enumerate(cuts) if cut] + [len(parts)]
        labels = [",".join(parts[a:b]) for a, b in itertools.pairwise([0, *ends])]
        try:
            readings.add(tuple(classes.label_indices(labels).tolist()))
        except InputError:
            continue
    whole = [k for k, name in enumerate(names) if name in (text, text.strip())]
    if whole:
        assert classes.labels_in(text).item() in whole
    elif len(readings) == 1:
        assert classes.labels_in(text).tolist() == list(*readings)
    else:
        with pytest.raises(InputError, match="in several ways"):
            classes.labels_in(text)


def model(*names: str) -> TrainedModel:
    network = randomize_(small_dit((3, 4, 4), len(names))).requires_grad_(False).eval()
    return TrainedModel(network, spec(*names), scaled=False, guidance=1.0)


def test_every_way_to_ask_for_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line, Python and the page mean the same class by the same words."""
    monkeypatch.chdir(tmp_path)
    swimwear = model(*SWIMWEAR)
    Path("checkpoint").mkdir()
    swimwear.save(Path("checkpoint"))
    for number, word in enumerate((*SWIMWEAR, " maillot, tank suit ")):
        label = 1 if "tank" in word else number
        expected = swimwear.sample([label])
        assert torch.equal(swimwear.sample(word), expected)
        assert Demonstration(swimwear).request(0, [1], 1, word).label == label
        assert main(["sample", "checkpoint", f"--labels={word}", f"--out={number}.npz"]) == 0
        np.testing.assert_array_equal(np.load(f"{number}.npz")["samples"], expected.numpy())


@pytest.mark.parametrize("labels", ["3,nonsense", "maillot,,3", "maillot, tank suit, 5"])
def test_all_labels_are_read_even_if_the_first_are_enough(
    labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoint").mkdir()
    model(*SWIMWEAR).save(Path("checkpoint"))
    assert main(["sample", "checkpoint", f"--labels={labels}", "--count=1", "--out=a.npz"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tvmatch: error: labels: ")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
