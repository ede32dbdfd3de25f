"""A wheel built from the repository is complete, and runs from where it is installed."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tvmatch
from tvmatch.config import recipe_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    package = ROOT / "src" / "tvmatch"
    sources += [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for source in sources:
        target = folder / "copy" / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "copy"))
    (built,) = folder.glob("*.whl")
    return built


def pip(command: str, *arguments: str) -> None:
    """Without an index: all that building needs is installed beside the tests."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_contents(wheel: Path) -> None:
    """Every module, every recipe, the marker of types, the licence; no tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src"
    expected = {str(path.relative_to(package)) for path in (package / "tvmatch").rglob("*.py")}
    expected |= {f"tvmatch/recipes/{name}.yaml" for name in recipe_names()} | {"tvmatch/py.typed"}
    assert expected <= names
    assert {name.partition("/")[0] for name in names} == {
        "tvmatch",
        f"tvmatch-{tvmatch.__version__}.dist-info",
    }
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_version_has_one_home(wheel: Path) -> None:
    """The wheel's is the package's; pyproject.toml has none of its own."""
    assert wheel.name.split("-")[1] == tvmatch.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert "version" not in project


def test_it_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """From another folder, with nothing of the repository in sight."""
    target = tmp_path / "site"
    pip("install", "--target", str(target), str(wheel))
    script = "import tvmatch.cli; print(tvmatch.__file__); raise SystemExit(tvmatch.cli.main(['recipes']))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    where, *table = done.stdout.splitlines()
    assert Path(where).is_relative_to(target)
    for name in recipe_names():
        assert any(name in line for line in table)
    command = (target / "bin" / "tvmatch").read_text()
    assert "from tvmatch.cli import main" in command
