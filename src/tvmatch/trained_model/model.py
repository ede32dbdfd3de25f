"""A trained generator: evaluation weights and everything needed to sample, in memory and on disk.

On disk it is a folder with `model.json` (architecture, data, guidance, provenance) and
`model.safetensors` (weights). Loading executes no code.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tvmatch.condition import Condition, Guidance
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap
from tvmatch.models.base import BaseNetwork, answers_of
from tvmatch.models.registry import describe_config
from tvmatch.sampling import expect_sample_numbers, sample_noise, sample_trajectory, time_grid
from tvmatch.trained_model.files import FORMAT, save_tensors

Labels = int | str | Sequence[int | str] | None
"""A class (number or name), or one for each sample; None: all classes in turn."""
Decoder = Callable[[Tensor], Tensor]
"""Maps unscaled latents (B, C, h, w) to images (B, C, H, W) in [0, 1]."""


@dataclass
class TrainedModel:
    """A generator ready to sample.

    Attributes:
        network: F_θ with evaluation weights, called like `tvmatch.flow_map.Network`.
        spec: shape, classes and normalisation of the data.
        scaled: whether it has the scaled parameterisation.
        guidance: the guidance weight w of training, or the range (low, high) of weights.
        step: number of optimiser steps.
        provenance: recipe, versions and so on, as JSON values.
        decoder: for a model of latents, decodes them to images; without it `sample` returns latents. It is
            not saved with the model; `spec.autoencoder` identifies it.
    """

    network: nn.Module
    spec: DataSpec
    scaled: bool
    guidance: Guidance
    step: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one sample: of the data, or of the decoded images."""
        if self.decoder is None or self.spec.autoencoder is None:
            return self.spec.shape
        return self.spec.autoencoder.image_shape

    @property
    def gives_images(self) -> bool:
        """Whether `sample` returns images in [0, 1]."""
        return self.spec.kind == "image" or (self.spec.kind == "latents" and self.decoder is not None)

    @property
    def knows_dropped_labels(self) -> bool:
        """Whether the network can be called without labels, which guidance needs.

        False only for imported networks that were trained without label dropout.
        """
        return answers_of(self.network).knows_dropped_labels

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "TrainedModel":
        """Move the network to `device`, in place.

        Raises:
            InputError: for a dtype. The weights remain float32, since times must not be rounded; under
                `torch.autocast` matrix products are computed in half precision.
        """
        if isinstance(device, torch.dtype):
            raise InputError(
                "device",
                f"got {device}; the weights stay in float32, and sampling runs in half precision "
                'inside: with torch.autocast("cuda", torch.bfloat16)',
            )
        self.network.to(device)
        return self

    def _expect_float32(self) -> None:
        dtype = next(self.network.parameters()).dtype
        if answers_of(self.network).needs_float32 and dtype != torch.float32:
            raise InputError(
                "network",
                f"weights in float32 are needed, got {dtype}; sampling runs in half precision "
                'inside: with torch.autocast("cuda", torch.bfloat16)',
            )

    def sample(
        self,
        labels: Labels | Condition = None,
        *,
        count: int | None = None,
        first: int = 0,
        steps: int = 1,
        times: Sequence[float] | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw samples. Sample k depends only on (seed, k), its label, the times and the guidance weight.

        Args:
            labels: a class (number or name) or one for each sample; None uses all classes in turn. For a
                model of embeddings, a `Condition` with embeddings; None draws samples without.
            count: number of samples. Default: the number of labels or classes, or 16 without classes.
            first: number of the first sample, to draw many in parts; the samples are first, first + 1, ….
            steps: network evaluations for each sample, on a uniform time grid.
            times: time grid from 1 to 0, decreasing, instead of the uniform one.
            guidance: weight w, within the range of the model. Default: its constant weight, or the highest of
                its range.
            seed: of the noise.
            batch_size: samples at a time; it changes samples only by rounding (about 1e-5).

        Returns:
            float32 on the CPU: images (n, C, H, W) clipped to [0, 1], points (n, 2), or latents (n, C, h, w).

        Raises:
            InputError: for a label, number of steps, grid, guidance, count, first or batch size out of range.
        """
        grid = time_grid(steps, times)
        trajectories = self._batches(labels, count, first, grid, guidance, seed, batch_size)
        return torch.cat([self._to_data(states[-1].clone()) for states in trajectories])

    def trajectory(
        self,
        labels: Labels | Condition = None,
        *,
        count: int | None = None,
        steps: int = 1,
        times: Sequence[float] | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """The states from noise to samples, (number of times, n, ...); arguments as for `sample`."""
        grid = time_grid(steps, times)
        batches = self._batches(labels, count, 0, grid, guidance, seed, batch_size)
        return torch.cat([torch.stack([self._to_data(x) for x in states]) for states in batches], 1)

    def _batches(
        self,
        labels: Labels | Condition,
        count: int | None,
        first: int,
        grid: tuple[float, ...],
        guidance: float | None,
        seed: int,
        batch_size: int,
    ) -> Iterator[Tensor]:
        """Trajectories of consecutive batches, in the network's units on the CPU."""
        if batch_size < 1:
            raise InputError("batch_size", f"must be at least 1, got {batch_size}")
        for name, number in (("seed", seed), ("first", first)):
            if number < 0:
                raise InputError(name, f"must not be negative, got {number}")
        self._expect_float32()
        condition, count = self.sample_condition(labels, count)
        expect_sample_numbers(first, count)
        weight = self.guidance_weight(guidance)
        flow_map = FlowMap(self.network, self.scaled)
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            noise = sample_noise(seed, range(first + start, first + stop), self.spec.shape).to(self.device)
            batch_condition = condition.rows(slice(start, stop)).to(self.device)
            yield sample_trajectory(flow_map, noise, grid, batch_condition, weight).cpu()

    def sample_condition(self, labels: Labels | Condition, count: int | None) -> tuple[Condition, int]:
        """The condition of samples on the CPU, and their number; arguments as for `sample`."""
        if not isinstance(labels, Condition):
            classes, count = self.spec.sample_labels(labels, count)
            return Condition(classes), count
        if labels.guidance_weight is not None:
            raise InputError("labels", "give the guidance weight as guidance, not within the Condition")
        lengths = {len(x) for x in labels if x is not None} or {16 if count is None else count}
        if len(lengths) > 1 or (count is not None and lengths != {count}):
            raise InputError("labels", f"a Condition of {sorted(lengths)} samples, for a count of {count}")
        length = lengths.pop()
        labels.check(torch.empty(length, 1, device="cpu"))
        size = None if labels.embeddings is None else labels.embeddings.shape[2]
        if size is not None and size != self.spec.embedding_size:
            known = self.spec.embedding_size
            raise InputError("labels", f"embeddings of size {size}, the model was trained with {known}")
        if labels.labels is None:
            return labels, length
        return labels._replace(labels=self.spec.label_indices(labels.labels.tolist())), length

    def guidance_weight(self, guidance: float | None = None) -> float:
        """The guidance weight w for a requested weight; None means the default.

        Raises:
            InputError: if the model was not trained for this weight.
        """
        if isinstance(self.guidance, tuple):
            low, high = self.guidance
            weight = high if guidance is None else guidance
            if not low <= weight <= high:
                raise InputError("guidance", f"trained for {low:g} to {high:g}, got {guidance}")
            return weight
        if guidance is not None and not math.isclose(guidance, self.guidance):
            raise InputError(
                "guidance", f"this model was trained at the one weight {self.guidance:g}, got {guidance:g}"
            )
        return self.guidance

    def _to_data(self, values: Tensor) -> Tensor:
        data = self.spec.denormalize(values.float())
        if self.spec.kind == "latents":
            return data if self.decoder is None else self.decoder(data).float().cpu()
        return data.clamp(0, 1) if self.spec.kind == "image" else data

    def describe(self) -> dict[str, Any]:
        """The content of `model.json`.

        Raises:
            TypeError: if the network is not of a registered kind.
        """
        if not isinstance(self.network, BaseNetwork):
            raise TypeError(f"network: {type(self.network).__name__} is not a registered network")
        dropout = {} if self.knows_dropped_labels else {"label_dropout": False}
        return dropout | {
            "format": FORMAT,
            "network": describe_config(self.network.config),
            "data": self.spec.describe(),
            "scaled": self.scaled,
            "guidance": self.guidance,
            "step": self.step,
            "provenance": self.provenance,
        }

    def save(self, folder: Path) -> None:
        """Write `model.json` and `model.safetensors` into an existing folder.

        Raises:
            TypeError: if the network is not of a registered kind, or the provenance is not JSON.
        """
        text = json.dumps(self.describe(), indent=1, ensure_ascii=False) + "\n"
        save_tensors(self.network.state_dict(), folder / "model.safetensors")
        (folder / "model.json").write_text(text, encoding="utf-8")
