"""Imports point one way: which room may see which, read from the source, and what `import tvmatch` loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import tvmatch

ROOT = Path(tvmatch.__file__).parent

# A room is a module or a package of `tvmatch`; `data.spec` is a room of its own, ahead of the other data.
FOUNDATIONS = {"errors", "seeds", "files", "locks", "distributed", "hub_client", "user_modules"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeds": set(),
    "files": {"errors"},
    "locks": {"errors"},
    "distributed": {"errors"},
    "hub_client": {"errors"},
    "user_modules": set(),
    "joint_backward": set(),
    "dual": {"joint_backward"},
    "attention": {"dual"},
    "models": {"dual", "attention", "errors", "seeds"},
    "compilation": FOUNDATIONS | {"dual", "attention"},
    "option_checks": {"errors"},
    "condition": {"errors"},
    "flow_map": {"dual", "errors", "condition"},
    "objectives": FOUNDATIONS | {"dual", "condition", "flow_map", "option_checks"},
    "sampling": FOUNDATIONS | {"dual", "condition", "flow_map"},
    "data.spec": {"errors"},
    "model_files": FOUNDATIONS | {"data.spec", "condition"},
    "trained_model": FOUNDATIONS
    | {"dual", "models", "condition", "flow_map", "sampling", "data.spec", "model_files"},
    "loading": FOUNDATIONS | {"data", "model_files", "trained_model"},
    "interop": FOUNDATIONS
    | {
        "loading",
        "dual",
        "models",
        "condition",
        "flow_map",
        "sampling",
        "data.spec",
        "data",
        "model_files",
        "trained_model",
    },
    "diffusers": {"errors", "interop"},
    "theory": FOUNDATIONS | {"dual", "flow_map"},
    "data": FOUNDATIONS | {"data.spec", "condition"},
    "pictures": FOUNDATIONS,
}
CORE = set(ALLOWED) - {"pictures"}
ALLOWED["check"] = CORE
ALLOWED["demo"] = CORE | {"pictures"}
ALLOWED["training"] = CORE | {"pictures"}
ALLOWED["evaluation"] = CORE | {"pictures"}
ALLOWED["cli"] = CORE | {"pictures", "check", "demo", "training", "evaluation", ""}
ALLOWED["__main__"] = {"cli"}
# The package itself: what it shows, and what it imports when first asked for.
ALLOWED[""] = {"dual", "errors", "trained_model", "interop", "training"}

# Beside the standard library.
LIGHT = {"torch", "numpy", "safetensors"}
# Files of a light room that are there for another package.
OTHERS = {
    "hub_client.py": {"huggingface_hub"},
    "interop/hub.py": {"PIL"},
    "interop/model_card.py": {"huggingface_hub"},
    "interop/diffusers_pipeline.py": {"diffusers"},
    "interop/diffusers_transformer.py": {"diffusers"},
    "interop/pipeline_checks.py": {"diffusers"},
}
KERNELS = {"triton"}  # inside `attention`, where the next test says by which files
LIGHT_ROOMS = {
    *FOUNDATIONS,
    "joint_backward",
    "dual",
    "attention",
    "models",
    "compilation",
    "option_checks",
    "condition",
    "flow_map",
    "objectives",
    "sampling",
    "data.spec",
    "model_files",
    "trained_model",
    "loading",
    "interop",
    "theory",
    "check",
    "",
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


def room_of_module(module: str) -> str:
    """`tvmatch.models.dit` is in room `models`, `tvmatch` itself in room ``."""
    parts = module.split(".")[1:]
    return "data.spec" if parts[:2] == ["data", "spec"] else parts[0] if parts else ""


def room_of_file(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return room_of_module(".".join(["tvmatch", *(part for part in parts if part != "__init__")]))


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    room = room_of_file(file)
    own = [found for found in imports(file) if found.module.split(".")[0] == "tvmatch"]
    wrong = [str(found) for found in own if room_of_module(found.module) not in ALLOWED[room] | {room}]
    assert not wrong, f"room {room!r} may import {sorted(ALLOWED[room])}"


def test_the_map_of_rooms_has_no_cycles() -> None:
    """What may be imported never leads back; the package itself stands above all but the command line."""
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {room for room, allowed in ALLOWED.items() if room not in done and allowed <= done}
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready
    assert "evaluation" not in ALLOWED["training"]
    assert "training" not in ALLOWED["evaluation"]


@pytest.mark.parametrize("room", sorted(LIGHT_ROOMS))
def test_the_core_needs_pytorch_numpy_and_safetensors_alone(room: str) -> None:
    own = [file for file in files() if room_of_file(file) == room]
    assert own, "the room is empty or was renamed"
    allowed = LIGHT | {"tvmatch"} | sys.stdlib_module_names | (KERNELS if room == "attention" else set())
    found = [
        item
        for file in own
        for item in imports(file)
        if item.module.split(".")[0] not in allowed | OTHERS.get(str(file.relative_to(ROOT)), set())
    ]
    assert not found, [str(item) for item in found]


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
    assert not others, "the operators are the door to the kernels"


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
