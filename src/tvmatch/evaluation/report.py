"""Metrics as a file and as a table: of digits, points, images, and of images in features."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from tvmatch.storage.files import replacing

_FIRST_KEYS = ("dataset", "steps", "parameters", "train_seconds")
_LAST_KEY = "nfe"
_LABELS = {
    "fid": "FID",
    "sfid": "sFID",
    "fd_dinov2": "FD-DINOv2",
    "fd": "FD",
    "spatial_fd": "spatial FD",
    "inception_score": "IS",
}


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
    text = json.dumps(ordered, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
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


def features_table(metrics: Mapping[str, Any], title: str | None = None) -> Table:
    """A table of feature metrics: a row for each guidance weight and number of steps in `rows`.

    The standard deviation of the Inception Score is left out, to fit 80 columns.
    """
    rows: list[dict[str, Any]] = metrics["rows"]
    table = Table(title=title)
    columns = [column for column in rows[0] if column not in ("provenance", "inception_score_std")]
    for column in columns:
        label = _LABELS.get(column, _words(column))
        table.add_column(label, justify="right", style="bold" if column == "steps" else None)
    for row in rows:
        table.add_row(*(_shown(column, row[column]) for column in columns))
    return table


def _words(key: str) -> str:
    return key.replace("_", " ").replace("per second", "/ s")


def _shown(key: str, value: object) -> str:
    """Whole numbers in full, accuracies and ratios to 3 places, other numbers to 4 digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if key.endswith(("accuracy", "ratio", "precision", "recall")):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
