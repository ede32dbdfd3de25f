"""Between images and latents: the autoencoders of diffusers whose posterior is a diagonal Gaussian.

Shapes: `B` images, `H`, `W` rows and columns of pixels, `C` channels of a latent and `h`, `w` its sides.
"""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tvmatch.data.latents.autoencoder_files import AutoencoderFiles, find_autoencoder
from tvmatch.data.latents.dataset import Moments
from tvmatch.data.spec import AutoencoderInfo
from tvmatch.errors import InputError, one_line

_PROBE = 256  # pixels, a multiple of every down-sampling in use
_DECODED_TOGETHER = 4 * 256 * 256  # pixels: 3 GB of activations in Stable Diffusion's decoder


class _Geometry(NamedTuple):
    channels: int
    downsampling: int


class Autoencoder:
    """An autoencoder of diffusers as two functions between images in [0, 1] and raw latents.

    Raw means as the network gives them, without a scaling or shift factor: normalisation is the data set's.
    Computes in float32, an image independently of the others in its batch. Whether a GPU may round factors of
    products to TF32 is left to PyTorch's settings, by which convolutions do.

    Args:
        network: a diffusers model whose `encode(images).latent_dist` has a mean and a standard deviation,
            such as `AutoencoderKL`.
        source: where it comes from, a folder or a name on the Hugging Face Hub.

    Attributes:
        network: in float32, for evaluation only.
        source: as given.
        channels: C of a latent.
        downsampling: H / h = W / w.

    Raises:
        InputError: if it encodes something else than RGB images, or not into a Gaussian.
    """

    def __init__(self, network: Any, source: str) -> None:
        self.channels, self.downsampling = _geometry(type(network), dict(network.config), source)
        self.network: Any = network.float().eval().requires_grad_(False)
        self.source = source

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and float32 values of all tensors, in the order of the names.

        So it is the same for safetensors and other files, and for any precision that a file was loaded in.
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
        """Where it computes."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images (3, H, W).

        Raises:
            InputError: if H or W is no multiple of the down-sampling, or the images are not RGB.
        """
        channels, height, width = image_shape
        if channels != 3:
            raise InputError("image_shape", f"{self.source} encodes RGB images, got {channels} channels")
        if min(height, width) < 1 or height % self.downsampling or width % self.downsampling:
            raise InputError(
                "resolution",
                f"must be a multiple of {self.downsampling} pixels, the down-sampling of "
                f"{self.source}, got {height}×{width}",
            )
        return self.channels, height // self.downsampling, width // self.downsampling

    def info(self, image_shape: tuple[int, int, int]) -> AutoencoderInfo:
        """What to record of it beside latents of images of this shape."""
        self.latent_shape(image_shape)
        return AutoencoderInfo(self.source, self.fingerprint, image_shape)

    def check(self, expected: AutoencoderInfo) -> None:
        """Refuse to stand in for another autoencoder.

        Raises:
            InputError: if the fingerprints differ (where one is recorded), or images cannot have that shape.
        """
        if expected.fingerprint and expected.fingerprint != self.fingerprint:
            raise InputError(
                "autoencoder",
                f"{self.source} has other weights (SHA-256 {self.fingerprint[:16]}…) than "
                f"{expected.source} ({expected.fingerprint[:16]}…), with which the latents were made",
            )
        self.latent_shape(expected.image_shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Moments:
        """Posteriors of images (B, 3, H, W) in [0, 1]: raw mean and std (B, C, h, w), float32 on the CPU.

        Raises:
            InputError: for a shape that cannot be encoded.
        """
        _, height, width = images.shape[1:]
        self.latent_shape((images.shape[1], height, width))
        posterior = self.network.encode(images.to(self.device, torch.float32) * 2 - 1).latent_dist
        return Moments(posterior.mean.float().cpu(), posterior.std.float().cpu())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], float32 on the CPU, of raw latents (B, C, h, w).

        A few at a time, so that memory does not grow with B beyond the result's.

        Raises:
            InputError: for latents of another number of channels.
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
    """Load an autoencoder in the layout of diffusers; nothing in its files is executed.

    Args:
        source: a folder with config.json and weights, or with these in a subfolder `vae` as in pipelines;
            else a name on the Hugging Face Hub.
        device: where it shall compute.
        expected: what it must be.

    Raises:
        InputError: it is not there, cannot be read, is no autoencoder of images with a Gaussian posterior, or
            is not the one expected.
    """
    files = find_autoencoder(source)
    config = files.config()
    cls = _autoencoder_class(config, source)
    _geometry(cls, config, source)  # before a large file is fetched and read
    autoencoder = Autoencoder(_load(cls, files).to(device), files.source)
    if expected is not None:
        autoencoder.check(expected)
    return autoencoder


def _autoencoder_class(config: dict[str, Any], source: str) -> Any:
    """The class that config.json names, which must be one of diffusers' autoencoders."""
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


def _geometry(cls: Any, config: dict[str, Any], source: str) -> _Geometry:
    """Channels and down-sampling, from an image without numbers through a network without weights."""
    try:
        with torch.device("meta"), torch.no_grad(), _quiet():
            network = cls.from_config(config).eval()
            posterior = network.encode(torch.empty(1, 3, _PROBE, _PROBE)).latent_dist
            mean, std = posterior.mean, posterior.std
            image = network.decode(mean).sample
            downsampling = _PROBE // mean.shape[2]
            fits = mean.shape == std.shape == (
                1,
                mean.shape[1],
                _PROBE // downsampling,
                _PROBE // downsampling,
            ) and image.shape == (1, 3, _PROBE, _PROBE)
    except (
        Exception
    ) as error:  # video, sound, no posterior, other channels, or a broken configuration: any kind
        raise InputError(
            "autoencoder",
            f"{source} is a {cls.__name__} that does not encode RGB images into a Gaussian like "
            f"AutoencoderKL ({one_line(error)})",
        ) from error
    if not fits:
        raise InputError(
            "autoencoder",
            f"{source}, a {cls.__name__}, makes latents {tuple(mean.shape)} and images "
            f"{tuple(image.shape)} of {_PROBE}×{_PROBE} RGB images",
        )
    return _Geometry(mean.shape[1], downsampling)


def _load(cls: Any, files: AutoencoderFiles) -> nn.Module:
    """The network with its weights, every one of them and nothing else."""
    weights = files.weights()
    try:
        with _quiet():
            # Other files than safetensors are read by diffusers through torch.load(weights_only=True).
            network, report = cls.from_pretrained(
                files.folder,
                use_safetensors=".safetensors" in weights.name,
                low_cpu_mem_usage=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # of diffusers, safetensors, pickle and PyTorch
        raise InputError("autoencoder", f"{weights} cannot be loaded ({one_line(error)})") from error
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or extra:
        raise InputError(
            "autoencoder",
            f"{weights} is not of the {cls.__name__} that its configuration describes: missing "
            f"tensors {missing[:3]}, unexpected tensors {extra[:3]}",
        )
    loaded: nn.Module = network
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the many lines in which diffusers reports what is an error of one line here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.log_levels["critical"])
    try:
        yield
    finally:
        logging.set_verbosity(before)
