"""Metrics as a file and as a table, the same for digits, points and images."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from tvmatch.files import replacing

_FIRST_KEYS = ("dataset", "steps", "parameters", "train_seconds")
_LAST_KEY = "nfe"


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics` as JSON, whole or not at all: a former file stays until the new one is complete.

    First come the data set, training steps, parameters and training time, then the figures of the real
    data, last `nfe`, which holds one entry for each number of sampling steps.

    Raises:
        ValueError: if a number is not finite (JSON has none such).
        OSError: if the file cannot be written.
    """
    first = [key for key in _FIRST_KEYS if key in metrics]
    middle = [key for key in metrics if key not in (*_FIRST_KEYS, _LAST_KEY)]
    last = [key for key in (_LAST_KEY,) if key in metrics]
    ordered = {key: metrics[key] for key in [*first, *middle, *last]}
    text = json.dumps(ordered, indent=2, allow_nan=False) + "\n"
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def metrics_table(metrics: Mapping[str, Any], title: str | None = None) -> Table:
    """A table for the terminal: a row for each number of steps in `nfe`, a column for each metric.

    Every other number of `metrics` (such as `real_frechet`) stands in the caption.
    """
    rows: Mapping[str, Mapping[str, float]] = metrics[_LAST_KEY]
    rest = [f"{_words(key)} {_shown(key, value)}" for key, value in metrics.items() if key != _LAST_KEY]
    table = Table(title=title, caption=", ".join(rest) or None, caption_justify="left")
    table.add_column("steps", justify="right", style="bold")
    columns = list(next(iter(rows.values()), {}))
    for column in columns:
        table.add_column(_words(column), justify="right")
    for steps, row in rows.items():
        table.add_row(steps, *(_shown(column, row[column]) for column in columns))
    return table


def _words(key: str) -> str:
    return key.replace("_", " ").replace("per second", "/ s")


def _shown(key: str, value: object) -> str:
    """Whole numbers in full, accuracies and ratios to 3 places, other numbers to 4 digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if key.endswith(("accuracy", "ratio")):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
