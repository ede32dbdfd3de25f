"""Resume a run: load its newest checkpoint and compare it with the configuration."""

import json
from pathlib import Path
from typing import Any

from tvmatch.data.spec import agree
from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import FORMAT, read_json, step_of
from tvmatch.training.checkpoint import checkpoints, load_checkpoint
from tvmatch.training.state import TrainingState


def expect_newest(run: Path, step: int) -> None:
    """Check that the run folder has no checkpoint of a later step than `step`.

    Raises:
        InputError: if there is one, written by another trainer.
    """
    for newest in checkpoints(run)[-1:]:
        if step_of(newest) > step:
            raise InputError(
                "out", f"another trainer has written {newest}, this one is at step {step}; resume from there"
            )


def load_newest(
    path: Path,
    run: Path,
    state: TrainingState,
    model: TrainedModel,
    initial: str | None,
    facts: dict[str, Any],
) -> list[str]:
    """Load the newest checkpoint of a run into `state`; without a checkpoint the run starts from step 0.

    Args:
        path: the run folder or its newest checkpoint, as given by the user.
        run: the run folder.
        state: the training state, changed in place.
        model: the model for the configuration.
        initial: the option `initial` of the configuration.
        facts: the current `checkpoint.build_facts`.

    Returns:
        Messages about what changed since the checkpoint.

    Raises:
        InputError: if `path` is not the newest checkpoint, or the checkpoint does not fit the configuration.
    """
    saved = checkpoints(run)
    if not saved:
        return [f"{run} has no checkpoint yet: starting from step 0"]
    if path.resolve() not in (run.resolve(), saved[-1].resolve()):
        raise InputError("resume", f"{path} is not the newest checkpoint of {run}, {saved[-1].name}")
    expect_same_model(saved[-1], model, initial)
    return changes_since(load_checkpoint(saved[-1], state), facts)


def expect_same_model(folder: Path, model: TrainedModel, initial: str | None) -> None:
    """Check that network, data set, parameterisation and `initial` are those of a checkpoint.

    Args:
        folder: the checkpoint.
        model: the model for the configuration.
        initial: the option `initial` of the configuration.

    Raises:
        InputError: naming the first difference.
    """
    saved = read_json(folder / "model.json", FORMAT)
    ours = json.loads(json.dumps(model.describe()))
    _ignore_rounding(saved.get("data"), ours["data"])
    for key in ("network", "data", "scaled", "guidance"):
        if saved.get(key) != ours[key]:
            raise InputError(folder, _difference(key, saved.get(key), ours[key]))
    history = saved.get("provenance")
    saved_initial = history.get("initial") if isinstance(history, dict) else None
    if saved_initial != initial:
        raise InputError(
            "initial",
            f"{folder} started from {saved_initial or 'random weights'}, the configuration says "
            f"{initial or 'random weights'}",
        )


def changes_since(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A message if facts have changed that must agree for bit-for-bit equality; see `build_facts`."""
    # The values in checkpoints of earlier versions.
    before = {"compile": False, "recompute": "none", "random_streams": 1} | before
    if before == now:
        return []
    changes = [
        f"{name} {before.get(name)} → {value}" for name, value in now.items() if value != before.get(name)
    ]
    return [
        f"changed since the checkpoint: {', '.join(changes)}; the run continues, but will not equal an "
        "uninterrupted run bit for bit"
    ]


def _difference(key: str, saved: Any, ours: Any) -> str:
    """A message with the first difference between a checkpoint and the configuration."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        name = next(name for name in (ours | saved) if saved.get(name) != ours.get(name))
        key, saved, ours = f"{key}.{name}", saved.get(name), ours.get(name)
    return f"its {key} is {saved}, the configuration's {ours}"


def _ignore_rounding(saved: Any, ours: dict[str, Any]) -> None:
    """Replace our mean and std by the checkpoint's if they differ only by rounding, in place."""
    scale = ours["std"]
    for name in ("mean", "std"):
        numbers = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(numbers, list) and all(isinstance(x, int | float) and abs(x) < 1e15 for x in numbers):
            ours[name] = numbers if agree(numbers, ours[name], scale) else ours[name]
