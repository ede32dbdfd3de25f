"""A trained generator: evaluation weights with all that is needed to use them, on disk and in memory.

On disk it is a folder with `model.json` (architecture, data, guidance, provenance) and
`model.safetensors` (weights). Loading executes nothing.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvmatch.condition import Condition, Guidance
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.files import expect_no_lfs_pointer, parse_json
from tvmatch.flow_map import FlowMap
from tvmatch.models import MLP, DiT, DiTConfig, MLPConfig
from tvmatch.sampling import expect_sample_numbers, sample_noise, sample_trajectory, time_grid

FORMAT = "tvmatch-model-1"
Read = TypeVar("Read")
Labels = int | str | Sequence[int | str] | None
"""A class (number or name), or one for each sample; None: of all classes in turn."""
Decoder = Callable[[Tensor], Tensor]
"""From raw latents (B, C, h, w) to images (B, C, H, W) in [0, 1]: an autoencoder's decoder."""
NetworkConfig = DiTConfig | MLPConfig


def build_network(config: NetworkConfig, spec: DataSpec, seed: int | None = None) -> DiT | MLP:
    """The network of a configuration for data of shape and classes `spec`; see `DiT` for the seed."""
    if isinstance(config, DiTConfig):
        return DiT(config, spec.shape, spec.class_count, seed=seed)
    return MLP(config, spec.shape, spec.class_count, seed=seed)


@dataclass
class TrainedModel:
    """A generator ready to sample.

    Attributes:
        network: F_θ with evaluation weights, called as in `tvmatch.flow_map.Network`.
        spec: what it generates.
        scaled: the parameterisation it was trained with.
        guidance: the guidance weight w it was trained at, or the range (low, high) of them.
        step: optimiser steps it was trained for.
        provenance: how it came about (recipe, versions, …), for people and reports.
        decoder: for a model of latents, what makes them images; without it `sample` gives latents. It is not
            saved with the model (`spec.autoencoder` says which it is).
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
        """Of one sample: that of the data, or of the images that a decoder makes of latents."""
        if self.decoder is None or self.spec.autoencoder is None:
            return self.spec.shape
        return self.spec.autoencoder.image_shape

    @property
    def gives_images(self) -> bool:
        """Whether `sample` gives images in [0, 1]."""
        return self.spec.kind == "image" or (self.spec.kind == "latents" and self.decoder is not None)

    @property
    def knows_dropped_labels(self) -> bool:
        """Whether it can be called without labels, as guidance by two velocities needs.

        True for all but imported networks that were trained without label dropout.
        """
        return not isinstance(self.network, DiT | MLP) or self.network.conditioning.label_dropout

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "TrainedModel":
        """Move the network to `device`, in place.

        Raises:
            InputError: for a dtype. Weights stay in float32, since times must not be rounded; products run in
                half precision under `torch.autocast`.
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
        """Of our networks; others may cast what they are given."""
        dtype = next(self.network.parameters()).dtype
        if isinstance(self.network, DiT | MLP) and dtype != torch.float32:
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
        """Draw samples; sample k depends on (seed, k), its label, the times and the guidance alone.

        Args:
            labels: a class (number or name) or one a sample; None goes through the classes in turn. For a
                model of embeddings a `Condition` with them; None draws samples without.
            count: number of samples; by default that of the labels, one a class, or 16 without classes.
            first: number of the first sample, for drawing many in parts: their noise is that of samples
                first, first + 1, ….
            steps: network evaluations a sample, on a uniform grid of times.
            times: another grid, decreasing from 1 to 0.
            guidance: weight w; only within the range the model was trained for. By default its one
                constant, or the highest of its range.
            seed: of the noise.
            batch_size: samples at a time; it changes images by rounding only (about 1e-5).

        Returns:
            CPU float32: images (n, C, H, W) clipped to [0, 1], points (n, 2), or latents (n, C, h, w).

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
        """All states from noise to sample, (number of times, n, ...); arguments as for `sample`."""
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
        condition, count = self._condition(labels, count)
        expect_sample_numbers(first, count)
        weight = self.guidance_weight(guidance)
        flow_map = FlowMap(self.network, self.scaled)
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            noise = sample_noise(seed, range(first + start, first + stop), self.spec.shape).to(self.device)
            batch_condition = condition.rows(slice(start, stop)).to(self.device)
            yield sample_trajectory(flow_map, noise, grid, batch_condition, weight).cpu()

    def _condition(self, labels: Labels | Condition, count: int | None) -> tuple[Condition, int]:
        """The condition of the samples, and their number."""
        if count is not None and count < 1:
            raise InputError("count", f"must be at least 1, got {count}")
        if isinstance(labels, Condition):
            return self._given_condition(labels, count)
        if labels is None:
            if self.spec.class_names is None:
                return Condition(), 16 if count is None else count
            count = self.spec.class_count if count is None else count
            return Condition(torch.arange(count, device="cpu") % self.spec.class_count), count
        if isinstance(labels, int | str | np.integer):
            labels = [labels] * (1 if count is None else count)
        classes = self.spec.label_indices(list(labels))
        if len(classes) == 0:
            raise InputError("labels", "the list is empty")
        if count is not None and count != len(classes):
            raise InputError("count", f"{count} samples for {len(classes)} labels")
        return Condition(classes), len(classes)

    def _given_condition(self, condition: Condition, count: int | None) -> tuple[Condition, int]:
        """A condition from the caller, if it is of `count` samples and of what the model knows."""
        if condition.guidance_weight is not None:
            raise InputError("labels", "give the guidance weight as guidance, not within the Condition")
        lengths = {len(x) for x in condition if x is not None} or {16 if count is None else count}
        if len(lengths) > 1 or (count is not None and lengths != {count}):
            raise InputError("labels", f"a Condition of {sorted(lengths)} samples, for a count of {count}")
        length = lengths.pop()
        condition.check(torch.empty(length, 1, device="cpu"))
        size = None if condition.embeddings is None else condition.embeddings.shape[2]
        if size is not None and size != self.spec.embedding_size:
            raise InputError(
                "labels", f"embeddings of size {size}, this model knows {self.spec.embedding_size}"
            )
        if condition.labels is not None:
            classes = self.spec.label_indices(condition.labels.tolist())
            condition = condition._replace(labels=classes)
        return condition, length

    def guidance_weight(self, guidance: float | None = None) -> float:
        """The weight w that samples are drawn with if this one is asked for.

        Raises:
            InputError: if the model was not trained for it.
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
        """What `model.json` says of the model, as plain values.

        Raises:
            TypeError: if the network is neither a DiT nor an MLP.
        """
        if not isinstance(self.network, DiT | MLP):
            raise TypeError(f"network: cannot describe a {type(self.network).__name__} in a file")
        kind = "dit" if isinstance(self.network, DiT) else "mlp"
        # Said only of imported networks that were trained without; all others were trained with it.
        dropout = {} if self.knows_dropped_labels else {"label_dropout": False}
        return dropout | {
            "format": FORMAT,
            "network": {"kind": kind, **asdict(self.network.config)},
            "data": self.spec.describe(),
            "scaled": self.scaled,
            "guidance": self.guidance,
            "step": self.step,
            "provenance": self.provenance,
        }

    def save(self, folder: Path) -> None:
        """Write `model.json` and `model.safetensors` into an existing folder.

        Raises:
            TypeError: if the network is neither a DiT nor an MLP, or the provenance is not JSON.
        """
        text = json.dumps(self.describe(), indent=1, ensure_ascii=False) + "\n"
        save_file(dict(self.network.state_dict()), folder / "model.safetensors")
        (folder / "model.json").write_text(text, encoding="utf-8")


def load(path: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Read a trained model with its evaluation weights.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint folder.
        device: where to put the network.

    Raises:
        InputError: if the path holds no checkpoint of ours, or a truncated or mismatched one.
    """
    return of_newest(Path(path), lambda folder: _load(folder, device))


def _load(folder: Path, device: torch.device | str) -> TrainedModel:
    description = read_json(folder / "model.json", FORMAT)
    source = folder / "model.safetensors"
    tensors = read_tensors(source)
    try:
        kinds: dict[str, type[DiTConfig] | type[MLPConfig]] = {"dit": DiTConfig, "mlp": MLPConfig}
        config = kinds[description["network"].pop("kind")](**description["network"])
        spec = DataSpec.from_description(description["data"])
        depth = config.size().depth if isinstance(config, DiTConfig) else config.depth
        if depth > max(len(tensors), 1_000):  # what follows would build a network of any depth, for hours
            raise ValueError(f"a depth of {depth} for {len(tensors)} tensors")
        network = _unallocated(config, spec)
        network.conditioning.label_dropout = bool(description.get("label_dropout", True))
        model = TrainedModel(
            network=network,
            spec=spec,
            scaled=bool(description["scaled"]),
            guidance=_guidance(description["guidance"]),
            step=int(description["step"]),
            provenance=dict(description["provenance"]),
        )
    # RuntimeError: sizes that PyTorch cannot multiply.
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            folder / "model.json", f"not a model description of this version ({reason})"
        ) from None
    expect_tensors(model.network, tensors, source)  # before there is memory for what may be any size
    try:
        model.network.to_empty(device="cpu")
        if isinstance(model.network, DiT):
            model.network.fill_positions()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(folder / "model.json", f"no memory for this network ({reason})") from None
    model.network.load_state_dict(tensors, strict=True)
    model.network.requires_grad_(False).eval()
    return model.to(device)


def _unallocated(config: NetworkConfig, spec: DataSpec) -> DiT | MLP:
    """The network without initial weights, which take long to draw and would be overwritten."""
    with torch.device("meta"):
        return build_network(config, spec).to(torch.float32)  # whatever PyTorch's default is


def _guidance(numbers: Any) -> Guidance:
    """One weight, or a pair of them; JSON may hold anything."""
    if isinstance(numbers, list):
        low, high = (float(number) for number in numbers)
    else:
        low = high = float(numbers)
    if not 1 <= low <= high < math.inf:
        raise ValueError(f"guidance {numbers}")
    return (low, high) if isinstance(numbers, list) else low


def read_spec(path: str | Path) -> DataSpec:
    """What the model of a checkpoint generates, without its weights.

    Raises:
        InputError: if the path holds no checkpoint of ours.
    """
    return of_newest(Path(path), _read_spec)


def _read_spec(folder: Path) -> DataSpec:
    file = folder / "model.json"
    try:
        return DataSpec.from_description(read_json(file, FORMAT)["data"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(file, f"not a model description of this version ({error})") from None


def of_newest(path: Path, read: Callable[[Path], Read]) -> Read:
    """What `read` makes of the checkpoint folder at `path`: itself, or the newest of a run folder.

    A run that goes on may remove the newest while it is read; then the next one is read.

    Raises:
        InputError: from `read`, or if there is no checkpoint.
    """
    while True:
        folder = find_checkpoint(path)
        try:
            return read(folder)
        except (InputError, OSError):
            if os.path.lexists(
                folder / "model.json"
            ):  # not removed, whatever it is: a folder, a link to nothing
                raise


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder at `path`: itself, or the newest of a run folder.

    Raises:
        InputError: if there is none.
    """
    if (path / "model.json").is_file():
        return path
    # Only finished ones, by number: step_900 comes before step_1000, and a folder still being written has
    # another name.
    found = [file.parent for file in path.glob("checkpoints/step_*/model.json")]
    found = [folder for folder in found if folder.name.removeprefix("step_").isdecimal()]
    if found:
        return max(found, key=lambda folder: int(folder.name.removeprefix("step_")))
    if path.exists():
        raise InputError(path, "no checkpoint here (a folder with model.json, or a run folder)")
    raise InputError(path, "no such file or folder")


def read_json(path: Path, expected_format: str) -> dict[str, Any]:
    """A JSON object whose `format` is as expected; an InputError otherwise."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, "missing") from None
    except (OSError, ValueError) as error:
        raise InputError(path, f"not readable as JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != expected_format:
        raise InputError(path, f"its format is not {expected_format}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; an InputError if it is missing, truncated or something else."""
    expect_no_lfs_pointer(path)
    try:
        return load_file(path, device="cpu")
    except FileNotFoundError:
        raise InputError(path, "missing") from None
    except (OSError, SafetensorError) as error:
        raise InputError(path, f"truncated or not a safetensors file ({error})") from None


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Copy tensors into a module, every one and nothing else; an InputError names what does not fit."""
    expect_tensors(module, tensors, source)
    module.load_state_dict(tensors, strict=True)


def expect_tensors(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Refuse other tensors than a module's, by an InputError that names what does not fit."""
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise InputError(source, f"missing tensors {missing[:3]}, unexpected tensors {extra[:3]}")
    for name, tensor in tensors.items():
        own = expected[name]
        if tensor.shape != own.shape or tensor.dtype != own.dtype:
            raise InputError(
                source,
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"the network's is {own.dtype} of shape {tuple(own.shape)}",
            )
