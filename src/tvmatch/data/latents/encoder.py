"""Encode images as latents, in shards, with one or several processes; an interrupted run can be resumed.

    FOLDER/encoding.json   data, autoencoder and options, written before the first shard (`settings`)
    FOLDER/shards/…        the latents (`shards`)
    FOLDER/latents.json    description of all latents, written after the last shard (`dataset`)

Shard k holds images k S … (k + 1) S − 1 for shard size S. Its content depends on nothing but encoding.json.

Shapes: B images, C channels, (h, w) of a latent.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tvmatch.data.images.batches import ImageBatch, read_batches
from tvmatch.data.images.reader import ImageReader
from tvmatch.data.latents.autoencoder import Autoencoder
from tvmatch.data.latents.dataset import INFO_NAME, LatentsInfo, Posterior, Shard
from tvmatch.data.latents.settings import EncodingOptions, begin
from tvmatch.data.latents.shards import (
    ChannelSums,
    ShardReport,
    ShardWriter,
    finished_shard,
    new_shard,
    shard_name,
)
from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.distributed import ALONE, Position
from tvmatch.errors import InputError
from tvmatch.storage.locks import FolderLock

MEASURED = "measured"
_SKIPPED_RECORDED = 10
_DOING = "encodes into it; give each process its own --part"


class Normalization(NamedTuple):
    """Per channel, networks see (latent − mean) / std. `source` tells where the numbers come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


class Encoder:
    """Encodes a data set into a folder, or resumes doing so.

    Args:
        source: the images.
        autoencoder: on the device that encodes.
        folder: new, empty, or begun with the same data, autoencoder and options.
        options: settings that determine the latents.
        normalization: to write to latents.json; by default the one already written there, else mean and
            standard deviation of these latents. `MEASURED` always computes the latter.

    Attributes:
        shards: number of shards.

    Raises:
        InputError: the folder holds other files or was begun with other settings, or the autoencoder does not
            fit the resolution or the normalisation.
    """

    def __init__(
        self,
        source: ImageReader,
        autoencoder: Autoencoder,
        folder: Path,
        options: EncodingOptions,
        normalization: Normalization | Literal["measured"] | None = None,
    ) -> None:
        self._source = source
        self._autoencoder = autoencoder
        self._folder = folder
        self._options = options
        self._normalization = normalization
        self._shape = autoencoder.latent_shape((3, options.resolution, options.resolution))
        if isinstance(normalization, Normalization) and len(normalization.mean) != self._shape[0]:
            raise InputError(
                "normalization",
                f"{normalization.source} has {len(normalization.mean)} channels, latents of "
                f"{autoencoder.source} have {self._shape[0]}",
            )
        if options.flips == "stored" and _holds_latents(source):
            raise InputError(
                "flips",
                "must be none or drawn, got stored: this data set holds latents, and no images to mirror",
            )
        self._begun = begin(folder, options, source, autoencoder)
        self.shards = len(range(0, len(source), options.shard_size))

    def of_part(self, part: Position) -> range:
        """The shards k of a part: k ≡ rank modulo the number of parts."""
        return range(part.rank, self.shards, part.world_size)

    def images(self, shard: int) -> range:
        """Indices of the images of a shard."""
        return range(len(self._source))[shard * self._options.shard_size :][: self._options.shard_size]

    def finished(self, part: Position = ALONE) -> list[int]:
        """The shards of a part that are complete."""
        return [shard for shard in self.of_part(part) if finished_shard(self._folder, shard) is not None]

    def encode(
        self,
        part: Position = ALONE,
        *,
        workers: int = 4,
        on_bad_image: Literal["error", "skip"] = "error",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write the missing shards of a part.

        Args:
            part: rank and number of parts.
            workers: processes that read images; 0 reads them in this process.
            on_bad_image: "skip" leaves out images that cannot be read.
            on_progress: called with the number of images done and the total of this part.

        Raises:
            InputError: an image cannot be read and is not skipped, or another process encodes the same part.
            DataError: a worker process ends unexpectedly.
            OSError: a shard cannot be written; the shards before it are complete.
        """
        whole = part.world_size == 1
        name = f".part_{part.rank + 1}_of_{part.world_size}.lock"
        with (
            FolderLock(self._folder, shared=not whole, doing=_DOING),
            nullcontext() if whole else FolderLock(self._folder, name, doing=_DOING),
        ):
            self._encode(part, workers, on_bad_image, on_progress or (lambda done, total: None))

    def _encode(
        self,
        part: Position,
        workers: int,
        on_bad_image: Literal["error", "skip"],
        report: Callable[[int, int], None],
    ) -> None:
        finished = self.finished(part)
        batches = {shard: self._batches(shard) for shard in self.of_part(part) if shard not in finished}
        done, total = (
            sum(len(self.images(shard)) for shard in shards) for shards in (finished, self.of_part(part))
        )
        report(done, total)
        options = self._options
        every = list(chain.from_iterable(batches.values()))
        with read_batches(self._source, every, options.resolution, options.crop, workers) as read:
            for shard in batches:
                with new_shard(self._folder, shard) as writer:
                    for numbers in batches[shard]:
                        self._write(next(read), writer, skip=on_bad_image == "skip")
                        done += len(numbers)
                        report(done, total)

    def finish(self) -> LatentsInfo | None:
        """Write latents.json if the shards of all parts are complete.

        Returns:
            The content of latents.json; None if shards are missing.

        Raises:
            InputError: no image could be read.
        """
        reports: list[ShardReport] = []
        for shard in range(self.shards):
            report = finished_shard(self._folder, shard)
            if report is None:
                return None
            reports.append(report)
        info = self._info(reports)
        info.write(self._folder)
        return info

    def _batches(self, shard: int) -> list[range]:
        """Indices of the images that are encoded together; a batch never spans two shards."""
        images, size = self.images(shard), self._options.batch_size
        return [images[first : first + size] for first in range(0, len(images), size)]

    def _write(self, batch: ImageBatch, writer: ShardWriter, *, skip: bool) -> None:
        if batch.problems and not skip:
            raise batch.problems[0].with_hint("on_bad_image=skip leaves such images out")
        writer.skipped += map(str, batch.problems)
        if batch.values is not None:
            copies = 2 if self._options.flips == "stored" else 1
            labels = [self._source.label(number) for number in batch.numbers for _ in range(copies)]
            posterior = self._posterior(batch.values)
            if not all(part.isfinite().all() for part in posterior):
                raise InputError(
                    "autoencoder",
                    f"{self._autoencoder.source} gives non-finite numbers for one of the "
                    f"images {batch.numbers[0]} … {batch.numbers[-1]}",
                )
            writer.write(posterior, labels)

    def _posterior(self, values: Tensor) -> Posterior:
        """Posterior of images, uint8 (B, 3, H, W), or stored latents, float32 (B, 2C, h, w).

        With `flips="stored"` rows 2 i and 2 i + 1 belong to image i and its mirror image.
        """
        if values.dtype != torch.uint8:
            channels, height, width = self._shape
            if values.shape[1:] != (2 * channels, height, width):
                raise InputError(
                    "data",
                    f"means and standard deviations of latents have shape {tuple(values.shape[1:])}, "
                    f"those of {self._autoencoder.source} {(2 * channels, height, width)} at this resolution",
                )
            return Posterior(values[:, :channels], values[:, channels:])
        images = values.to(self._autoencoder.device).float() / 255
        posterior = self._autoencoder.encode(images)
        if self._options.flips != "stored":
            return posterior
        pairs = zip(posterior, self._autoencoder.encode(images.flip(-1)), strict=True)
        return Posterior(*(torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs))

    def _info(self, reports: list[ShardReport]) -> LatentsInfo:
        options = self._options
        skipped = [problem for report in reports for problem in report.skipped]
        found = [report.sums for report in reports if report.sums is not None]
        if not found:
            raise InputError("data", f"none of {len(skipped)} images can be read; the first: {skipped[0]}")
        sums = reduce(ChannelSums.plus, found)
        normalization = self._final_normalization(sums)
        spec = DataSpec(
            kind="latents",
            shape=self._shape,
            class_names=self._source.class_names,
            mean=normalization.mean,
            std=normalization.std,
            autoencoder=AutoencoderInfo(
                self._begun["autoencoder"],
                self._autoencoder.fingerprint,
                (3, options.resolution, options.resolution),
            ),
        )
        return LatentsInfo(
            spec=spec,
            measured_mean=sums.mean,
            measured_std=sums.std,
            count=sum(report.rows for report in reports) // (2 if options.flips == "stored" else 1),
            flips=options.flips,
            shards=tuple(
                Shard(shard_name(shard), report.rows) for shard, report in enumerate(reports) if report.rows
            ),
            provenance={
                **self._begun,
                "data_fingerprint": self._source.fingerprint,
                "split": options.split,
                "crop": options.crop,
                "normalization": normalization.source,
                "skipped": len(skipped),
                "first_skipped": skipped[:_SKIPPED_RECORDED],
            },
        )

    def _final_normalization(self, sums: ChannelSums) -> Normalization:
        if isinstance(self._normalization, Normalization):
            return self._normalization
        if self._normalization is None and (self._folder / INFO_NAME).exists():
            present = LatentsInfo.read(self._folder)
            where = str(present.provenance.get("normalization"))
            if where != MEASURED:
                return Normalization(present.spec.mean, present.spec.std, where)
        return Normalization(sums.mean, sums.std, MEASURED)


def _holds_latents(source: ImageReader) -> bool:
    try:
        return source.moments(0) is not None
    except InputError:  # the first cannot be read, which `encode` reports
        return True
