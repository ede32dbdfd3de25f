"""DINOv2 (Oquab et al., arXiv 2304.07193), for FD-DINOv2 (Stein et al., arXiv 2306.04675)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors.base import (
    Features,
    check_images,
    full_float32,
    hash_files,
    missing_packages,
    one_line,
)
from tvmatch.storage.hub import download

SOURCE = "facebook/dinov2-large"  # ViT-L/14
FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
SIDE = 224  # pixels
_MEAN = (0.485, 0.456, 0.406)  # of ImageNet
_STD = (0.229, 0.224, 0.225)


class Dinov2Extractor:
    """Class token of DINOv2 after the last norm, (B, 1024) for ViT-L/14.

    Images are resized to 224 × 224, bicubic with antialiasing and without rounding to 8 bits, and normalised
    with mean and standard deviation of ImageNet.
    """

    name = "dinov2"

    def __init__(self, network: nn.Module, fingerprint: str, device: torch.device) -> None:
        self.fingerprint = fingerprint
        self._device = device
        self._network = network.to(device).eval()
        self._mean = torch.tensor(_MEAN, dtype=torch.float32, device=device).view(3, 1, 1)
        self._std = torch.tensor(_STD, dtype=torch.float32, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Features:
        """Features of `images`, uint8 (B, 3, H, W).

        Raises:
            InputError: for images of another type or shape.
        """
        check_images(images)
        with full_float32(self._device):
            pixels = images.to(self._device, torch.float32) / 255
            pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True)
            tokens = self._network((pixels - self._mean) / self._std).last_hidden_state
        return Features(tokens[:, 0].cpu(), None, None)


def load_dinov2(device: torch.device, weights: Path | None = None) -> Dinov2Extractor:
    """Load DINOv2 in the format of transformers, from safetensors only.

    Args:
        device: of the network.
        weights: a folder with config.json and *.safetensors, or a name on the Hugging Face Hub. None:
            facebook/dinov2-large.

    Raises:
        InputError: if transformers is missing, or `weights` does not contain a DINOv2 network.
    """
    try:
        from transformers import Dinov2Model
    except Exception as error:  # transformers imports lazily, and raises errors of several types
        raise missing_packages("dinov2", error) from error
    source = SOURCE if weights is None else str(weights)
    folder = Path(source)
    if not folder.is_dir():
        neither = "neither a folder nor the name of a model on the Hugging Face Hub"
        folder = download(source, FILES, subject="extractor weights", neither=neither)
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise InputError("extractor weights", f"{folder} holds no model.safetensors")
    try:
        # Eager attention, because the precision of fused attention in float32 depends on the GPU.
        loaded: Any = Dinov2Model.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        network, report = loaded
        missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
        if missing:
            raise ValueError(f"{len(missing)} tensors are missing or of another shape, like {missing[0]}")
        _fit_positions(network)
    except Exception as error:  # from transformers, safetensors or json
        raise InputError("extractor weights", f"{folder} has no DINOv2 network: {one_line(error)}") from error
    return Dinov2Extractor(network, hash_files([folder / "config.json", *files]), device)


@torch.no_grad()
def _fit_positions(network: Any) -> None:
    """Interpolate the position embeddings for images of 224 pixels, in place, like DINOv2's original code.

    They were trained on 37 × 37 patches and are used on 16 × 16. The original code, and therefore all
    published features, scale by (16 + 0.1) / 37; transformers scales by 16 / 37, which shifts the last patch
    by a quarter of a patch of the trained grid.
    """
    embeddings = network.embeddings
    trained = embeddings.position_embeddings  # (1, 1 + M², D): class token, then patches row by row
    side = round((trained.shape[1] - 1) ** 0.5)
    wanted = SIDE // network.config.patch_size
    if side == wanted:
        return
    grid = trained[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (wanted + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    fitted = torch.cat([trained[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    embeddings.position_embeddings = nn.Parameter(fitted, requires_grad=False)
