"""What was found in a data set, what was left out and why, as text for users."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_SHOWN = 8  # names per line


class LeftOut(dict[str, tuple[int, str]]):
    """For each reason, how many files or folders are left out, and the first of them."""

    def add(self, reason: str, name: str) -> None:
        """Count another file or folder."""
        count, first = self.get(reason, (0, name))
        self[reason] = (count + 1, first)

    def described(self) -> str:
        """As text: ".heic files: 12 (cats/0.heic, …), hidden files and folders: 1 (.DS_Store)"."""
        return ", ".join(
            f"{reason}: {count} ({printable(first)}{', …' if count > 1 else ''})"
            for reason, (count, first) in self.items()
        )


@dataclass(frozen=True)
class Notes:
    """Notes on the files of a data set.

    Attributes:
        left_out: files and folders that are not used.
        why_none: why there are no labels, "" if there are labels.
        problem: what is wrong with the labels, an error if labels are requested; "" if nothing.
    """

    left_out: LeftOut = field(default_factory=LeftOut)
    why_none: str = ""
    problem: str = ""


def printable(name: str) -> str:
    """A file name for messages of one line: escaped if it has unprintable characters."""
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
    """A line about images and classes; if needed, one about empty classes and one about files left out.

    Args:
        where: path and split.
        count: number of images.
        class_names: in the order of the class numbers, None without classes.
        labels: class number of each image, None without classes.
        notes: on the files.
        why_none: why there are no classes, if the user left the choice open.
        unit: noun for the elements.
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
