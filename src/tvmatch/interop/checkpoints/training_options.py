"""How an imported network was trained: what its file, the options and a recipe say must agree."""

import math
from dataclasses import dataclass, replace
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
class ImportedTraining(TrainingFacts):
    """How a network was trained, from its file, the options and the recipe; None where none of them says.

    Attributes:
        modulation_norm: whether the network normalises its modulation vectors, from option or recipe.
        shape: (C, H, W) of the recipe's latents.
        recipe_classes: number of classes in the recipe.
    """

    modulation_norm: bool | None = None
    shape: tuple[int, ...] | None = None
    recipe_classes: int | None = None


def imported_training(parsed: Any, facts: TrainingFacts) -> ImportedTraining:
    """Merge the facts of the file, which have priority, the options and the recipe.

    `--autoencoder` has priority over the file: it says where the autoencoder is on this machine. The label
    dropout of a recipe is compared with the file's but not adopted.

    Args:
        parsed: the options of `tvmatch import`.
        facts: what the file says.

    Raises:
        InputError: if the recipe or an option contradicts the file, or an option is out of range.
    """
    training = ImportedTraining() if parsed.recipe is None else _of_recipe(recipe(parsed.recipe))
    if different := _differences(training, facts):
        ours = ", ".join(f"{name} {value}" for name, value, _ in different)
        theirs = ", ".join(f"{name} {value}" for name, _, value in different)
        raise InputError("recipe", f"{parsed.recipe} has {ours}, but {parsed.file} was trained with {theirs}")
    training.label_dropout = None
    options = _of_options(parsed, facts)
    for name, value, said in _differences(options, facts):
        if name != "autoencoder":
            raise InputError(name, f"{value} is given, but {parsed.file} was trained with {said}")
    if options.autoencoder == "none" and facts.autoencoder is not None:
        raise InputError(
            "autoencoder",
            f"none is for pixels, {parsed.file} says that its network is for latents of {facts.autoencoder}",
        )
    merged = replace(training, **(options.known() | facts.known()))
    merged.autoencoder = options.autoencoder or merged.autoencoder
    return merged


def _of_options(parsed: Any, facts: TrainingFacts) -> ImportedTraining:
    options = ImportedTraining(
        scaled=parsed.scaled,
        autoencoder=parsed.autoencoder,
        label_dropout=parsed.label_dropout,
        modulation_norm=parsed.modulation_norm,
    )
    for name in ("mean", "std", "guidance"):
        if (text := getattr(parsed, name)) is not None:
            numbers = _numbers(name, text)
            said = getattr(facts, name)
            if name == "guidance":
                options.guidance = _guidance(numbers)
            else:
                setattr(options, name, numbers * len(said) if said and len(numbers) == 1 else numbers)
    if not 0 <= (options.label_dropout or 0) <= 1:
        raise InputError("label_dropout", f"must be in [0, 1], got {parsed.label_dropout}")
    return options


def _differences(values: TrainingFacts, facts: TrainingFacts) -> list[tuple[str, str, str]]:
    """(name, value, the file's value) of all values that the file contradicts."""
    different = []
    for name, value in values.known().items():
        said = getattr(facts, name, None)
        if name in ("mean", "std") and said is not None and facts.std is not None:
            same = agree(value, said, facts.std)
        else:
            same = said is None or alike(value, said)
        if not same:
            different.append((name, _shown(value), _shown(said)))
    return different


def _of_recipe(config: Config) -> ImportedTraining:
    objective, data = config.objective, config.data
    if not isinstance(objective, TVM):
        raise InputError("recipe", f"{config.recipe} trains another objective than the file's")
    training = ImportedTraining(
        scaled=objective.scaled,
        guidance=_exact(objective.guidance_weight),
        label_dropout=_exact(objective.label_dropout),
        s=_exact(objective.times.s),
        gap=_exact(objective.times.gap),
        detach_jvp=objective.detach_jvp,
        evaluation_ema=_exact(config.training.evaluation_ema),
        target_ema=_exact(objective.target_ema),
        modulation_norm=getattr(config.network, "modulation_norm", True),
    )
    if isinstance(data, LatentsData):
        training.mean, training.std, training.autoencoder = (
            _exact(data.mean),
            _exact(data.std),
            data.autoencoder,
        )
        training.shape, training.recipe_classes = data.shape, data.class_count
    return training


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
