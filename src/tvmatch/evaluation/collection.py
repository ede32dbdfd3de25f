"""Features of many images, kept as what the figures need: statistics, and the features themselves if asked.

Shapes: n images in B a batch; d pooled and s spatial features, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from tvmatch.distributed import Processes
from tvmatch.errors import InputError
from tvmatch.evaluation.extractors import Extractor
from tvmatch.evaluation.metrics.frechet import GaussianStatistics
from tvmatch.evaluation.metrics.statistics import Moments, RunningGaussian
from tvmatch.evaluation.samples import Progress
from tvmatch.generation.uint8 import Uint8, to_bytes

ImageSource = Callable[[range], Tensor]
"""Images of consecutive numbers: in [0, 1], (B, C, H, W) with one channel or three."""


@dataclass(frozen=True)
class FeatureSizes:
    """How many numbers an extractor gives an image; None for what it does not give."""

    pooled: int
    spatial: int | None
    logits: int | None


def feature_sizes(extractor: Extractor, height: int, width: int) -> FeatureSizes:
    """Sizes of the features of an extractor, from one black image.

    Raises:
        InputError: if it does not give one vector an image.
    """
    features = extractor(torch.zeros(1, 3, height, width, dtype=torch.uint8, device="cpu"))
    sizes = []
    for name, values in features._asdict().items():
        if values is not None and (values.ndim != 2 or values.shape[0] != 1 or values.shape[1] < 1):
            raise InputError(
                "extractor", f"its {name} features of one image have shape {tuple(values.shape)}"
            )
        sizes.append(None if values is None else values.shape[1])
    pooled, spatial, logits = sizes
    if pooled is None:
        raise InputError("extractor", f"{extractor.name} gives no pooled features")
    return FeatureSizes(pooled, spatial, logits)


@dataclass(frozen=True, eq=False)
class Collected:
    """What is kept of the features of n images.

    Attributes:
        count: n.
        images_per_second: of getting the images alone, of all processes together. Each one's first batch, for
            which a GPU compiles and allocates, does not count where there are more.
        pooled: mean and covariance of the pooled features.
        spatial: of the spatial ones; None if they were not asked for.
        vectors: the pooled features of the first images, float32 (≤ n, d), in the order of the images.
        logits: float32 (n, K) in the order of the images; (0, K) if they were not asked for.
    """

    count: int
    images_per_second: float
    pooled: GaussianStatistics
    spatial: GaussianStatistics | None
    vectors: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Kept:
    """What to keep of the features.

    Attributes:
        spatial: statistics of the spatial features.
        vectors: pooled features themselves, of at most so many images.
        logits: all of them.
    """

    spatial: bool = False
    vectors: int = 0
    logits: bool = False


def collect(
    images: ImageSource,
    count: int,
    extractor: Extractor,
    sizes: FeatureSizes,
    kept: Kept,
    *,
    batch_size: int,
    processes: Processes,
    uint8: Uint8 = "round",
    on_progress: Progress | None = None,
) -> Collected | None:
    """Features of `count` images, in batches that several processes share.

    The batches are the same for any number of processes, and each process has consecutive ones; so the
    figures depend on that number by rounding in float64 alone.

    Args:
        images: gives those of consecutive numbers within 0 … count − 1.
        count: at least 2.
        extractor: images to features.
        sizes: of the extractor.
        kept: what to keep of the features beside the statistics of the pooled ones.
        batch_size: images at a time.
        processes: that share the work.
        uint8: how the images become the bytes that the extractor sees.
        on_progress: called with the images done, as if all processes were equally fast, and all.

    Returns:
        Everything in the first process, None in others.

    Raises:
        InputError: for a batch size < 1, fewer than 2 images, or features that are not finite.
    """
    if batch_size < 1:
        raise InputError("batch_size", f"must be at least 1, got {batch_size}")
    if count < 2:
        raise InputError("count", f"must be at least 2, got {count}")
    pooled = RunningGaussian(sizes.pooled)
    spatial = RunningGaussian(sizes.spatial or 0)
    vectors = [torch.zeros(0, sizes.pooled, dtype=torch.float32, device="cpu")]
    logits = [torch.zeros(0, sizes.logits or 0, dtype=torch.float32, device="cpu")]
    seconds, timed = 0.0, 0
    share = processes.share(-(-count // batch_size))
    for done, batch in enumerate(share, start=1):
        numbers = range(batch * batch_size, min((batch + 1) * batch_size, count))
        start = perf_counter()
        values = images(numbers)
        if done > 1 or len(share) == 1:
            seconds, timed = seconds + perf_counter() - start, timed + len(numbers)
        features = extractor(to_bytes(values, uint8))
        pooled.update(features.pooled)
        if kept.spatial and features.spatial is not None:
            spatial.update(features.spatial)
        if kept.vectors > numbers.start:  # an empty slice would keep all of its batch in memory
            vectors.append(features.pooled[: kept.vectors - numbers.start].float())
        if kept.logits and features.logits is not None:
            logits.append(features.logits.float())
        if on_progress is not None:
            on_progress(count * done // len(share), count)
    parts = _joined(pooled, processes), _joined(spatial, processes) if kept.spatial else None
    all_vectors = processes.gather(torch.cat(vectors))
    all_logits = processes.gather(torch.cat(logits))
    speeds = processes.gather(
        torch.tensor(timed / seconds if timed else 0.0, dtype=torch.float64, device="cpu")
    )
    if not processes.is_first:
        return None
    return Collected(
        count,
        float(sum(speeds)),
        parts[0].statistics(),
        None if parts[1] is None else parts[1].statistics(),
        torch.cat(all_vectors),
        torch.cat(all_logits),
    )


def _joined(running: RunningGaussian, processes: Processes) -> RunningGaussian:
    """What all processes have seen, in the first of them."""
    moments = running.moments()
    counts = processes.gather(torch.tensor(moments.count, device="cpu"))
    means = processes.gather(moments.mean)
    scatters = processes.gather(moments.scatter)
    rows = processes.gather(moments.rows)
    for part in zip(counts[1:], means[1:], scatters[1:], rows[1:], strict=True):
        running.merge(Moments(int(part[0]), *part[1:]))
    return running
