"""An `InputError` keeps what it is about and what is wrong apart."""

import copy
import pickle
from pathlib import Path

import pytest

from tvmatch.errors import InputError

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


def test_the_cause_is_kept() -> None:
    def renamed() -> None:
        try:
            raise ERRORS[0]
        except InputError as error:
            raise error.about("nfe") from error

    with pytest.raises(InputError, match=r"^nfe: must be at least 1, got 0$") as raised:
        renamed()
    assert raised.value.__cause__ is ERRORS[0]
