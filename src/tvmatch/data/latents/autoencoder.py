"""Autoencoders of diffusers whose posterior is a diagonal Gaussian: from images to latents and back.

Shapes: `B` images of `H` rows and `W` columns of pixels; latents of `C` channels, `h` rows and `w` columns.
"""

import hashlib
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tvmatch.data.latents.dataset import Posterior
from tvmatch.data.spec import AutoencoderInfo
from tvmatch.errors import InputError, one_line
from tvmatch.storage.files import expect_no_lfs_pointer, parse_json
from tvmatch.storage.hub import download

_CONFIG = "config.json"
_SUBFOLDER = "vae"  # of the autoencoder in a diffusers pipeline
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PROBE = 256  # pixels, a multiple of every common down-sampling factor
_DECODED_TOGETHER = 4 * 256 * 256  # pixels: 3 GB of activations in Stable Diffusion's decoder


class Autoencoder:
    """An autoencoder of diffusers as two functions between images in [0, 1] and unscaled latents.

    Latents are the network's own means, without a scaling or shift factor: the data set normalises. Computes
    in float32, each image independently of the others in its batch. Whether a GPU uses TF32 follows PyTorch's
    settings, as for any convolution.

    Args:
        network: a diffusers model whose `encode(images).latent_dist` has a mean and a standard deviation,
            such as `AutoencoderKL`.
        source: the folder or the name on the Hugging Face Hub that it was loaded from.

    Attributes:
        network: in float32, in evaluation mode, without gradients.
        source: as above.
        channels: C of the latents.
        downsampling: H / h = W / w.

    Raises:
        InputError: the network does not encode RGB images, or not into a Gaussian.
    """

    def __init__(self, network: Any, source: str) -> None:
        self.channels, self.downsampling = _geometry(type(network), dict(network.config), source)
        self.network: Any = network.float().eval().requires_grad_(False)
        self.source = source

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and float32 values of all tensors, in the order of the names.

        It does not depend on the file format or on the precision in which the file was loaded.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            values = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
            encoded = name.encode()
            digest.update(struct.pack("<Q", len(encoded)) + encoded)
            digest.update(struct.pack(f"<{values.ndim + 1}Q", values.ndim, *values.shape))
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images (3, H, W).

        Raises:
            InputError: H or W is not a multiple of the down-sampling factor, or the images are not RGB.
        """
        channels, height, width = image_shape
        if channels != 3:
            raise InputError("image_shape", f"{self.source} encodes RGB images, got {channels} channels")
        if min(height, width) < 1 or height % self.downsampling or width % self.downsampling:
            raise InputError(
                "resolution",
                f"must be a multiple of {self.downsampling} pixels, the down-sampling factor of "
                f"{self.source}, got {height}×{width}",
            )
        return self.channels, height // self.downsampling, width // self.downsampling

    def info(self, image_shape: tuple[int, int, int]) -> AutoencoderInfo:
        """The record to keep with latents of images of this shape."""
        self.latent_shape(image_shape)
        return AutoencoderInfo(self.source, self.fingerprint, image_shape)

    def check(self, expected: AutoencoderInfo) -> None:
        """Check that this is the autoencoder that was recorded.

        Raises:
            InputError: the recorded fingerprint differs, or images of that shape cannot be encoded.
        """
        if expected.fingerprint and expected.fingerprint != self.fingerprint:
            raise InputError(
                "autoencoder",
                f"{self.source} has other weights (SHA-256 {self.fingerprint[:16]}…) than "
                f"{expected.source} ({expected.fingerprint[:16]}…), which encoded the latents",
            )
        self.latent_shape(expected.image_shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """Posterior of images (B, 3, H, W) in [0, 1]: mean and std (B, C, h, w), float32 on the CPU.

        Raises:
            InputError: images of this shape cannot be encoded.
        """
        _, height, width = images.shape[1:]
        self.latent_shape((images.shape[1], height, width))
        posterior = self.network.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        return Posterior(posterior.mean.float().cpu(), posterior.std.float().cpu())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32 on the CPU, of unscaled latents (B, C, h, w).

        Decodes a few latents at a time to bound the memory of activations.

        Raises:
            InputError: the latents have another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise InputError(
                "autoencoder",
                f"{self.source} decodes latents of {self.channels} channels, got the shape "
                f"{tuple(latents.shape)}",
            )
        pixels = latents.shape[2] * latents.shape[3] * self.downsampling**2
        chunks = latents.split(max(_DECODED_TOGETHER // pixels, 1))
        images = [self._decode(chunk.to(self.device, torch.float32)).cpu() for chunk in chunks]
        return torch.cat(images)

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.network.decode(latents).sample
        return ((images.float() + 1) / 2).clamp(0, 1)

    def __call__(self, latents: Tensor) -> Tensor:
        """`decode`."""
        return self.decode(latents)


def load_autoencoder(
    source: str, device: str | torch.device = "cpu", *, expected: AutoencoderInfo | None = None
) -> Autoencoder:
    """Load an autoencoder in the layout of diffusers, without executing any code from its files.

    Args:
        source: a folder with config.json and weights, directly or in a subfolder `vae` as in pipelines; or a
            name on the Hugging Face Hub.
        device: of the network.
        expected: the autoencoder that it must be.

    Raises:
        InputError: nothing is found, it cannot be read, it is not an autoencoder of images with a Gaussian
            posterior, or it is not the expected one.
    """
    source, folder = _find(source)
    config = _config(folder / _CONFIG, source)
    cls = _autoencoder_class(config, source)
    _geometry(cls, config, source)  # before a large file is downloaded and read
    autoencoder = Autoencoder(_load(cls, source, folder).to(device), source)
    if expected is not None:
        autoencoder.check(expected)
    return autoencoder


def _find(source: str) -> tuple[str, Path]:
    """The absolute path or name on the Hub, and the folder with config.json, downloaded if necessary."""
    if not source:
        raise InputError("autoencoder", "give a folder, or a name on the Hugging Face Hub")
    root = Path(source).expanduser()
    if root.is_file():
        raise InputError(
            "autoencoder", f"must be a folder or a name on the Hugging Face Hub, got a file, {source}"
        )
    if root.exists():
        name = str(root.absolute())
    else:
        name, neither = source, "neither a folder nor the name of a model on the Hugging Face Hub"
        patterns = [_CONFIG, f"{_SUBFOLDER}/{_CONFIG}"]
        root = download(source, patterns, subject="autoencoder", neither=neither)
    for folder in (root / _SUBFOLDER, root):
        if (folder / _CONFIG).is_file():
            return name, folder
    raise InputError("autoencoder", f"there is neither {_CONFIG} nor {_SUBFOLDER}/{_CONFIG} in {source}")


def _config(path: Path, source: str) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("autoencoder", f"{path} is not readable as JSON ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise InputError("autoencoder", f"{path} describes no autoencoder")
    if config.get("quantization_config") is not None:
        raise InputError("autoencoder", f"{source} is quantised; use the weights in full precision")
    return config


def _autoencoder_class(config: dict[str, Any], source: str) -> Any:
    """The class named in config.json, which must be an autoencoder of diffusers."""
    try:
        import diffusers
        from diffusers.models import autoencoders
    except ModuleNotFoundError as error:
        raise InputError(
            "autoencoder", f'needs the package {error.name}, pip install "tvmatch[latents]"'
        ) from None
    name = config.get("_class_name")
    cls = getattr(autoencoders, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise InputError(
            "autoencoder", f"{source} is a {name!r}, no autoencoder of diffusers {diffusers.__version__}"
        )
    return cls


def _geometry(cls: Any, config: dict[str, Any], source: str) -> tuple[int, int]:
    """Channels of the latents and down-sampling factor, computed on the meta device."""
    try:
        with torch.device("meta"), torch.no_grad(), _quiet():
            network = cls.from_config(config).eval()
            posterior = network.encode(torch.empty(1, 3, _PROBE, _PROBE)).latent_dist
            mean, std = posterior.mean, posterior.std
            image = network.decode(mean).sample
            channels, side = mean.shape[1:3]
    except Exception as error:  # video, sound, no posterior, other channels, a broken configuration
        raise InputError(
            "autoencoder",
            f"{source} is a {cls.__name__} that does not encode RGB images into a Gaussian like "
            f"AutoencoderKL ({one_line(error)})",
        ) from error
    square = mean.shape == std.shape == (1, channels, side, side) and _PROBE % side == 0
    if not square or image.shape != (1, 3, _PROBE, _PROBE):
        raise InputError(
            "autoencoder",
            f"{source}, a {cls.__name__}, makes latents {tuple(mean.shape)} and images "
            f"{tuple(image.shape)} of {_PROBE}×{_PROBE} RGB images",
        )
    return channels, _PROBE // side


def _load(cls: Any, source: str, folder: Path) -> nn.Module:
    """The network with its weights; diffusers prefers safetensors, and else uses `weights_only=True`."""
    expect_no_lfs_pointer(folder / _WEIGHTS)
    on_hub = not Path(source).is_absolute()
    subfolder = _SUBFOLDER if on_hub and folder.name == _SUBFOLDER else None
    try:
        with _quiet():
            network, report = cls.from_pretrained(
                source if on_hub else folder,
                subfolder=subfolder,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # of diffusers, safetensors, pickle and PyTorch
        raise InputError(
            "autoencoder", f"the weights of {source} cannot be loaded ({one_line(error)})"
        ) from error
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or extra:
        raise InputError(
            "autoencoder",
            f"the weights of {source} do not fit the {cls.__name__} that its configuration describes: "
            f"missing tensors {missing[:3]}, unexpected tensors {extra[:3]}",
        )
    loaded: nn.Module = network
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence log and warnings of diffusers, whose failures are raised as an error of one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.log_levels["critical"])
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)
