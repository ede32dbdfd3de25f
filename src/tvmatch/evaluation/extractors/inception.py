"""InceptionV3 of FID: torch-fidelity's port of the TensorFlow network of 2015.

torch-fidelity would unpickle any weight file. Here `torch.load(weights_only=True)` reads it, and
torch-fidelity receives only the tensors.
"""

import hashlib
import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors.base import (
    Features,
    check_images,
    full_float32,
    missing_packages,
    one_line,
)

SPATIAL_CHANNELS = 7  # of 192; 17 · 17 · 7 = 2,023 features


class InceptionExtractor:
    """Features of the InceptionV3 that FID is defined on (Heusel et al., arXiv 1706.08500).

    The network resizes images to 299 × 299 like TensorFlow 1: bilinear, without antialiasing or aligned
    corners.

    - pooled, (B, 2048): after the last average pooling.
    - spatial, (B, 2023), for sFID (Nash et al., arXiv 2103.03841): the first 7 channels of the 17 × 17
      output, after its ReLU, of the 1 × 1 branch of the block that TensorFlow calls mixed_6, in TensorFlow's
      order (row, column, channel) like the statistics of ADM's evaluator.
    - logits, (B, 1008): without the bias of the last layer, as in the original Inception Score.
    """

    name = "inception"

    def __init__(self, network: nn.Module, fingerprint: str, device: torch.device) -> None:
        self.fingerprint = fingerprint
        self._device = device
        self._network = network.to(device).eval()

    def __call__(self, images: Tensor) -> Features:
        """Features of `images`, uint8 (B, 3, H, W).

        Raises:
            InputError: for images of another type or shape.
        """
        check_images(images)
        seen: list[Tensor] = []
        branch = self._network.get_submodule("Mixed_6d.branch1x1")
        hook = branch.register_forward_hook(lambda module, arguments, output: seen.append(output))
        try:
            with full_float32(self._device):
                pooled, logits = self._network(images.to(self._device))
        finally:
            hook.remove()
        spatial = seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pooled.cpu(), spatial.cpu(), logits.cpu())


def load_inception(device: torch.device, weights: Path | None = None) -> InceptionExtractor:
    """Load torch-fidelity's InceptionV3.

    Args:
        device: of the network.
        weights: a state dict saved by PyTorch. None: torch-fidelity's file in `torch.hub.get_dir()`,
            downloaded (95 MB) if it is missing.

    Raises:
        InputError: if torch-fidelity or torchvision is missing, or the weights are missing, unreadable, of
            another network, or a pickle with anything but tensors.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library
    except Exception as error:  # torchvision of another PyTorch version raises errors of several types
        raise missing_packages("inception", error) from error
    path = _fetched(library.URL_INCEPTION_V3) if weights is None else weights
    checked, fingerprint = _checked_weights(path)
    try:
        network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=checked
        )
    except RuntimeError as error:
        raise InputError(
            "extractor weights", f"{path} is not of torch-fidelity's Inception: {one_line(error)}"
        ) from error
    return InceptionExtractor(network, fingerprint, device)


def _fetched(url: str) -> Path:
    """The file of `url` in PyTorch's download folder, downloaded if it is missing."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # renames the file when it is complete
        except Exception as error:  # no network, a proxy error, a full disk
            raise InputError(
                "extractor weights",
                f"{path.name} is not in {path.parent} and could not be downloaded "
                f"from {url} ({one_line(error)}); put it there or name the file",
            ) from error
    return path


def _checked_weights(path: Path) -> tuple[io.BytesIO, str]:
    """The tensors of a weight file, saved again, and the SHA-256 of the file. Nothing is executed."""
    try:
        content = path.read_bytes()
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError("extractor weights", f"{path} cannot be read: {one_line(error)}") from error
    except Exception as error:  # pickle, zip and tensor errors of many types
        raise InputError(
            "extractor weights", f"{path} holds more than weights or is damaged, refused: {one_line(error)}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError("extractor weights", f"{path} is not a dictionary of tensors")
    checked = io.BytesIO()
    torch.save(dict(state), checked)
    checked.seek(0)
    return checked, hashlib.sha256(content).hexdigest()
