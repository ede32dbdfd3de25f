"""How an imported network was trained, as its file, options and a recipe say, which must not disagree."""

import math
from dataclasses import dataclass
from typing import Any

from tvmatch.condition import Guidance
from tvmatch.config.recipes import recipe
from tvmatch.config.schema import Config
from tvmatch.data.config import LatentsData
from tvmatch.data.spec import agree
from tvmatch.errors import InputError
from tvmatch.interop.checkpoints.training_facts import TrainingFacts, alike
from tvmatch.objectives import TVM


@dataclass
class ImportedTraining:
    """How a network was trained, as far as file, options and recipe tell; None where they do not.

    Attributes:
        label_dropout: probability of dropping a label, as file or option say.
        shape: that the recipe expects.
        class_count: likewise.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    guidance: Guidance | None = None
    scaled: bool | None = None
    autoencoder: str | None = None
    label_dropout: float | None = None
    modulation_norm: bool = True
    shape: tuple[int, ...] | None = None
    class_count: int | None = None


def imported_training(parsed: Any, facts: TrainingFacts) -> ImportedTraining:
    """The options, on top of what the file says, on top of the recipe's values.

    Args:
        parsed: the options of `tvmatch import`.
        facts: what the file says.

    Raises:
        InputError: if the file says something else than the recipe or an option, or an option is out of
            range. The autoencoder's place may be any: files name it as it was called where they come from.
    """
    training = ImportedTraining()
    if parsed.recipe is not None:
        config = recipe(parsed.recipe)
        told = _facts_of(config)
        if different := _differences(told, facts):
            ours = ", ".join(f"{name} {value}" for name, value, _ in different)
            said = ", ".join(f"{name} {value}" for name, _, value in different)
            raise InputError(
                "recipe", f"{parsed.recipe} has {ours}, but {parsed.file} was trained with {said}"
            )
        for name in ("mean", "std", "guidance", "scaled", "autoencoder"):
            setattr(training, name, told.get(name))
        training.modulation_norm = getattr(config.network, "modulation_norm", True)
        if isinstance(config.data, LatentsData):
            training.shape, training.class_count = config.data.shape, config.data.class_count
    for name in ("mean", "std", "guidance", "scaled", "autoencoder", "label_dropout"):
        if getattr(facts, name) is not None:
            setattr(training, name, getattr(facts, name))
    options = _options(parsed, facts)
    for name, value, said in _differences(options, facts):
        if name != "autoencoder":
            raise InputError(name, f"{value} is given, but {parsed.file} was trained with {said}")
    if parsed.autoencoder == "none" and facts.autoencoder is not None:
        raise InputError(
            "autoencoder",
            f"none is for pixels, {parsed.file} says that its network is for latents of {facts.autoencoder}",
        )
    for name, value in options.items():
        if getattr(facts, name, None) is None or name == "autoencoder":  # else the file's, to its last digit
            setattr(training, name, value)
    return training


def _options(parsed: Any, facts: TrainingFacts) -> dict[str, Any]:
    """The options that were given, as values of the facts that they are about."""
    options: dict[str, Any] = {}
    for name in ("mean", "std", "guidance"):
        if (text := getattr(parsed, name)) is not None:
            options[name] = _numbers(name, text)
    for name in ("mean", "std"):
        said = getattr(facts, name)
        if name in options and said is not None and len(options[name]) == 1:
            options[name] = options[name] * len(said)
    if "guidance" in options:
        options["guidance"] = _guidance(options["guidance"])
    for name in ("scaled", "modulation_norm", "autoencoder", "label_dropout"):
        if (value := getattr(parsed, name)) is not None:
            options[name] = value
    if not 0 <= options.get("label_dropout", 0) <= 1:
        raise InputError("label_dropout", f"must be in [0, 1], got {parsed.label_dropout}")
    return options


def _differences(values: dict[str, Any], facts: TrainingFacts) -> list[tuple[str, str, str]]:
    """(name, value, what the file says) of all values that the file says otherwise."""
    different = []
    for name, value in values.items():
        said = getattr(facts, name, None)
        if value is None or said is None:
            continue
        if name in ("mean", "std") and facts.std is not None:
            same = agree(value, said, facts.std)
        else:
            same = alike(value, said)
        if not same:
            different.append((name, _shown(value), _shown(said)))
    return different


def _facts_of(config: Config) -> dict[str, Any]:
    """What a recipe says of the same facts as files do."""
    objective = config.objective
    if not isinstance(objective, TVM):
        raise InputError("recipe", f"{config.recipe} trains another objective than the file's")
    times = objective.times
    told: dict[str, Any] = {
        "scaled": objective.scaled,
        "guidance": _exact(objective.guidance_weight),
        "label_dropout": _exact(objective.label_dropout),
        "s": _exact(times.s),
        "gap": _exact(times.gap),
        "detach_jvp": objective.detach_jvp,
        "evaluation_ema": _exact(config.training.evaluation_ema),
        "target_ema": _exact(objective.target_ema),
    }
    if isinstance(config.data, LatentsData):
        told |= {"mean": _exact(config.data.mean), "std": _exact(config.data.std)}
        told["autoencoder"] = config.data.autoencoder
    return told


def _exact(value: Any) -> Any:
    """Numbers of a configuration, lists of them as tuples."""
    return tuple(map(float, value)) if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(f'{number:.9g}' for number in value)}]"
    return f"{value:.9g}" if isinstance(value, float) else str(value).lower()


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise InputError(option, f"must be numbers like 0.5,1,2, got {text!r}")
    return numbers


def _guidance(weights: tuple[float, ...]) -> Guidance:
    if min(weights) < 1 or len(weights) > 2 or list(weights) != sorted(set(weights)):
        raise InputError("guidance", f"must be a weight of at least 1, or low,high, got {list(weights)}")
    return weights[0] if len(weights) == 1 else (weights[0], weights[1])
