"""Load trained models, with or without the autoencoder of their latents. No code is executed."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError, NotRegisteredError
from tvmatch.models.allocation import allocated, unallocated
from tvmatch.models.base import BaseNetwork
from tvmatch.models.registry import build_network, config_from
from tvmatch.trained_model.files import (
    FORMAT,
    expect_tensors,
    find_checkpoint,
    guidance_from,
    of_newest,
    read_json,
    read_tensors,
)
from tvmatch.trained_model.model import TrainedModel

AUTOENCODER = "vae"  # its folder in an exported model, named as in a pipeline of diffusers


def load_with_decoder(
    checkpoint: str | Path, device: torch.device | str = "cpu", autoencoder: str | None = None
) -> TrainedModel:
    """Load a trained model; for a model of latents, load its autoencoder too, on the same device.

    Args:
        checkpoint: a run folder (its newest checkpoint), a checkpoint, or a folder exported for the Hub.
        device: of both.
        autoencoder: folder or name on the Hub. Default: the one in the model's folder, or the source recorded
            when the latents were encoded.

    Raises:
        InputError: if a file is missing or damaged, or the autoencoder did not encode the latents.
    """
    model = load(checkpoint, device)
    expected = model.spec.autoencoder
    if expected is None and autoencoder is not None:
        raise InputError(
            "autoencoder", f"{checkpoint} generates {model.spec.kind} data, which need no autoencoder"
        )
    if expected is not None:
        # Here, because it imports diffusers
        from tvmatch.data.latents.autoencoder import load_autoencoder

        beside = find_checkpoint(Path(checkpoint)) / AUTOENCODER
        source = autoencoder or (str(beside) if beside.is_dir() else expected.source)
        model.decoder = load_autoencoder(source, model.device, expected=expected)
    return model


def load(path: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Load a trained model with its evaluation weights.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint folder.
        device: of the network.

    Raises:
        InputError: if there is no checkpoint at the path, it is damaged, or its network is not registered.
    """
    return of_newest(Path(path), lambda folder: _load(folder, device))


def _load(folder: Path, device: torch.device | str) -> TrainedModel:
    file, source = folder / "model.json", folder / "model.safetensors"
    description = read_json(file, FORMAT)
    tensors = read_tensors(source)
    try:
        config, spec = config_from(description["network"]), DataSpec.from_description(description["data"])
        build = partial(build_network, config, spec.shape, spec.class_count, seed=0)
        network = unallocated(build, len(tensors))
        model = described_model(description, network, spec)
    except NotRegisteredError as error:  # the module that registers it must be imported first
        raise error.within(file) from None
    # RuntimeError: sizes that PyTorch cannot multiply.
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(file, f"not a model description of this version ({reason})") from None
    expect_tensors(network, tensors, source)  # before memory is allocated: the description may be of any size
    try:
        network = allocated(network, build)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(file, f"no memory for this network ({reason})") from None
    network.load_state_dict(tensors, strict=True)
    model.network = network.requires_grad_(False).eval()
    return model.to(device)


def described_model(description: Mapping[str, Any], network: BaseNetwork, spec: DataSpec) -> TrainedModel:
    """The model of a network and a description as `TrainedModel.describe` writes it.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: if a value is missing or out of range.
    """
    network.knows_dropped_labels = bool(description.get("label_dropout", True))
    return TrainedModel(
        network=network,
        spec=spec,
        scaled=bool(description["scaled"]),
        guidance=guidance_from(description["guidance"]),
        step=int(description["step"]),
        provenance=dict(description["provenance"]),
    )
