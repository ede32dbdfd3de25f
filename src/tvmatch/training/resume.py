"""Whether a run may go on from a checkpoint, and what has changed since it was written."""

import json
from pathlib import Path
from typing import Any

from tvmatch.data.spec import agree
from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import FORMAT, read_json
from tvmatch.training.checkpoint import checkpoints, load_checkpoint, step_of
from tvmatch.training.state import TrainingState


def expect_newest(run: Path, step: int) -> None:
    """Refuse to go on from `step` in a run folder where somebody has gone further.

    Raises:
        InputError: if there is a checkpoint of a later step.
    """
    for newest in checkpoints(run)[-1:]:
        if step_of(newest) > step:
            raise InputError(
                "out",
                f"another trainer has gone on to {newest}, this one is at step {step}; resume from there",
            )


def load_newest(
    path: Path,
    run: Path,
    state: TrainingState,
    model: TrainedModel,
    initial: str | None,
    facts: dict[str, Any],
) -> list[str]:
    """Load the newest checkpoint of a run; a run without one (killed before its first) starts over.

    Args:
        path: what the user asks to resume: the run folder, or its newest checkpoint.
        run: the run folder.
        state: receives the checkpoint.
        model: of the run as configured.
        initial: what the configuration says of its first weights.
        facts: see `checkpoint.build_facts`.

    Returns:
        Messages.

    Raises:
        InputError: for another checkpoint, or one that does not fit.
    """
    saved = checkpoints(run)
    if not saved:
        return [f"{run} has no checkpoint yet: starting from step 0"]
    if path.resolve() not in (run.resolve(), saved[-1].resolve()):
        raise InputError("resume", f"{path} is not the newest checkpoint of {run}, {saved[-1].name}")
    expect_same_model(saved[-1], model, initial)
    return changes_since(load_checkpoint(saved[-1], state), facts)


def expect_same_model(folder: Path, model: TrainedModel, initial: str | None) -> None:
    """Refuse to go on with another network, data set or parameterisation than a checkpoint's.

    Args:
        folder: the checkpoint.
        model: of the run as configured.
        initial: what the configuration says of its first weights.

    Raises:
        InputError: naming the first difference.
    """
    saved = read_json(folder / "model.json", FORMAT)
    ours = json.loads(json.dumps(model.describe()))
    _take_rounding(saved.get("data"), ours["data"])
    for key in ("network", "data", "scaled", "guidance"):
        if saved.get(key) != ours[key]:
            raise InputError(folder, _difference(key, saved.get(key), ours[key]))
    history = saved.get("provenance")
    start = history.get("initial") if isinstance(history, dict) else None
    if start != initial:
        raise InputError(
            "initial",
            f"{folder} started from {start or 'random weights'}, the configuration says "
            f"{initial or 'random weights'}",
        )


def changes_since(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A message if facts that must agree for an exact continuation have changed."""
    # In checkpoints that do not say.
    before = {"compile": False, "recompute": "none", "random_streams": 1} | before
    if before == now:
        return []
    changes = [
        f"{name} {before.get(name)} → {value}" for name, value in now.items() if value != before.get(name)
    ]
    return [
        f"changed since the checkpoint: {', '.join(changes)}; the run goes on, but will not repeat "
        "an uninterrupted one bit for bit"
    ]


def _difference(key: str, saved: Any, ours: Any) -> str:
    """What differs between a checkpoint's description and the configuration's."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        name = next(name for name in (ours | saved) if saved.get(name) != ours.get(name))
        key, saved, ours = f"{key}.{name}", saved.get(name), ours.get(name)
    return f"its {key} is {saved}, the configuration's {ours}"


def _take_rounding(saved: Any, ours: dict[str, Any]) -> None:
    """Take the checkpoint's digits of a normalisation that is the same but for its rounding, in place."""
    scale = ours["std"]
    for name in ("mean", "std"):
        numbers = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(numbers, list) and all(isinstance(x, int | float) and abs(x) < 1e15 for x in numbers):
            ours[name] = numbers if agree(numbers, ours[name], scale) else ours[name]
