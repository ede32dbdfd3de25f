"""What was found in a data set, and what was left out and why: for people to read."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tvmatch.data.listing import Notes, printable

_SHOWN = 8  # names in a line


def lines_of_findings(
    where: str,
    count: int,
    class_names: Sequence[str] | None,
    labels: NDArray[np.integer] | None,
    notes: Notes,
    *,
    in_vain: bool,
) -> tuple[str, ...]:
    """A line on images and classes; where there is need, one on empty classes and one on what was left out.

    Args:
        where: path and split.
        count: number of images.
        class_names: in the order of the class numbers, or None without classes.
        labels: a class number each, or None.
        notes: on the files.
        in_vain: whether labels were looked for, if there are none.
    """
    lines = [f"{where}: {count} images, {_classes(class_names, notes.why_none if in_vain else '')}"]
    if class_names is not None and labels is not None:
        images = np.bincount(labels, minlength=len(class_names))
        empty = np.flatnonzero(images == 0).tolist()
        if empty:
            numbers = _shown(
                str(k) if class_names[k] == str(k) else f"{k} ({printable(class_names[k])})" for k in empty
            )
            hint = "; classes are numbered from 0" if empty == [0] else ""
            lines.append(f"{where}: no images of {len(empty)} of {len(class_names)} classes: {numbers}{hint}")
    if notes.left_out:
        lines.append(f"{where}: left out {notes.left_out.described()}")
    return tuple(lines)


def _classes(class_names: Sequence[str] | None, why: str) -> str:
    if class_names is None:
        return f"no classes ({why})" if why else "no classes"
    noun = "class" if len(class_names) == 1 else "classes"
    return f"{len(class_names)} {noun}: {_shown(map(printable, class_names))}"


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
