"""Find the columns of images and classes in a data set, and the names of the classes."""

from collections.abc import Sequence
from typing import Any

import datasets

from tvmatch.data.images.rows import Source
from tvmatch.data.spec import MOST_CLASSES
from tvmatch.errors import InputError, name_of

AUTO = "auto"

_LIKE_LABELS = ("labels", "class", "classes")  # names of columns that probably hold classes


def find_image_column(rows: datasets.Dataset, column: str | None, path: str) -> str:
    """The column `column`, or if it is None the only column with images; `path` is for messages.

    Raises:
        InputError: the column is missing or holds no images, or several columns hold images.
    """

    def holds_images(column: str) -> bool:
        feature = rows.features[column]
        # Parquet files written without `datasets` have the same bytes and paths without the image type.
        return isinstance(feature, datasets.Image) or (
            isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        )

    columns = ", ".join(rows.column_names)
    if column is None:
        found: list[str] = [name for name in rows.column_names if holds_images(name)]
        if len(found) != 1:
            raise InputError(
                "data.image_column",
                f"say which column of {path} holds the images, "
                f"{len(found)} seem to; the columns are {columns}",
            )
        return found[0]
    if column not in rows.column_names:
        raise InputError("data.image_column", f"there is no column {column!r}; the columns are {columns}")
    is_binary = rows.features[column] in (datasets.Value("binary"), datasets.Value("large_binary"))
    if not is_binary and not holds_images(column):
        raise InputError("data.image_column", f"{column!r} of {path} does not hold images")
    return column


def choose_label_column(source: Source, column: str | None, path: str) -> str | None:
    """The column `column`; for `AUTO`, "label" if it holds any labels, else None.

    Raises:
        InputError: for `AUTO`, if the labels are ambiguous, or probably in a column of another name.
    """
    if column != AUTO:
        return column
    _refuse(source.notes.problem)
    rows = source.rows
    if "label" in rows.column_names:
        labels = rows.with_format("arrow")["label"][:]
        return "label" if labels.null_count < len(labels) else None
    others = [
        name
        for name in rows.column_names
        if isinstance(rows.features[name], datasets.ClassLabel) or name in _LIKE_LABELS
    ]
    if others:
        raise InputError(
            "data.label_column",
            f"{path} has no column label, but classes in {', '.join(others)}; name the "
            "column, or null for no classes",
        )
    return None


def _refuse(problem: str) -> None:
    if problem:
        way_out = f"or use {name_of('data.label_column')} null, for no classes"
        raise InputError("data.path", f"{problem}, {way_out}")


def find_classes(source: Source, column: str, path: str) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """Class names in the order of the class numbers; and if the column holds names, the number of each name.

    Raises:
        InputError: there is no such column, or it holds values that are not classes.
    """
    rows = source.rows
    if column == "label":
        _refuse(source.notes.problem)
    if column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise InputError("data.label_column", f"there is no column {column!r}; the columns are {columns}")
    feature = rows.features[column]
    kind = feature.dtype if isinstance(feature, datasets.Value | datasets.ClassLabel) else ""
    if kind not in ("string", "large_string") and "int" not in kind:
        raise InputError(
            "data.label_column", f"{column!r} must hold names or whole numbers, not {kind or feature}"
        )
    values: Sequence[Any] = rows.unique(column)
    if list(values) == [None]:
        why = f"; {source.notes.why_none}" if source.notes.why_none else ""
        raise InputError("data.label_column", f"{path} is a data set without labels{why}")
    if None in values:
        first = rows.with_format("arrow")[column][:].is_null().to_pylist().index(True)
        raise InputError(
            "data.label_column", f"{column!r} has rows without a label, the first is {source.name(first)}"
        )
    if "int" not in kind:
        names = tuple(sorted(values))
        return names, {name: number for number, name in enumerate(names)}
    low, high = min(values), max(values)
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    most = len(names) or MOST_CLASSES
    if low < 0 or high >= most:
        wrong = low if low < 0 else high
        raise InputError("data.label_column", f"{column!r} holds {wrong}, classes are numbers 0 … {most - 1}")
    return names or tuple(str(number) for number in range(high + 1)), None
