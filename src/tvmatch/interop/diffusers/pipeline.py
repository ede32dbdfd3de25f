"""A trained model as a pipeline of diffusers; imported as `tvmatch.diffusers`.

Shapes: B images, (C, h, w) of what the network generates (latents or pixels), H × W pixels of an image.
"""

import importlib
import itertools
import json
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils import is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor

from tvmatch.errors import InputError, arguments_named
from tvmatch.flow_map import FlowMap
from tvmatch.interop.checkpoints.authors import expect_dit
from tvmatch.interop.diffusers.checks import FILES, FORMAT, check_autoencoder, check_index, described
from tvmatch.interop.diffusers.transformer import LIBRARY, TVMTransformer
from tvmatch.sampling import jump, sample_noise, time_grid
from tvmatch.storage.hub import download
from tvmatch.trained_model import TrainedModel

_NAMES = {  # of arguments here, by those of `TrainedModel.sample`
    "labels": "class_labels",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "count": "batch_size",
}
_DAMAGED = (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, SafetensorError)
_DECODED_TOGETHER = 4 * 256 * 256  # pixels: 3 GB of activations in Stable Diffusion's decoder


class TVMPipeline(DiffusionPipeline):
    """One- and few-step generation of images with a trained model.

        pipe = TVMPipeline.from_pretrained("user/name")
        images = pipe(class_labels=[207, 360], num_inference_steps=1).images

    It is saved in diffusers' layout, as safetensors, with the autoencoder. The class is not part of
    diffusers, so `DiffusionPipeline.from_pretrained` cannot load it.

    Args:
        transformer: the network.
        vae: for a model of latents, an autoencoder of diffusers. Without it the pipeline returns latents.
        description: data, parameterisation, guidance and provenance of the model, as `from_trained_model`
            writes them.

    Raises:
        InputError: if the description does not fit the network, or the autoencoder is not the one that
            encoded the latents. This is checked in float32 only, since other precisions round the weights.
    """

    __module__ = LIBRARY
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self,
        transformer: TVMTransformer,
        vae: ModelMixin | None = None,
        description: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._model = described(description, transformer)
        if vae is not None:
            check_autoencoder(vae, self._model.spec)
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(description=description)

    @classmethod
    def from_trained_model(cls, model: TrainedModel, vae: ModelMixin | None = None) -> "TVMPipeline":
        """Make a pipeline from a trained model, without copying its network.

        Args:
            model: its network must be a DiT.
            vae: for a model of latents, an autoencoder of diffusers. Default: that of the model's decoder.

        Raises:
            InputError: if the network is not a DiT, or the autoencoder did not encode the latents.
        """
        network = expect_dit(model, "model", "a pipeline of diffusers")
        if vae is None and model.spec.kind == "latents":
            vae = getattr(model.decoder, "network", None)
        content = model.describe() | {"format": FORMAT}
        del content["network"]  # the transformer's own configuration says it
        description = json.loads(json.dumps(content))
        return cls(TVMTransformer.from_network(network), vae, description)

    def trained_model(self) -> TrainedModel:
        """A `TrainedModel` with the same network, and this pipeline's autoencoder as its decoder.

        Raises:
            InputError: if the weights are not float32.
        """
        if self.transformer.dtype != torch.float32:
            dtype = self.transformer.dtype
            raise InputError("transformer", f"must be in torch.float32 for a trained model, got {dtype}")
        decoder = None if self.vae is None else self._decode
        return replace(self._model, network=self.transformer.dit, decoder=decoder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "TVMPipeline":
        """Load a pipeline from a folder or the Hub, without executing any code from its files.

        Args:
            pretrained_model_name_or_path: folder, or "user/name" on the Hub.
            **options: those of `DiffusionPipeline.from_pretrained`, such as `dtype` (formerly `torch_dtype`),
                `revision` and `token`, or a component that replaces the saved one.

        Raises:
            InputError: if there is no such pipeline, or a file is missing, truncated, does not fit, or names
                unknown classes.
        """
        for name in ("custom_pipeline", "trust_remote_code"):
            if options.pop(name, None):
                raise InputError(name, "this pipeline runs no code of a repository")
        folder = Path(pretrained_model_name_or_path)
        names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        hub_options = {name: options.pop(name) for name in names if options.get(name) is not None}
        if not folder.is_dir():
            folder = download(str(pretrained_model_name_or_path), FILES, **hub_options)
        check_index(folder)
        importlib.import_module(LIBRARY)  # diffusers looks for our classes among the modules that are loaded
        options = {"low_cpu_mem_usage": is_accelerate_available()} | options | {"use_safetensors": True}
        try:
            pipeline: TVMPipeline = super().from_pretrained(folder, **options)
        except (InputError, torch.OutOfMemoryError):
            raise
        except _DAMAGED as error:
            message = " ".join(str(error).split())
            raise InputError(folder, f"not a pipeline that can be loaded ({message})") from None
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options: Any) -> "TVMPipeline":
        """As in diffusers, but keeps the autoencoder, whose class is not in the signature."""
        pipe: TVMPipeline = super().from_pipe(pipeline, **{"vae": pipeline.components.get("vae")} | options)
        return pipe

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, **options: Any
    ) -> None:
        """As in diffusers, but only as safetensors.

        Raises:
            InputError: if `safe_serialization` is False.
        """
        if not safe_serialization:
            raise InputError("safe_serialization", "weights are saved only as safetensors, got False")
        super().save_pretrained(str(save_directory), safe_serialization=True, **options)

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Not supported: the network's attention reads weights of modules that are not called.

        Raises:
            InputError: always; `enable_model_cpu_offload` and `enable_group_offload` work.
        """
        raise InputError("sequential CPU offload", "not possible here, use enable_group_offload")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        *,
        seed: int | None = None,
        times: Sequence[float] | None = None,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: a class (number or name) or one for each image; None with a `batch_size` uses all
                classes in turn.
            num_inference_steps: network evaluations for each image, on a uniform time grid.
            guidance_scale: guidance weight w, within the range of the model. Default: its constant weight, or
                the highest of its range.
            generator: of the noise: one, or one for each image.
            latents: the noise, N(0, 1) of shape (B, C, h, w).
            output_type: "pil" for a list of `PIL.Image`, "np" for float32 (B, H, W, channels) or "pt" for
                float32 (B, channels, H, W) in [0, 1], "latent" for the unscaled latents (B, C, h, w).
            return_dict: False to return a tuple with the images.
            seed: of the noise, instead of a generator; image k equals sample k of `TrainedModel.sample`.
            times: time grid from 1 to 0, decreasing, instead of the uniform one.
            batch_size: number of images. Default: the number of labels, or 1 without classes.

        Raises:
            InputError: for an argument out of range, two sources of noise, or images of latents without an
                autoencoder.
        """
        model = self._model
        self._check_output_type(output_type)
        if batch_size is not None:
            batch_size = _whole("batch_size", batch_size)
        if class_labels is None and batch_size is None:
            if model.spec.class_names is not None:
                raise InputError(
                    "class_labels", "name a class for each image, or give a batch_size, got None"
                )
            batch_size = 1
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        with arguments_named(_NAMES):
            grid = time_grid(_whole("steps", num_inference_steps), times)
            condition, count = model.sample_condition(class_labels, batch_size)
            weight = model.guidance_weight(guidance_scale)
        device = self._execution_device
        x = self._noise(count, generator, latents, seed)
        condition = condition.to(device)
        flow_map = FlowMap(self.transformer, model.scaled)
        for t, s in self.progress_bar(list(itertools.pairwise(grid))):
            x = jump(flow_map, x, t, s, condition, weight)
        images = self._output(model.spec.denormalize(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self,
        count: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        seed: int | None,
    ) -> Tensor:
        """(B, C, h, w) at time 1, float32 for weights of any precision."""
        given = {"generator": generator, "latents": latents, "seed": seed}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise InputError(names[1], f"give one source of noise, not {names[0]} as well")
        shape, device = (count, *self._model.spec.shape), self._execution_device
        if latents is not None:
            if latents.shape != shape:
                raise InputError("latents", f"must have shape {shape}, got {tuple(latents.shape)}")
            return latents.to(device, torch.float32)
        if seed is not None:
            if _whole("seed", seed) < 0:
                raise InputError("seed", f"must not be negative, got {seed}")
            return sample_noise(seed, range(count), shape[1:]).to(device)
        if isinstance(generator, list) and len(generator) != count:
            raise InputError("generator", f"{len(generator)} generators for {count} images")
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator | None):
                raise InputError("generator", f"must be a torch.Generator or a list of them, got {one!r}")
        noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return noise

    def _check_output_type(self, output_type: str) -> None:
        spec = self._model.spec
        if output_type not in ("pil", "np", "pt", "latent"):
            raise InputError("output_type", f"must be pil, np, pt or latent, got {output_type!r}")
        if output_type == "latent" and spec.kind != "latents":
            raise InputError("output_type", "this model generates pixels and has no latents, got 'latent'")
        if output_type != "latent" and spec.kind == "latents" and self.vae is None:
            raise InputError("output_type", f"no autoencoder: only latent is possible, got {output_type!r}")
        if output_type == "pil" and spec.kind == "image" and spec.shape[0] not in (1, 3):
            raise InputError("output_type", f"{spec.shape[0]} channels make no PIL image; use np or pt")

    def _output(self, data: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return data
        images = data.clamp(0, 1) if self._model.spec.kind == "image" else self._decode(data)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to images (B, 3, H, W) in [0, 1], float32."""
        latents = latents.to(self._execution_device, self.vae.dtype)
        assert self._model.spec.autoencoder is not None
        _, height, width = self._model.spec.autoencoder.image_shape
        chunks = latents.split(max(_DECODED_TOGETHER // (height * width), 1))
        images = [self.vae.decode(chunk, return_dict=False)[0] for chunk in chunks]
        return ((torch.cat(images).float() + 1) / 2).clamp(0, 1)


def _whole(name: str, number: Any) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise InputError(name, f"must be a whole number, got {number!r}") from None
