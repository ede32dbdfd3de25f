"""What was found in a data set, and what was left out and why: for people to read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_SHOWN = 8  # names in a line


class LeftOut(dict[str, tuple[int, str]]):
    """How many files or folders are left out, and the first of them, by the reason."""

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        count, first = self.get(reason, (0, name))
        self[reason] = (count + 1, first)

    def described(self) -> str:
        """In words: ".heic files: 12 (cats/0.heic, …), hidden files and folders: 1 (.DS_Store)"."""
        return ", ".join(
            f"{reason}: {count} ({printable(first)}{', …' if count > 1 else ''})"
            for reason, (count, first) in self.items()
        )


@dataclass(frozen=True)
class Notes:
    """What there is to say about the files of a data set.

    Attributes:
        left_out: what is none of its images.
        why_none: why there are no labels, "" if there are some.
        problem: what is wrong with the labels, to be raised for those who want them.
    """

    left_out: LeftOut = field(default_factory=LeftOut)
    why_none: str = ""
    problem: str = ""


def printable(name: str) -> str:
    """A file's name for messages, which are one line."""
    return name if name.isprintable() else ascii(name)[1:-1]


def lines_of_findings(
    where: str,
    count: int,
    class_names: Sequence[str] | None,
    labels: NDArray[np.integer] | None,
    notes: Notes | None = None,
    *,
    why_none: str = "",
    unit: str = "images",
) -> tuple[str, ...]:
    """A line on images and classes; where there is need, one on empty classes and one on what was left out.

    Args:
        where: path and split.
        count: number of images.
        class_names: in the order of the class numbers, or None without classes.
        labels: a class number each, or None.
        notes: on the files.
        why_none: why there are no classes, if they were looked for.
        unit: what the elements are.
    """
    notes = notes or Notes()
    lines = [f"{where}: {count:,} {unit}, {_classes(class_names, why_none)}"]
    if class_names is not None and labels is not None:
        images = np.bincount(labels, minlength=len(class_names))
        empty = np.flatnonzero(images == 0).tolist()
        if empty:
            numbers = _shown(
                str(k) if class_names[k] == str(k) else f"{k} ({printable(class_names[k])})" for k in empty
            )
            hint = "; classes are numbered from 0" if empty == [0] and class_names[0] == "0" else ""
            lines.append(f"{where}: no {unit} of {len(empty)} of {len(class_names)} classes: {numbers}{hint}")
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
