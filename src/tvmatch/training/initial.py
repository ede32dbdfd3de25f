"""Fine-tuning: a run that starts from the weights of a checkpoint instead of random ones."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.trained_model import FORMAT as MODEL_FORMAT
from tvmatch.trained_model import TrainedModel, find_checkpoint, load, read_json
from tvmatch.training.config import Config
from tvmatch.training.teacher import expect_same_data

LABELS = "conditioning.label.weight"
GUIDANCE = "conditioning.guidance."


def network_section(path: str | Path) -> dict[str, Any]:
    """The network of a checkpoint, as the `network` section of a configuration.

    Raises:
        InputError: if there is no checkpoint of ours at `path`.
    """
    file = find_checkpoint(Path(path)) / "model.json"
    content = read_json(file, MODEL_FORMAT).get("network")
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a model description of this version")
    return {name: value for name, value in content.items() if name != "kind"}


@torch.no_grad()
def start_from(network: nn.Module, config: Config, spec: DataSpec) -> list[str]:
    """Give a new network the evaluation weights of the checkpoint `config.initial`, in place.

    Two parts may be new. A guidance embedding that the checkpoint lacks starts with its last layer at zero,
    so that it adds nothing at first. With other classes than the checkpoint's, the row of the dropped label
    stays and every class starts as that row.

    Args:
        network: of the configuration, with its initial weights.
        config: the run.
        spec: of its data.

    Returns:
        Messages about what is new.

    Raises:
        InputError: if there is no such checkpoint, or its data, its network or its parameterisation differ.
    """
    assert config.initial is not None
    model = load(config.initial)
    expect_same_data("initial", config.initial, model.spec, spec)
    if model.scaled != config.objective.scaled and model.guidance != 1:
        raise InputError(
            f"objective.scaled: {config.initial} was trained with {model.scaled}, at guidance weight "
            f"{model.guidance}"
        )
    _expect_same_network(config, model)
    own, theirs = network.state_dict(), model.network.state_dict()
    messages = [f"the weights start from {config.initial} ({model.step:,} steps)"]
    if any(name.startswith(GUIDANCE) for name in own.keys() - theirs.keys()):
        messages.append("the guidance embedding is new: it adds nothing at first")
        theirs |= {name: own[name] for name in own if name.startswith(GUIDANCE)}
        for name in (f"{GUIDANCE}project.weight", f"{GUIDANCE}project.bias"):
            theirs[name] = torch.zeros_like(theirs[name])
    if LABELS in own and model.spec.class_names != spec.class_names:
        messages.append("other classes than the checkpoint's: each starts as its dropped label")
        dropped = theirs[LABELS][-1] if LABELS in theirs else torch.zeros_like(own[LABELS][0])
        theirs[LABELS] = dropped.expand_as(own[LABELS]).clone()
    elif LABELS in theirs and LABELS not in own:
        messages.append("the classes of the checkpoint are left out")
        del theirs[LABELS]
    network.load_state_dict(theirs, strict=True)
    return messages


def _expect_same_network(config: Config, model: TrainedModel) -> None:
    """The same architecture, but for a guidance embedding that may be new."""
    assert config.initial is not None
    ours, theirs = asdict(config.network), network_section(config.initial)
    if ours.keys() != theirs.keys():
        raise InputError(f"initial: {config.initial} holds a {type(model.network).__name__}")
    for name, value in ours.items():
        grown = name == "guidance_embedding" and value
        if value != theirs[name] and not grown:
            raise InputError(
                f"network.{name}: {config.initial} was trained with {theirs[name]}, the configuration "
                f"says {value}"
            )
