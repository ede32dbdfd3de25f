"""An `InputError` keeps what it is about and what is wrong apart."""

import copy
import pickle
import subprocess
import sys
from multiprocessing import Pool
from pathlib import Path

import pytest
from PIL import Image

from tvmatch.data.images.reader import open_images
from tvmatch.data.read_ahead import read_ahead
from tvmatch.errors import InputError, arguments_named, name_of
from tvmatch.sampling import time_grid

ERRORS = [
    InputError("steps", "must be at least 1, got 0"),
    InputError(Path("a: b/model.json"), "missing"),  # a colon of its own does not move the border
    InputError("no command 'trian'"),
    InputError(None, "about: nothing"),
]


def test_the_text_is_subject_and_message() -> None:
    assert [(error.subject, error.message, str(error)) for error in ERRORS] == [
        ("steps", "must be at least 1, got 0", "steps: must be at least 1, got 0"),
        ("a: b/model.json", "missing", "a: b/model.json: missing"),
        (None, "no command 'trian'", "no command 'trian'"),
        (None, "about: nothing", "about: nothing"),
    ]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_and_copying_keep_both_parts(error: InputError, protocol: int) -> None:
    error.add_note("a note")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is InputError
        assert (again.subject, again.message, str(again)) == (error.subject, error.message, str(error))
        assert again.__notes__ == error.__notes__


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_another_subject_or_a_place_leaves_the_message(error: InputError) -> None:
    other = error.about("nfe")
    assert (other.subject, other.message, str(other)) == ("nfe", error.message, f"nfe: {error.message}")
    placed = error.within("run.yaml")
    assert (placed.subject, placed.message) == ("run.yaml", str(error))
    assert error.about(error.subject).args == error.args
    hinted = error.with_hint("try 1")
    assert (hinted.subject, hinted.message) == (error.subject, f"{error.message}; try 1")


def test_the_cause_is_kept() -> None:
    def renamed() -> None:
        try:
            raise ERRORS[0]
        except InputError as error:
            raise error.about("nfe") from error

    with pytest.raises(InputError, match=r"^nfe: must be at least 1, got 0$") as raised:
        renamed()
    assert raised.value.__cause__ is ERRORS[0]


def fail(number: int) -> int:
    raise InputError(None if number < 0 else f"image: {number}", "is: broken")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "subject"), [(7, "image: 7"), (-1, None)])
def test_a_process_that_reads_passes_both_parts_on(workers: int, number: int, subject: str | None) -> None:
    with pytest.raises(InputError) as raised, read_ahead(fail, [number], workers) as read:
        next(read)
    assert (raised.value.subject, raised.value.message) == (subject, "is: broken")


def test_a_pool_of_processes_passes_both_parts_on() -> None:
    with Pool(1) as pool, pytest.raises(InputError) as raised:
        pool.map(fail, [7])
    assert (raised.value.subject, raised.value.message) == ("image: 7", "is: broken")


# Arguments that a caller offers under names of its own

PROGRAM = """
import argparse, sys
import tvmatch
from tvmatch.errors import arguments_named
from tvmatch.sampling import time_grid

parser = argparse.ArgumentParser()
parser.add_argument("--nfe", type=int, default=1)
try:
    with arguments_named({"steps": "--nfe"}):
        print(time_grid(parser.parse_args().nfe))
except tvmatch.InputError as error:
    sys.exit(f"draw: {error}")
"""


def test_a_program_that_renames_an_option_gets_one_line_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "draw.py").write_text(PROGRAM)
    command = [sys.executable, "draw.py", "--nfe=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["draw: --nfe: must be at least 1, got 0"]


def test_a_message_that_mentions_another_option_calls_it_by_the_callers_name() -> None:
    with pytest.raises(InputError) as raised, arguments_named({"steps": "nfe", "times": "grid"}):
        time_grid(4, (1.0, 0.5, 0.0))
    assert str(raised.value) == "grid: 3 times make 2 steps, but nfe is 4"


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (("train2017", "val2017"), "train", "name one of these with --subset train2017, give --photos "),
        (("train", "extra"), "train", "for that split alone, name the other one with --subset extra"),
        (("train", "val"), "other", "'other' of "),
    ],
)
def test_data_of_a_program_with_options_of_its_own(
    tmp_path: Path, folders: tuple[str, ...], split: str, expected: str
) -> None:
    """A path that holds the names of the library's options is not touched."""
    root = tmp_path / "data.path data.split"
    for folder in folders:
        (root / folder / "cats").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / folder / "cats" / "0.png")
    names = {"data.path": "--photos", "data.split": "subset"}
    with pytest.raises(InputError) as raised, arguments_named(names):
        open_images(str(root), split, label_column=None)
    assert raised.value.subject == ("subset" if split == "other" else "--photos")
    assert expected in raised.value.message
    assert "data.path" not in raised.value.message.replace(str(root), "")


def test_names_within_names() -> None:
    """The inner names are those of a function that itself is called under others."""
    seen: list[str] = []

    @arguments_named({"a": "b"})
    def inner() -> None:
        seen.extend(map(name_of, ("a", "b", "other", "free")))
        raise InputError("a", "is wrong")

    with pytest.raises(InputError) as raised, arguments_named({"b": "--c", "other": "--own"}):
        inner()
    assert seen == ["--c", "--c", "--own", "free"]
    assert str(raised.value) == "--c: is wrong"
    assert name_of("a") == "a", "names hold inside alone, also after an error"


@pytest.mark.parametrize("error", [InputError("count", "is 0"), InputError("steps: is 0"), KeyError("steps")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    """An argument that is not renamed, a text that only looks like one that is, and other exceptions."""
    with pytest.raises(type(error)) as raised, arguments_named({"steps": "nfe"}):
        raise error
    assert raised.value is error
