"""Metrics as JSON files and as tables."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from tvmatch.evaluation.feature_request import FeatureRequest
from tvmatch.storage.files import parse_json, replacing
from tvmatch.trained_model.files import find_checkpoint

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
    """Write `metrics` as JSON. An existing file is replaced only once the new one is complete.

    The order is: data set, training steps, parameters and training time; metrics of the real data; `nfe`,
    which has one entry for each number of sampling steps.

    Raises:
        ValueError: if a number is not finite, which JSON cannot represent.
        OSError: if the file cannot be written.
    """
    first = [key for key in _FIRST_KEYS if key in metrics]
    middle = [key for key in metrics if key not in (*_FIRST_KEYS, _LAST_KEY)]
    last = [key for key in (_LAST_KEY,) if key in metrics]
    ordered = {key: metrics[key] for key in [*first, *middle, *last]}
    text = json.dumps(ordered, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def feature_metrics_name(extractor: str, request: FeatureRequest) -> str:
    """The default file name of metrics in features: metrics_EXTRACTOR.json.

    It also contains `labels_from` and `uint8` of the request if these are not the defaults.
    """
    name = f"metrics_{extractor}"
    if request.labels_from is not None:
        name += f"_labels_{request.labels_from}"
    if request.uint8 != "round":
        name += f"_uint8_{request.uint8}"
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.json"


def metrics_files(checkpoint: str | Path, step: int) -> list[Path]:
    """The files metrics*.json in a checkpoint and its run folder that were measured at this training step."""
    folder = find_checkpoint(Path(checkpoint)).resolve()
    folders = (folder, folder.parents[1]) if folder.parent.name == "checkpoints" else (folder,)
    found = {path.name: path for place in reversed(folders) for path in sorted(place.glob("metrics*.json"))}
    return [path for path in found.values() if _training_step(path) == step]


def _training_step(path: Path) -> Any:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content.get("steps") if isinstance(content, dict) else None


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """A table with a row for each number of steps in `nfe` and a column for each metric.

    The caption lists the other values of `metrics`, such as `real_frechet`.
    """
    rows: Mapping[str, Mapping[str, float]] = metrics[_LAST_KEY]
    rest = [f"{_words(key)} {_shown(key, value)}" for key, value in metrics.items() if key != _LAST_KEY]
    table = Table(caption=", ".join(rest) or None, caption_justify="left")
    table.add_column("steps", justify="right", style="bold")
    columns = list(next(iter(rows.values()), {}))
    for column in columns:
        table.add_column(_words(column), justify="right")
    for steps, row in rows.items():
        table.add_row(steps, *(_shown(column, row[column]) for column in columns))
    return table


def features_table(metrics: Mapping[str, Any]) -> Table:
    """A table with a row for each guidance weight and number of steps in `rows`, 80 columns wide.

    The standard deviation of the Inception Score is left out.
    """
    rows: list[dict[str, Any]] = metrics["rows"]
    table = Table()
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
    """Integers in full, accuracies and ratios with 3 decimals, other numbers with 4 digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if key.endswith(("accuracy", "ratio", "precision", "recall")):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
