"""The run folder: checks, lock and configuration."""

from pathlib import Path

from tvmatch.config.parser import parse_config
from tvmatch.config.schema import Config
from tvmatch.config.yaml_files import read_yaml
from tvmatch.errors import InputError
from tvmatch.storage.locks import LOCK_NAME, FolderLock, is_lock

CONFIG_NAME = "config.yaml"


def check_out(out: Path, resume: str | Path | None) -> None:
    """Check that a run may write to a folder.

    Raises:
        InputError: unless `out` is missing or empty, or contains the run to resume.
    """
    if not out.exists() or (out.is_dir() and all(is_lock(path.name) for path in out.iterdir())):
        return
    if resume is None:
        run = (out / CONFIG_NAME).is_file()
        raise InputError(
            "out",
            f"{out} holds another run; continue it with --resume {out}, or give another --out"
            if run
            else f"{out} is not an empty folder; give another --out",
        )
    if not (out / CONFIG_NAME).is_file():
        raise InputError("resume", f"{out} is not a run, it has no {CONFIG_NAME}")


def lock_run(out: Path, resume: str | Path | None) -> FolderLock:
    """Lock a run folder against other runs, until the lock is released.

    Raises:
        InputError: see `check_out`; or if another run holds the lock.
    """
    if not (out / CONFIG_NAME).is_file() and not (out / LOCK_NAME).exists():
        check_out(out, resume)  # before a lock file is written to an unrelated folder
    lock = FolderLock(out, doing="trains in it")
    try:
        check_out(out, resume)
    except BaseException:
        lock.release()
        raise
    return lock


def run_folder(path: Path) -> Path:
    """The run folder for a path to a run folder or to one of its checkpoints."""
    if not path.exists():
        raise InputError(path, "no such file or folder")
    if (path / CONFIG_NAME).is_file():
        return path
    full = path.resolve()
    if full.parent.name == "checkpoints" and (full.parents[1] / CONFIG_NAME).is_file():
        return path.parents[1] if len(path.parts) > 2 else full.parents[1]
    raise InputError(path, f"not a run: no {CONFIG_NAME} here or in the run folder above")


def run_config(run: Path) -> Config:
    """The configuration of a run folder.

    Raises:
        InputError: if the data set was passed from Python and is therefore not in the configuration.
    """
    content = read_yaml(run / CONFIG_NAME)
    if content.get("data") is None:
        raise InputError(
            run / CONFIG_NAME,
            "the data set of this run was passed from Python; evaluate it from Python, "
            "with tvmatch.evaluation",
        )
    return parse_config(content, str(run / CONFIG_NAME))
