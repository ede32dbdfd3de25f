"""Loading a trained model with all that makes data of its samples."""

from pathlib import Path

import torch

from tvmatch.errors import InputError
from tvmatch.model_files import find_checkpoint
from tvmatch.trained_model import TrainedModel, load

AUTOENCODER = "vae"  # the folder beside an exported model, called as in a pipeline


def load_with_decoder(
    checkpoint: str | Path, device: torch.device | str = "cpu", autoencoder: str | None = None
) -> TrainedModel:
    """A trained model ready to sample; one of latents comes with its autoencoder, on the same device.

    Args:
        checkpoint: a run folder (its newest checkpoint), a checkpoint, or a folder exported for the Hub.
        device: where to put both.
        autoencoder: where to load it from, a folder or a name on the Hub; by default from beside the model,
            or from where it was loaded when the latents were made.

    Raises:
        InputError: if something is missing, or the autoencoder is another than the latents'.
    """
    model = load(checkpoint, device)
    expected = model.spec.autoencoder
    if expected is None and autoencoder is not None:
        raise InputError("autoencoder", f"{checkpoint} generates {model.spec.kind} data, which need none")
    if expected is not None:
        from tvmatch.data.autoencoder import load_autoencoder  # here, because it imports diffusers

        beside = find_checkpoint(Path(checkpoint)) / AUTOENCODER
        source = autoencoder or (str(beside) if beside.is_dir() else expected.source)
        model.decoder = load_autoencoder(source, model.device, expected=expected)
    return model
