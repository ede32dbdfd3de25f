"""The unfinished part of an output that takes long to draw.

OUT.partial/settings.json   everything the samples depend on; a command with other settings is refused
OUT.partial/…               files of `sample_files`, until they are complete and renamed to their final names
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
    """The folder of the unfinished output."""
    return out.with_name(f"{out.name}.partial")


def check_new(out: Path, paths: Sequence[Path]) -> None:
    """Refuse existing outputs, unless an interrupted command for `out` can be resumed (see `begin`).

    Raises:
        InputError: if an output exists.
    """
    if not (partial_folder(out) / SETTINGS_NAME).is_file():
        _refuse_existing(paths)


@contextmanager
def begin(out: Path, paths: Sequence[Path], settings: Mapping[str, Any]) -> Iterator[Path]:
    """Create the folder of an unfinished output, or open the one that a command of the same settings left.

    Outputs that such a command has finished may exist. The folder is removed when the context ends. After an
    error or an interruption it stays if it holds samples.

    Args:
        out: the output as the user named it.
        paths: the output files or folders, which must not exist when the folder is created.
        settings: everything the outputs depend on, as JSON values.

    Raises:
        InputError: if an output exists, the folder was created with other settings, is in use by another
            process, or was not created by this function.
    """
    folder = partial_folder(out)
    settings = json.loads(json.dumps(settings))
    if not folder.exists() or _read(folder) is None:  # checked before a lock is written into the folder
        _refuse_existing(paths)
    with FolderLock(folder, doing="draws samples into it"):
        before = _read(folder)
        if before != settings:
            if before is not None and _holds_samples(folder):
                raise InputError(
                    "out",
                    f"{folder} was begun with other options, {_differences(before, settings)}; repeat that "
                    "command, or remove the folder",
                )
            _refuse_existing(paths)
            _write(folder, settings)
        try:
            yield folder
        except BaseException:
            if not _holds_samples(folder) and not any(map(os.path.lexists, paths)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):  # true for a broken link as well
            raise InputError("out", f"{path} exists already")


def _read(folder: Path) -> dict[str, Any] | None:
    """The settings stored in a folder; None if it is empty."""
    path = folder / SETTINGS_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"the format is {content['format']!r}")
        return dict(content["settings"])
    except FileNotFoundError:
        if _holds_samples(folder):
            raise InputError("out", f"{folder} holds other files; remove it or choose another name") from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("out", f"{path} is not of this version ({error}); remove {folder}") from None


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    with replacing(folder / SETTINGS_NAME) as unfinished:
        content = {"format": FORMAT, "settings": settings}
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _holds_samples(folder: Path) -> bool:
    """Whether a folder holds anything but its settings, hidden files and empty files."""
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
