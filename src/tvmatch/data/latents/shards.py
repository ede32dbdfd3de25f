"""Shards of latents on disk, with the sums from which statistics of all latents are computed.

    FOLDER/shards/00000.arrow   the rows (`dataset`)
    FOLDER/shards/00000.json    `ShardReport`

A shard appears under its name once it is complete. Shapes: B rows, C channels, (h, w) of a latent.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from tvmatch.data.latents.dataset import NO_LABEL, Posterior
from tvmatch.data.running_moments import merge_means
from tvmatch.storage.files import parse_json, replacing

_SCHEMA = pa.schema([("mean", pa.binary()), ("std", pa.binary()), ("label", pa.int64())])
_BYTES_TOGETHER = 2**26  # size of an Arrow record batch


@dataclass(frozen=True)
class ChannelSums:
    """Count, mean and sum of squared deviations per channel in float64, which can be merged.

    Attributes:
        count: numbers per channel.
        mean: per channel.
        squares: Σ (number − mean)² per channel.
    """

    count: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.count < 1 or not self.mean or len(self.mean) != len(self.squares):
            raise ValueError(f"no sums: {self}")
        if not all(math.isfinite(number) for number in (*self.mean, *self.squares)):
            raise ValueError(f"not finite: {self}")

    @classmethod
    def of(cls, posterior: Posterior) -> "ChannelSums":
        """Sums of latents z, in expectation over draws from their posterior: Var z = Var mean + E std²."""
        mean, std = (tensor.double().transpose(0, 1).flatten(1) for tensor in posterior)
        centre = mean.mean(1)
        squares = (mean - centre[:, None]).square().sum(1) + std.square().sum(1)
        return cls(mean.shape[1], tuple(centre.tolist()), tuple(squares.tolist()))

    def plus(self, other: "ChannelSums") -> "ChannelSums":
        """The sums of both sets of numbers together."""
        merged = merge_means(self.count, np.array(self.mean), other.count, np.array(other.mean))
        squares = np.array(self.squares) + np.array(other.squares) + merged.shift**2 * merged.weight
        return ChannelSums(merged.total, tuple(merged.mean.tolist()), tuple(squares.tolist()))

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel."""
        return tuple(math.sqrt(squares / self.count) for squares in self.squares)


@dataclass(frozen=True)
class ShardReport:
    """Content of a complete shard.

    Attributes:
        rows: number of rows.
        length: of the file, in bytes.
        sums: over the latents; None without rows.
        skipped: for each image that was left out, its name and the reason.
    """

    rows: int
    length: int
    sums: ChannelSums | None
    skipped: tuple[str, ...]


class ShardWriter:
    """Collects the rows of a shard; made by `new_shard`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        self._waiting = 0
        self.rows = 0
        self.sums: ChannelSums | None = None
        self.skipped: list[str] = []

    def write(self, posterior: Posterior, labels: Iterable[int | None]) -> None:
        """Add B rows: mean and std of shape (B, C, h, w), and class numbers."""
        sums = ChannelSums.of(posterior)
        self.sums = sums if self.sums is None else self.sums.plus(sums)
        for name, tensor in zip(("mean", "std"), posterior, strict=True):
            contents = [row.tobytes() for row in tensor.float().numpy().astype("<f4", copy=False)]
            self._columns[name] += contents
            self._waiting += sum(map(len, contents))
        self._columns["label"] += [NO_LABEL if label is None else label for label in labels]
        self.rows += len(posterior.mean)
        if self._waiting >= _BYTES_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows to the file."""
        if self._waiting:
            self._stream.write_batch(pa.record_batch(self._columns, schema=_SCHEMA))
            self._columns = {name: [] for name in _SCHEMA.names}
            self._waiting = 0


def shard_name(number: int) -> str:
    """Path of a shard relative to the folder."""
    return f"shards/{number:05d}.arrow"


@contextmanager
def new_shard(folder: Path, number: int) -> Iterator[ShardWriter]:
    """Write a shard; it appears under its name if the block ends without an exception.

    Raises:
        OSError: the shard cannot be written.
    """
    path = folder / shard_name(number)
    for left_behind in path.parent.glob(f".{number:05d}.*.tmp"):  # by a process that was killed
        left_behind.unlink(missing_ok=True)
    with replacing(path) as unfinished:
        with unfinished.open("wb") as file:
            with pa.ipc.new_stream(file, _SCHEMA) as stream:
                writer = ShardWriter(stream)
                yield writer
                writer.flush()
            _to_disk(file)
        length = unfinished.stat().st_size
    report = ShardReport(writer.rows, length, writer.sums, tuple(writer.skipped))
    with replacing(path.with_suffix(".json")) as unfinished, unfinished.open("w", encoding="utf-8") as text:
        json.dump(asdict(report), text)
        _to_disk(text)


def _to_disk(file: Any) -> None:
    """Flush to the disk before renaming, so that no power failure leaves a named file without content."""
    file.flush()
    os.fsync(file.fileno())


def finished_shard(folder: Path, number: int) -> ShardReport | None:
    """The report of a complete shard; None if the shard is missing or incomplete."""
    path = folder / shard_name(number)
    try:
        content = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        if content["sums"] is not None:
            content["sums"] = ChannelSums(**{name: _tuple(value) for name, value in content["sums"].items()})
        report = ShardReport(**{name: _tuple(value) for name, value in content.items()})
        if path.stat().st_size != report.length or (report.sums is None) != (report.rows == 0):
            return None
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            rows = sum(batch.num_rows for batch in stream)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
    return report if rows == report.rows else None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
