"""A fuzz of the command line in one process: success, or one line that says what is wrong; no traceback.

`make test` tries the same two hundred cases every time; `make test-all` 2,000 others each time, and prints
one that fails. The rules are in `fuzz_cases.run_case`, the cases in the other modules `fuzz_*`.
"""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import datasets
import huggingface_hub
import pytest
from fuzz_cases import Case, Outcome, call, run_case
from fuzz_configurations import configurations
from fuzz_damage import damaged_descriptions, damaged_files
from fuzz_images import archives, layouts, tables
from fuzz_material import CALLS, make_material
from fuzz_options import options
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from tvmatch.cli import results, train
from tvmatch.demo import server

SLOW = ("dry run",)  # seconds each
SETTINGS = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
FEW = settings(SETTINGS, derandomize=True, phases=(Phase.explicit, Phase.generate))
MANY = settings(SETTINGS, derandomize=False, print_blob=True)
# The cases are the same in every run, so that no change is blamed for what an unrelated case finds;
# `FUZZ_SEED=2 make test-all` tries others.
SEED = int(os.environ.get("FUZZ_SEED", "1"))


class Material(NamedTuple):
    """Folder of what the calls of CALLS read, and how each of these ended, in a copy of it."""

    folder: Path
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    """Made once; nothing asks the Hub, opens a page, draws pictures after training or outlives the tests."""
    folder, here, path = tmp_path_factory.mktemp("fuzz"), os.getcwd(), list(sys.path)
    after_training = SimpleNamespace(
        draw=lambda *_: [],
        measure=lambda *_, **__: {},
        show=lambda *_: None,
        show_paths=results.show_paths,
        METRICS_NAME=results.METRICS_NAME,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(server, "serve", _served)
        patch.setattr(train, "results", after_training)
        (folder / "origin").mkdir()
        os.chdir(folder / "origin")
        make_material(folder / "origin")
        outcomes = {}
        for name, (words, caps) in CALLS.items():
            with copied(folder):
                outcomes[name] = call([*words, *caps])
        yield Material(folder, outcomes)
    os.chdir(here)
    sys.path[:] = path  # an extractor of the user's own adds the working directory


def _served(application: object, listening: socket.socket) -> int:
    return 0


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """The working directory is a copy of the material."""
    origin, copy = folder / "origin", folder / "copy"
    shutil.copytree(origin, copy)
    os.chdir(copy)
    try:
        yield copy
    finally:
        os.chdir(origin)
        shutil.rmtree(copy)


# How many of each kind `make test-all` tries, and the cases, given the names of all files.
KINDS: dict[str, tuple[int, Callable[[list[str]], st.SearchStrategy[Case]]]] = {
    "options": (600, lambda _: options([name for name in CALLS if name not in SLOW])),
    "configurations": (200, lambda _: configurations()),
    "layouts": (300, lambda _: layouts()),
    "archives": (200, lambda _: archives()),
    "tables": (100, lambda _: tables()),
    "damaged files": (300, damaged_files),
    "damaged descriptions": (300, damaged_descriptions),
}


def search(kind: str, material: Material, profile: settings, share: float = 1) -> None:
    """Try cases of a kind in copies of the material."""
    count, cases = KINDS[kind]
    origin = material.folder / "origin"
    files = sorted(str(path.relative_to(origin)) for path in origin.rglob("*") if path.is_file())

    @seed(SEED)
    @settings(profile, max_examples=int(share * count))
    @given(cases(files))
    def test(case: Case) -> None:
        note(repr(case))  # where Hypothesis would show how it was drawn
        with copied(material.folder) as folder:
            case.prepare(folder)
            run_case(case.arguments, folder)

    test()


def test_a_fault_is_told_in_one_line(material: Material) -> None:
    """A tenth of the cases of `make test-all`; in one test, since the material takes as long as they do.

    The calls themselves succeed: else every case would end before it reaches what it is to try.
    """
    for name, outcome in material.outcomes.items():
        assert outcome.code == 0 or name == "check", (name, outcome)
    for kind in KINDS:
        search(kind, material, FEW, share=0.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_many_faults_are_told_in_one_line(kind: str, material: Material) -> None:
    search(kind, material, MANY)
