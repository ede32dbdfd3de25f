"""Fine-tuning: initialise a run with the weights of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvmatch.config.schema import Config
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.models.base import BaseNetwork, answers_of
from tvmatch.trained_model import TrainedModel, load
from tvmatch.trained_model.files import FORMAT as MODEL_FORMAT
from tvmatch.trained_model.files import of_newest, read_json
from tvmatch.training.distillation import expect_same_data, known_classes, same_classes


def network_section(path: str | Path) -> dict[str, Any]:
    """The `network` section of a configuration for the network of a checkpoint.

    Raises:
        InputError: if there is no checkpoint of tvmatch at `path`.
    """
    return of_newest(Path(path), _network_section)


def _network_section(folder: Path) -> dict[str, Any]:
    file = folder / "model.json"
    content = read_json(file, MODEL_FORMAT).get("network")
    if not isinstance(content, dict):
        raise InputError(file, "not a model description of this version")
    return content


@torch.no_grad()
def start_from(network: BaseNetwork, config: Config, spec: DataSpec) -> list[str]:
    """Load the evaluation weights of the checkpoint `config.initial` into a new network, in place.

    Two parts may be missing in the checkpoint: parts in `BaseNetwork.additions`, such as a guidance
    embedding, which initially do not change the output; and classes, which start as the dropped label.

    Args:
        network: of the configuration, with its initial weights.
        config: the run.
        spec: of its data.

    Returns:
        Messages about parts that are new.

    Raises:
        InputError: if there is no such checkpoint, or its data, network or parameterisation differ.
    """
    assert config.initial is not None
    model = load(config.initial)
    expect_same_data("initial", config.initial, model.spec, spec)
    if model.scaled != config.objective.scaled and model.guidance != 1:
        raise InputError(
            "objective.scaled",
            f"{config.initial} was trained with {model.scaled}, at guidance weight {model.guidance}",
        )
    _expect_same_network(network, config.initial, model)
    messages = [f"the weights start from {config.initial} ({model.step:,} steps)"]
    if not model.knows_dropped_labels:
        messages.append("it was trained without dropped labels: that label starts as the classes' mean")
    own, theirs = network.state_dict(), model.network.state_dict()
    for part in network.additions:
        new = {name: own[name] for name in own.keys() - theirs.keys() if name.startswith(part.prefix)}
        if new:
            messages.append(f"the {part.name} is new: it adds nothing at first")
            theirs |= new | {name: torch.zeros_like(own[name]) for name in part.zeroed}
    table = network.label_table
    if table in own:
        theirs[table], message = _label_table(theirs.get(table), own[table], model.spec, spec)
        messages += message
    elif table in theirs:
        messages.append("the classes of the checkpoint are left out")
        del theirs[table]
    elif not same_classes(model.spec, spec):
        raise InputError("initial", f"{config.initial} was trained on other classes")
    network.load_state_dict(theirs, strict=True)
    if config.objective.scaled and model.guidance == 1 and config.objective.guidance_weight != 1:
        messages.append(
            "objective.scaled: the first velocity is guidance_weight times the checkpoint's, which was "
            "trained at weight 1; false starts at the checkpoint's own"
        )
    return messages


def _label_table(
    theirs: Tensor | None, like: Tensor, known: DataSpec, ours: DataSpec
) -> tuple[Tensor, list[str]]:
    """Embeddings of our classes and the dropped label, (K + 1, C), and a message if classes differ."""
    numbers = known_classes(known, ours)
    table = torch.zeros_like(like) if theirs is None else theirs[-1].expand_as(like).clone()
    for row, number in enumerate(numbers):
        if theirs is not None and number is not None:
            table[row] = theirs[number]
    if None in numbers:
        new = f"{numbers.count(None)} of {len(numbers)} classes"
        return table, [f"{new} are new: each starts as the checkpoint's dropped label"]
    if numbers == list(range(known.class_count)) and known.class_names != ours.class_names:
        return table, ["the classes are taken to be the checkpoint's, in their order"]
    return table, []


def _expect_same_network(network: BaseNetwork, initial: str, model: TrainedModel) -> None:
    """Check that the architectures are the same, except for parts that may be added."""
    other = model.network
    if type(other) is not type(network):
        raise InputError("initial", f"{initial} holds a {type(other).__name__}")
    # Compared as JSON, which has no tuples.
    ours, theirs = (json.loads(json.dumps(dict(x.architecture()))) for x in (network, answers_of(other)))
    added = {part.field for part in network.additions if ours.get(part.field)}
    for name, value in ours.items():
        if value != theirs.get(name) and name not in added:
            raise InputError(
                f"network.{name}",
                f"{initial} was trained with {theirs[name]}, the configuration says {value}",
            )
