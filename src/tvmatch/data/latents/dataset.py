"""Latents on disk as a data set: mean and standard deviation of the posterior of each image, memory-mapped.

    FOLDER/latents.json              `LatentsInfo`
    FOLDER/shards/00000.arrow, …     Arrow streams with columns mean, std (float32 bytes) and label

Shapes: B elements of a batch, C channels, (h, w) of a latent.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import datasets
import pyarrow  # type: ignore[import-untyped]
import torch
from torch import Tensor

from tvmatch.data.base import Batch, distinct_indices, epoch_indices, mirrored_at_random
from tvmatch.data.findings import lines_of_findings
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws
from tvmatch.storage.files import expect_no_lfs_pointer, parse_json, replacing

FORMAT = "tvmatch-latents-1"
INFO_NAME = "latents.json"
NO_LABEL = -1

Flips = Literal["none", "stored", "drawn"]


class Posterior(NamedTuple):
    """Mean and standard deviation of an autoencoder's posterior, unscaled, of shape (B, C, h, w)."""

    mean: Tensor
    std: Tensor

    def sample(self, draws: RowDraws, rows: range) -> Tensor:
        """mean + std ε with ε ~ N(0, I), one draw for each of B rows."""
        return self.mean + self.std * draws.normal("posterior", rows, self.mean.shape[1:])


class Shard(NamedTuple):
    """Path of a shard relative to the folder, and its number of rows."""

    file: str
    rows: int


@dataclass(frozen=True)
class LatentsInfo:
    """Description of a folder of latents.

    Attributes:
        spec: shape, classes, autoencoder, and the normalisation for training.
        measured_mean: mean of the unscaled latents per channel; None if it was not measured.
        measured_std: standard deviation of the unscaled latents per channel; None if it was not measured.
        count: number of images.
        flips: "stored": rows 2 i and 2 i + 1 are image i and its mirror image; "drawn": latents are mirrored
            at random during training; "none".
        shards: in the order of their rows.
        provenance: data, split, crop, versions and so on, as JSON values.
    """

    spec: DataSpec
    measured_mean: tuple[float, ...] | None
    measured_std: tuple[float, ...] | None
    count: int
    flips: Flips
    shards: tuple[Shard, ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if self.flips not in get_args(Flips):
            raise ValueError(f"flips must be one of {', '.join(get_args(Flips))}, got {self.flips!r}")
        if not isinstance(self.provenance, dict):
            raise ValueError(f"provenance must be a mapping, got {self.provenance!r}")
        rows = sum(shard.rows for shard in self.shards)
        if not self.shards or rows != self.rows:
            raise ValueError(f"the shards have {rows} rows, {self.count} images are {self.rows}")

    @property
    def rows(self) -> int:
        """Number of rows of all shards."""
        return self.count * (2 if self.flips == "stored" else 1)

    def write(self, folder: Path) -> None:
        """Write `latents.json` atomically."""
        content = {"format": FORMAT, **asdict(self), "data": self.spec.describe()}
        del content["spec"]
        with replacing(folder / INFO_NAME) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "LatentsInfo":
        """Read `latents.json` of a folder.

        Raises:
            InputError: it is missing, unreadable or of another version.
        """
        path = folder / INFO_NAME
        expect_no_lfs_pointer(path)
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                "data.latents",
                f"{folder} holds no finished latents (no {INFO_NAME}); `tvmatch encode` writes "
                "them, or resumes an interrupted run",
            ) from None
        except (OSError, ValueError) as error:
            raise InputError("data.latents", f"{path} is not readable as JSON ({error})") from None
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise InputError("data.latents", f"the format of {path} is not {FORMAT}")
        try:
            return cls(
                spec=DataSpec.from_description(content.pop("data")),
                measured_mean=_numbers(content.pop("measured_mean")),
                measured_std=_numbers(content.pop("measured_std")),
                shards=tuple(Shard(str(file), int(rows)) for file, rows in content.pop("shards")),
                **content,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("data.latents", f"{path} does not describe latents ({error})") from None


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


class LatentDataset:
    """Latents drawn from their posteriors: z = mean + std ε with new noise ε at each training step.

    Can be pickled for data workers.

    Args:
        folder: written by `tvmatch encode`.

    Attributes:
        info: content of latents.json.
        spec: shape, classes, normalisation and autoencoder.
        findings: lines about the latents, the classes, and classes without latents.

    Raises:
        InputError: the folder is unfinished, has a label outside its classes, or a shard is missing, damaged
            or of another length.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder).expanduser()
        self.info = LatentsInfo.read(folder)
        self.spec = self.info.spec
        shards = [_open(folder, shard, self.spec.shape) for shard in self.info.shards]
        self._rows = datasets.concatenate_datasets(shards)
        labels = None
        if self.spec.class_names is not None:
            labels = self._rows.data.column("label").to_numpy()
            wrong = labels[(labels < 0) | (labels >= self.spec.class_count)]
            if wrong.size:
                raise InputError(
                    "data.latents",
                    f"{folder} holds a latent of class {wrong[0]}, classes are 0 … "
                    f"{self.spec.class_count - 1}",
                )
        self.findings = lines_of_findings(
            str(folder), self.info.count, self.spec.class_names, labels, unit="latents"
        )

    @property
    def crop(self) -> str | None:
        """How the images were cropped before encoding; None if the folder does not record it."""
        return self.info.provenance.get("crop")

    @property
    def class_counts(self) -> list[int] | None:
        """Rows of each class, including stored mirror images; None without labels."""
        if self.spec.class_names is None:
            return None
        labels = torch.tensor(self._rows.data.column("label").to_numpy(), dtype=torch.int64, device="cpu")
        return torch.bincount(labels, minlength=self.spec.class_count).tolist()

    def __len__(self) -> int:
        """Number of images."""
        return self.info.count

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The elements of training step `step`, drawn for (seed, step, row); see `Dataset.batch`."""
        mirrored = torch.zeros(size, dtype=torch.bool, device="cpu")
        if self.info.flips != "none":
            mirrored = mirrored_at_random(range(size), step, seed)
        indices = epoch_indices(len(self), step, size, seed)
        return self._draw(indices, mirrored, RowDraws(seed, "step", step))

    def take(self, count: int, seed: int) -> Batch:
        """`count` distinct random elements, never mirrored; see `Dataset.take`."""
        indices = distinct_indices(len(self), count, seed)
        mirrored = torch.zeros(count, dtype=torch.bool, device="cpu")
        return self._draw(indices, mirrored, RowDraws(seed, "take"))

    def _draw(self, indices: Tensor, mirrored: Tensor, draws: RowDraws) -> Batch:
        rows = self._read(indices, mirrored)
        values = self._posterior(rows).sample(draws, range(len(indices)))
        if self.info.flips == "drawn":
            values = torch.where(mirrored.view(-1, 1, 1, 1), values.flip(-1), values)
        labels = (
            None
            if self.spec.class_names is None
            else torch.tensor(rows["label"], dtype=torch.int64, device="cpu")
        )
        return Batch(values, labels)

    def _read(self, indices: Tensor, mirrored: Tensor) -> dict[str, Any]:
        numbers = 2 * indices + mirrored if self.info.flips == "stored" else indices
        rows: dict[str, Any] = self._rows[numbers.tolist()]
        return rows

    def _posterior(self, rows: dict[str, Any]) -> Posterior:
        return Posterior(self._tensor(rows["mean"]), self._tensor(rows["std"]))

    def _tensor(self, contents: list[bytes]) -> Tensor:
        joined = bytearray().join(contents)  # a bytearray: PyTorch warns of read-only memory
        return torch.frombuffer(joined, dtype=torch.float32).view(-1, *self.spec.shape)


def _open(folder: Path, shard: Shard, shape: tuple[int, ...]) -> datasets.Dataset:
    """The rows of a shard of latents of shape (C, h, w), memory-mapped."""
    path = folder / shard.file
    if not path.is_file():
        raise InputError(
            "data.latents", f"{path} is missing; `tvmatch encode` with the same options makes it again"
        )
    expect_no_lfs_pointer(path)
    try:
        rows = datasets.Dataset.from_file(str(path))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError("data.latents", f"{path} is damaged ({error})") from None
    if len(rows) != shard.rows or not {"mean", "std", "label"} <= set(rows.column_names):
        raise InputError("data.latents", f"{path} is damaged: it has {len(rows)} of {shard.rows} rows")
    if len(rows[0]["mean"]) != 4 * math.prod(shape):
        raise InputError("data.latents", f"{path} holds latents of another shape than {INFO_NAME} says")
    return rows
