"""Trained models on the Hugging Face Hub: weights as safetensors, a description, a model card.

A repository holds `model.json` and `model.safetensors`, which `tvmatch.load` reads, `README.md` (the model
card) and optionally `samples.png`, metrics, the run's configuration, and the autoencoder in diffusers'
layout. Only files of fixed names are downloaded, and no code of a repository is executed.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch

from tvmatch.errors import InputError
from tvmatch.interop.model_card import model_card
from tvmatch.storage.files import new_folder, parse_json
from tvmatch.storage.hub import check_repository_name, download, upload
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.loading import AUTOENCODER, load_with_decoder

if TYPE_CHECKING:
    from PIL.Image import Image

    from tvmatch.data.latents.autoencoder import Autoencoder

MODEL_FILES = (
    "model.json",
    "model.safetensors",
    f"{AUTOENCODER}/config.json",
    f"{AUTOENCODER}/*.safetensors",
    f"{AUTOENCODER}/*.safetensors.index.json",
)


class Card(TypedDict, total=False):
    """Optional content of a model's folder and model card.

    Attributes:
        metrics: files that `tvmatch evaluate` wrote (metrics.json, metrics_inception.json, …).
        samples: a picture (see `tvmatch.pictures.image_grid`), or the path of a PNG.
        config: the config.yaml of the run.
        license: of the weights, as an identifier of the Hub, such as "cc-by-4.0".
    """

    metrics: Sequence[str | Path]
    samples: "Image | str | Path | None"
    config: str | Path | None
    license: str | None


def save_pretrained(
    model: TrainedModel,
    folder: str | Path,
    *,
    autoencoder: "Autoencoder | None" = None,
    repo_id: str | None = None,
    **card: Unpack[Card],
) -> None:
    """Write a new folder that `from_pretrained` and `tvmatch.load` read, with a model card.

    Args:
        model: to be saved.
        folder: must not exist yet.
        autoencoder: for a model of latents, saved in the same folder (`model.decoder`, if `load_autoencoder`
            loaded it). Without it, the folder records the source of the autoencoder that encoded the latents.
        repo_id: "user/name" on the Hub, for the example on the card.
        **card: see `Card`.

    Raises:
        InputError: if the folder exists, the autoencoder did not encode the latents, or a metrics file is
            invalid.
        OSError: if the folder cannot be written.
        TypeError: if the network is not of a registered kind.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError("folder", f"{folder} exists already")
    if autoencoder is not None:
        if model.spec.autoencoder is None:
            raise InputError(
                "autoencoder", f"the model generates {model.spec.kind} data, which need no autoencoder"
            )
        autoencoder.check(model.spec.autoencoder)
    with new_folder(folder) as unfinished:
        model.save(unfinished)
        write_card(model, unfinished, repo_id=repo_id, **card)
        if autoencoder is not None:
            autoencoder.network.save_pretrained(unfinished / AUTOENCODER, safe_serialization=True)


def write_card(
    model: TrainedModel,
    folder: Path,
    *,
    pipeline: bool = False,
    repo_id: str | None = None,
    **card: Unpack[Card],
) -> None:
    """Write the model card and its files into an existing folder.

    Args:
        model: to describe.
        folder: of the model.
        pipeline: whether the folder holds a pipeline of `tvmatch.diffusers`.
        repo_id: as for `save_pretrained`.
        **card: see `Card`.
    """
    metrics, samples, config = card.get("metrics", ()), card.get("samples"), card.get("config")
    figures = [_read_metrics(Path(path)) for path in metrics]
    for path in map(Path, metrics):
        shutil.copyfile(path, folder / path.name)
    if isinstance(samples, str | Path):
        shutil.copyfile(samples, folder / "samples.png")
    elif samples is not None:
        samples.save(folder / "samples.png", format="PNG")
    if config is not None:
        shutil.copyfile(config, folder / "config.yaml")
    text = model_card(
        model,
        metrics=figures,
        samples=samples is not None,
        config=None if config is None else Path(config).read_text(encoding="utf-8"),
        license=card.get("license"),
        repo_id=repo_id,
        pipeline=pipeline,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _read_metrics(path: Path) -> dict[str, Any]:
    if not (path.name.startswith("metrics") and path.suffix == ".json"):
        raise InputError("metrics", f"must be files metrics….json, got {path}")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("metrics", f"{path} is not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError("metrics", f"{path} holds no figures")
    return content


def push_to_hub(
    model: TrainedModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload a model of tvmatch",
    autoencoder: "Autoencoder | None" = None,
    **card: Unpack[Card],
) -> str:
    """Upload a model to the Hub as `save_pretrained` writes it, in one commit.

    Args:
        model: to upload.
        repo_id: "user/name"; the repository is created if it does not exist.
        private: whether a new repository is private.
        token: of the Hub. Default: that of `hf auth login`.
        commit_message: message of the commit.
        autoencoder: as for `save_pretrained`.
        **card: see `Card`.

    Returns:
        The URL of the repository.

    Raises:
        InputError: for an invalid name, without access, or if the Hub cannot be reached.
    """
    check_repository_name(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(model, folder, autoencoder=autoencoder, repo_id=repo_id, **card)
        return upload(folder, repo_id, private=private, token=token, commit_message=commit_message)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str = "cpu",
    autoencoder: str | None = None,
) -> TrainedModel:
    """Load a trained model from the Hub or from a folder.

    For a model of latents, the autoencoder is loaded, too; it must be the one that encoded the latents.
    (`tvmatch.load` reads a folder without the autoencoder.)

    Args:
        name: "user/name" on the Hub, or a folder that `save_pretrained` or a training run wrote.
        revision: branch, tag or commit on the Hub.
        token: of the Hub. Default: that of `hf auth login`.
        device: of the model.
        autoencoder: folder or name on the Hub. Default: the one in the model's folder, or the source recorded
            when the latents were encoded.

    Raises:
        InputError: if there is no such model or no access, a file is missing, truncated or does not fit, or
            the autoencoder is not the one that encoded the latents.
    """
    folder = Path(name)
    if not folder.exists():
        folder = download(str(name), MODEL_FILES, revision=revision, token=token)
    elif revision is not None:
        raise InputError("revision", f"{name} is a folder, which has no revisions, got {revision!r}")
    return load_with_decoder(folder, device, autoencoder)
