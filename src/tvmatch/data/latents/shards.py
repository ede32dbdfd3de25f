"""Shards of latents on disk, each with the sums for the statistics of all of them: whole or not at all.

    FOLDER/shards/00000.arrow   the rows, see `latents`
    FOLDER/shards/00000.json    number of rows, length of the file, sums, images left out (`ShardReport`)

Shapes: B rows, C channels, (h, w) of a latent.
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
# Of an Arrow record batch: few for a reader to look through, little to keep in memory.
_BYTES_TOGETHER = 2**26


@dataclass(frozen=True)
class ChannelSums:
    """Mean and spread of the numbers of each channel, in float64, so that parts can be put together.

    Attributes:
        count: numbers a channel.
        mean: their mean, a channel.
        squares: Σ (number − mean)², a channel.
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
    def of(cls, moments: Posterior) -> "ChannelSums":
        """Of latents z drawn from their posteriors, on average over the draws: Var z = Var mean + E std²."""
        mean, std = (tensor.double().transpose(0, 1).flatten(1) for tensor in moments)
        centre = mean.mean(1)
        squares = (mean - centre[:, None]).square().sum(1) + std.square().sum(1)
        return cls(mean.shape[1], tuple(centre.tolist()), tuple(squares.tolist()))

    def plus(self, other: "ChannelSums") -> "ChannelSums":
        """Of both parts together."""
        merged = merge_means(self.count, np.array(self.mean), other.count, np.array(other.mean))
        squares = np.array(self.squares) + np.array(other.squares) + merged.shift**2 * merged.weight
        return ChannelSums(merged.total, tuple(merged.mean.tolist()), tuple(squares.tolist()))

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation, a channel."""
        return tuple(math.sqrt(squares / self.count) for squares in self.squares)


@dataclass(frozen=True)
class ShardReport:
    """What a finished shard holds.

    Attributes:
        rows: how many.
        length: of the file, in bytes.
        sums: of the latents; None without rows.
        skipped: what was wrong with the images that were left out.
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

    def write(self, moments: Posterior, labels: Iterable[int | None]) -> None:
        """Add B rows with these posteriors (B, C, h, w) and class numbers."""
        sums = ChannelSums.of(moments)
        self.sums = sums if self.sums is None else self.sums.plus(sums)
        for name, tensor in zip(("mean", "std"), moments, strict=True):
            contents = [row.tobytes() for row in tensor.float().numpy().astype("<f4", copy=False)]
            self._columns[name] += contents
            self._waiting += sum(map(len, contents))
        self._columns["label"] += [NO_LABEL if label is None else label for label in labels]
        self.rows += len(moments.mean)
        if self._waiting >= _BYTES_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._waiting:
            self._stream.write_batch(pa.record_batch(self._columns, schema=_SCHEMA))
            self._columns = {name: [] for name in _SCHEMA.names}
            self._waiting = 0


def shard_name(number: int) -> str:
    """The file of a shard, below the folder."""
    return f"shards/{number:05d}.arrow"


@contextmanager
def new_shard(folder: Path, number: int) -> Iterator[ShardWriter]:
    """Write a shard, which is there when the block ends without an exception.

    Raises:
        OSError: if it cannot be written.
    """
    path = folder / shard_name(number)
    for left_behind in path.parent.glob(f".{number:05d}.*.tmp"):  # of a process that was killed
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
    """Before it gets its name: after a power failure a name might stand for a file without content."""
    file.flush()
    os.fsync(file.fileno())


def finished_shard(folder: Path, number: int) -> ShardReport | None:
    """The report of a shard that is there with all its rows; None if it has to be made."""
    path = folder / shard_name(number)
    try:
        content = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        sums = content["sums"]
        report = ShardReport(
            rows=content["rows"],
            length=content["length"],
            sums=None
            if sums is None
            else ChannelSums(sums["count"], tuple(sums["mean"]), tuple(sums["squares"])),
            skipped=tuple(content["skipped"]),
        )
        if path.stat().st_size != report.length or (report.sums is None) != (report.rows == 0):
            return None
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            rows = sum(batch.num_rows for batch in stream)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return report if rows == report.rows else None
