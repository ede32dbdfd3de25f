"""Checks of a pipeline's folder before anything is loaded from it, and of its description."""

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models import autoencoders

from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.interop.diffusers.transformer import LIBRARY, TVMTransformer
from tvmatch.storage.files import read_json_file
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.loading import described_model

FORMAT = "tvmatch-pipeline-1"
FILES = (
    "model_index.json",
    *(
        f"{component}/{name}"
        for component in ("transformer", "vae")
        for name in ("config.json", "*.safetensors", "*.safetensors.index.json")
    ),
)


def described(description: dict[str, Any] | None, transformer: TVMTransformer) -> TrainedModel:
    """The trained model for a pipeline's description and transformer.

    Raises:
        InputError: if the description is missing, or does not fit the transformer.
    """
    if description is None:
        raise InputError("description", "missing; make a pipeline with TVMPipeline.from_trained_model")
    network = transformer.dit
    try:
        if description["format"] != FORMAT:
            raise InputError(f"its format is not {FORMAT}")
        model = described_model(description, network, DataSpec.from_description(description["data"]))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError("model_index.json", f"not the description of a model ({error})") from None
    if (network.shape, network.class_count) != (model.spec.shape, model.spec.class_count):
        raise InputError(
            "transformer",
            f"of shape {network.shape} and {network.class_count} classes, the data are of shape "
            f"{model.spec.shape} and {model.spec.class_count} classes",
        )
    return model


def check_autoencoder(vae: Any, spec: DataSpec) -> None:
    """Check that an autoencoder is the one that encoded the latents.

    Weights in another precision than float32 are rounded, and are not compared.

    Raises:
        InputError: if it is not, or the model needs no autoencoder.
    """
    if spec.autoencoder is None:
        raise InputError("vae", f"the model generates {spec.kind} data, without an autoencoder")
    if vae.dtype == torch.float32 and vae.device.type != "meta":
        from tvmatch.data.latents.autoencoder import Autoencoder

        try:
            Autoencoder(vae, "vae").check(spec.autoencoder)
        except InputError as error:
            for dtype in (torch.bfloat16, torch.float16):
                if all(torch.equal(weights, weights.to(dtype).float()) for weights in vae.parameters()):
                    hint = f"these were saved in half precision, which dtype={dtype} loads unchecked"
                    raise error.with_hint(hint) from None
            raise


def check_index(folder: Path) -> None:
    """Check that a folder holds a `TVMPipeline`, names no other classes, and contains no code.

    Raises:
        InputError: otherwise.
    """
    path = folder / "model_index.json"
    index = read_json_file(path)
    if not isinstance(index, dict) or index.get("_class_name") != "TVMPipeline":
        raise InputError(path, "not of a TVMPipeline")
    entries = {name: value for name, value in index.items() if not name.startswith("_")}
    if unknown := sorted(entries.keys() - {"transformer", "vae", "description"}):
        raise InputError(path, f"unknown entries {unknown[:3]}")
    if entries.get("transformer") != [LIBRARY, "TVMTransformer"]:
        raise InputError(path, f"transformer is {entries.get('transformer')}, not a TVMTransformer")
    vae = entries.get("vae", [None, None])
    if vae != [None, None] and not _is_autoencoder(vae):
        raise InputError(path, f"vae is {vae}, not an autoencoder of diffusers")
    if code := sorted(folder.glob("*/*.py")):
        raise InputError(code[0], "a pipeline of tvmatch holds no code")


def _is_autoencoder(entry: Any) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers"):
        return False
    cls = getattr(autoencoders, entry[1], None) if isinstance(entry[1], str) else None
    return isinstance(cls, type) and issubclass(cls, ModelMixin)
