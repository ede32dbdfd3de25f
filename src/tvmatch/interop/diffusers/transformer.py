"""The network of a trained model as a model of diffusers; imported from `tvmatch.diffusers`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from tvmatch.dual import Dual, as_dual
from tvmatch.errors import InputError
from tvmatch.models import DiT, DiTConfig

LIBRARY = "tvmatch.diffusers"  # the module of our classes in model_index.json


class TVMTransformer(ModelMixin, ConfigMixin):
    """The network F_θ of a trained model, a DiT, as a model of diffusers.

    Use `from_pretrained` or `from_network`; the constructor sets all weights to zero.

    Args:
        network: the fields of a `DiTConfig`.
        shape: (C, h, w).
        class_count: number of classes; 0 for an unconditional network.

    Attributes:
        dit: the network.

    Raises:
        InputError: if these are not the arguments of a network.
    """

    __module__ = LIBRARY
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012 (diffusers' name and type)

    @register_to_config
    def __init__(self, network: dict[str, Any], shape: Sequence[int], class_count: int = 0) -> None:
        super().__init__()
        with torch.device("meta"):  # without initial weights, which take long to draw and are overwritten
            try:
                self.dit = DiT(DiTConfig(**network), tuple(shape), class_count)
            except TypeError as error:
                raise InputError("transformer", f"not the configuration of a network ({error})") from None
        self.dit.to_empty(device=torch.get_default_device())
        for parameter in self.dit.parameters():
            torch.nn.init.zeros_(parameter)
        self.dit.fill_buffers()

    @classmethod
    def from_network(cls, network: DiT) -> "TVMTransformer":
        """Wrap a network without copying it."""
        with torch.device("meta"):
            transformer: TVMTransformer = cls(
                asdict(network.config), list(network.shape), network.class_count
            )
        transformer.dit = network
        return transformer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """As in diffusers, but only from safetensors, which must hold exactly the tensors of the network.

        Raises:
            InputError: if tensors are missing, left over, or of another shape.
        """
        give_report = options.pop("output_loading_info", False)
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        transformer, report = super().from_pretrained(pretrained_model_name_or_path, **options)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found := report[problem]:  # names, or for those of another shape (name, shape, our shape)
                names = sorted(entry if isinstance(entry, str) else entry[0] for entry in found)
                shown = [name.removeprefix("dit.") for name in names][:3]
                raise InputError("transformer", f"{problem.replace('_keys', ' tensors')} {shown}")
        return (transformer, report) if give_report else transformer

    def forward(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor | Dual:
        """F, as `DiT.forward`. With weights in half precision, matrix products have that precision.

        x, the times, norms and the residual stream remain float32.
        """
        device = as_dual(x).value.device.type
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(device, dtype=self.dtype if half else None, enabled=half):
            output: Tensor | Dual = self.dit(x, t, s, labels, guidance_weight)
        return output
