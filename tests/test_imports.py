"""Imports point one way, as docs/architecture.md has it, and `import tvmatch` loads little."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import tvmatch

ROOT = Path(tvmatch.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"

# Parts that import only these of `tvmatch`, besides themselves.
APART = {
    "dual": set(),
    "attention": {"dual"},
    "safe_pickle": {"errors", "storage"},
    "theory": {"errors", "flow_map"},
    "objectives": {"errors", "seeds", "condition", "flow_map", "option_checks"},
    "evaluation/metrics": {"errors", "data"},
}
# No file of the first imports the second.
STRANGERS = [("training", "evaluation"), ("evaluation", "training"), ("generation", "evaluation")]
# The parts that need, beside the standard library, only these packages; and files that may need another.
LIGHT = {"torch", "numpy", "safetensors"}
LIGHT_PARTS = [
    *("errors", "seeds", "user_modules", "storage", "distributed", "devices", "option_checks", "dual"),
    *(
        "attention",
        "models",
        "compilation",
        "acceleration",
        "condition",
        "flow_map",
        "objectives",
        "sampling",
    ),
    *("theory", "trained_model", "safe_pickle", "interop", "check", ""),
]
OTHERS = {
    "storage/hub.py": {"huggingface_hub"},
    "attention/launch.py": {"triton"},
    "interop/hub.py": {"PIL"},
    "interop/model_card.py": {"huggingface_hub"},
    "interop/diffusers/pipeline.py": {"diffusers"},
    "interop/diffusers/transformer.py": {"diffusers"},
    "interop/diffusers/checks.py": {"diffusers"},
}
# Of these PyTorch itself may load the second kind.
NEVER = {"triton", "torchvision", "diffusers"}
NOT_BY_US = {"sklearn", "datasets", "matplotlib", "ot", "rich", "jsonargparse", "PIL", "tensorboard", "scipy"}


class Import(NamedTuple):
    """One import of a file: the module's full name, and the line."""

    file: Path
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.module}"


@cache
def files() -> tuple[Path, ...]:
    return tuple(sorted(ROOT.rglob("*.py")))


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(file: Path) -> Iterator[Import]:
    """Of a whole file, those inside functions included; `from tvmatch import dual` is `tvmatch.dual`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                own = name.startswith("tvmatch.") and is_module(name)
                yield Import(file, node.lineno, name if own else str(node.module))


def part_of_module(module: str) -> str:
    """`tvmatch.models.dit` belongs to `models`, `tvmatch` itself to ``."""
    return (module.split(".")[1:] or [""])[0]


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(["tvmatch", *(part for part in parts if part != "__init__")])


def own_imports(file: Path) -> list[Import]:
    return [found for found in imports(file) if found.module.split(".")[0] == "tvmatch"]


@cache
def order() -> tuple[str, ...]:
    """The parts in the order of the page's table, lowest first; the package itself and `__main__` last."""
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    parts = tuple(name.rstrip("/") for row in rows for name in re.findall(r"`([\w/]+)`", row))
    return (*parts, "", "__main__")


def test_the_page_names_every_part() -> None:
    there = {part_of_module(module_of(file)) for file in files()}
    assert there | {"recipes"} == set(order())
    assert len(order()) == len(set(order()))


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    part = part_of_module(module_of(file))
    below = {part, *order()[: order().index(part)]}
    if part == "cli":
        below.add("")  # the version
    wrong = [str(found) for found in own_imports(file) if part_of_module(found.module) not in below]
    assert not wrong, f"{part} may import {sorted(below)}"


def test_no_two_files_import_each_other() -> None:
    """Directly or indirectly, imports inside functions and for type checkers included."""
    graph = {module_of(file): {found.module for found in own_imports(file)} for file in files()}
    graph["tvmatch"] = set()  # what it shows is imported when it is asked for
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_folders_have_at_most_sixteen_files_of_at_most_three_hundred_lines() -> None:
    folders = {file.parent for file in files()}
    crowded = {str(folder): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in crowded.items() if count > 16} == {}
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files()}
    assert {file: length for file, length in lengths.items() if length > 300} == {}


@pytest.mark.parametrize("folder", APART)
def test_parts_that_stand_apart(folder: str) -> None:
    own = [file for file in files() if str(file.relative_to(ROOT)).startswith(folder)]
    assert own
    allowed = APART[folder] | {folder.split("/")[0]}
    wrong = [str(found) for file in own for found in own_imports(file)]
    assert [text for text in wrong if part_of_module(text.rpartition(" ")[2]) not in allowed] == []


@pytest.mark.parametrize(("part", "other"), STRANGERS)
def test_strangers(part: str, other: str) -> None:
    own = [file for file in files() if part_of_module(module_of(file)) == part]
    found = [str(item) for file in own for item in own_imports(file) if part_of_module(item.module) == other]
    assert own
    assert not found


@pytest.mark.parametrize("part", LIGHT_PARTS)
def test_the_core_needs_pytorch_numpy_and_safetensors_alone(part: str) -> None:
    own = [file for file in files() if part_of_module(module_of(file)) == part]
    assert own, "the part is empty or was renamed"
    found = []
    for file in own:
        name = str(file.relative_to(ROOT))
        kernels = {"triton"} if name.startswith("attention/kernels/") else set()
        allowed = LIGHT | {"tvmatch"} | sys.stdlib_module_names | OTHERS.get(name, set()) | kernels
        found += [str(item) for item in imports(file) if item.module.split(".")[0] not in allowed]
    assert not found


def test_only_the_kernels_and_their_launcher_import_triton() -> None:
    found = {
        str(item.file.relative_to(ROOT))
        for file in files()
        for item in imports(file)
        if item.module.split(".")[0] == "triton"
    }
    assert {name for name in found if not name.startswith("attention/kernels/")} == {"attention/launch.py"}
    loaded_by = {
        str(item.file.relative_to(ROOT))
        for file in files()
        for item in imports(file)
        if item.module.startswith(("tvmatch.attention.launch", "tvmatch.attention.kernels"))
    }
    others = {name for name in loaded_by if not name.startswith("attention/")}
    assert not others, "only attention imports the kernels"


def test_import_loads_no_heavy_package() -> None:
    """In a fresh process: what a person waits for, and what a machine without a GPU may lack."""
    program = (
        "import sys, torch, numpy, safetensors.torch; before = set(sys.modules); import tvmatch;"
        "ours = {name.split('.')[0] for name in set(sys.modules) - before};"
        f"print(sorted(({NOT_BY_US} & ours) | ({NEVER} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
