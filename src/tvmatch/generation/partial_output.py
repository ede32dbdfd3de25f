"""An output that takes long to make: what there is of it lies in a folder beside it, with what it is made by.

OUT.partial/settings.json   of the command, written first; another command is refused
OUT.partial/…               files of `sample_files`, until they are whole and go to their places
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tvmatch.errors import InputError
from tvmatch.storage.files import replacing
from tvmatch.storage.locks import FolderLock

FORMAT = "tvmatch-partial-1"
SETTINGS_NAME = "settings.json"


def partial_folder(out: Path) -> Path:
    """Where the unfinished output is."""
    return out.with_name(f"{out.name}.partial")


def check_new(out: Path, paths: Sequence[Path]) -> None:
    """Refuse outputs that exist, unless an earlier command for `out` was interrupted: `begin` looks at that.

    Raises:
        InputError: naming the output.
    """
    if not (partial_folder(out) / SETTINGS_NAME).is_file():
        _refuse_existing(paths)


@contextmanager
def begin(out: Path, paths: Sequence[Path], settings: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of an unfinished output, begun now, or earlier by a command of the same settings.

    Of an earlier command the outputs that exist are finished. The folder is removed at the end; if that is an
    error or the user's interruption it stays, unless it holds nothing yet.

    Args:
        out: as the user calls the output.
        paths: the outputs, which must not exist when the first command begins.
        settings: what the outputs are a function of, plain values for JSON.

    Raises:
        InputError: if an output exists, other settings began the folder, or it holds something else.
    """
    folder = partial_folder(out)
    ours = json.loads(json.dumps(settings))
    if not folder.exists() or _read(folder) is None:  # a folder of something else gets no lock
        _refuse_existing(paths)
    with FolderLock(folder, doing="draws samples into it"):
        try:
            _settle(folder, paths, ours)
            yield folder
        except BaseException as error:
            if not _holds_anything(folder) and not any(map(os.path.lexists, paths)):
                shutil.rmtree(folder, ignore_errors=True)
            # As where a disk is full: the user knows of the output.
            if isinstance(error, OSError) and str(error.filename).startswith(str(folder)):
                error.filename, error.filename2 = str(out), None
            raise
        shutil.rmtree(folder)


def _settle(folder: Path, paths: Sequence[Path], ours: dict[str, Any]) -> None:
    """Write the settings of a folder that holds nothing yet; any other must have been begun by the same."""
    before = _read(folder)
    if before is None or (before != ours and not _holds_anything(folder)):
        _refuse_existing(paths)
        _write(folder, ours)
    elif before != ours:
        raise InputError(
            "out",
            f"{folder} was begun differently, {_differences(before, ours)}; repeat that command, or "
            "remove the folder",
        )


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):  # also a link to nothing
            raise InputError("out", f"{path} exists already")


def _read(folder: Path) -> dict[str, Any] | None:
    """The settings that began a folder; None for a new one."""
    path = folder / SETTINGS_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"the format is {content['format']!r}")
        return dict(content["settings"])
    except FileNotFoundError:
        if _holds_anything(folder):
            raise InputError(
                "out", f"{folder} holds something else; remove it or take another name"
            ) from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("out", f"{path} is not of this version ({error}); remove {folder}") from None


def _write(folder: Path, settings: dict[str, Any]) -> None:
    with replacing(folder / SETTINGS_NAME) as unfinished:
        content = {"format": FORMAT, "settings": settings}
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _holds_anything(folder: Path) -> bool:
    """Whether a folder holds more than its settings, empty files and folders, and what was never finished."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return any(path.name != SETTINGS_NAME and path.stat().st_size > 0 for path in files)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name.replace('_', ' ')} {_shown(before.get(name))} before, {_shown(now.get(name))} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    )


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
