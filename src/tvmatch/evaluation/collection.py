"""Statistics of the features of many images.

Shapes: n images, B in a batch; d pooled and s spatial features, K classes.
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

ImagesByNumber = Callable[[range], Tensor]
"""A function of consecutive image numbers that returns images in [0, 1], (B, 1 or 3, H, W)."""


@dataclass(frozen=True)
class FeatureSizes:
    """Number of features of each kind that an extractor returns for an image; None if it returns none."""

    pooled: int
    spatial: int | None
    logits: int | None


def feature_sizes(extractor: Extractor, height: int, width: int) -> FeatureSizes:
    """Determine the sizes of an extractor's features from one black image.

    Raises:
        InputError: if it does not return one vector for each image.
    """
    features = extractor(torch.zeros(1, 3, height, width, dtype=torch.uint8, device="cpu"))
    sizes = []
    for name, values in features._asdict().items():
        if values is not None and (values.ndim != 2 or values.shape[0] != 1 or values.shape[1] < 1):
            raise InputError("extractor", f"its {name} features of an image have shape {tuple(values.shape)}")
        sizes.append(None if values is None else values.shape[1])
    pooled, spatial, logits = sizes
    if pooled is None:
        raise InputError("extractor", f"{extractor.name} returns no pooled features")
    return FeatureSizes(pooled, spatial, logits)


@dataclass(frozen=True, eq=False)
class Collected:
    """Features of n images, as far as metrics need them.

    Attributes:
        count: n.
        images_per_second: speed of drawing or reading the images, summed over processes. The first batch of a
            process, which includes warm-up, is not counted if there are more.
        pooled: mean and covariance of the pooled features.
        spatial: mean and covariance of the spatial features; None if `Kept.spatial` is false.
        vectors: pooled features of the first `Kept.vectors` images, float32 (≤ n, d).
        logits: float32 (n, K); (0, K) if `Kept.logits` is false.
    """

    count: int
    images_per_second: float
    pooled: GaussianStatistics
    spatial: GaussianStatistics | None
    vectors: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Kept:
    """What to keep in addition to the statistics of the pooled features.

    Attributes:
        spatial: whether to keep statistics of the spatial features.
        vectors: number of images whose pooled features to keep.
        logits: whether to keep all logits.
    """

    spatial: bool = False
    vectors: int = 0
    logits: bool = False


def collect(
    images: ImagesByNumber,
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
    """Compute features of `count` images, in batches that several processes share.

    The batches do not depend on the number of processes, and each process has consecutive batches. Results
    for different numbers of processes are therefore equal up to rounding in float64.

    Args:
        images: called with numbers within 0 … count − 1.
        count: number of images, at least 2.
        extractor: images to features.
        sizes: of the extractor's features.
        kept: what to keep in addition to the statistics of the pooled features.
        batch_size: images at a time.
        processes: share the work.
        uint8: conversion of images to the bytes that the extractor receives.
        on_progress: called with the number of images done, estimated from this process, and `count`.

    Returns:
        The features of all processes in the first process, None in the others.

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
        if kept.vectors > numbers.start:  # an empty slice would keep its batch in memory
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
    """Merge the statistics of all processes in the first process."""
    moments = running.moments()
    counts = processes.gather(torch.tensor(moments.count, device="cpu"))
    means = processes.gather(moments.mean)
    scatters = processes.gather(moments.scatter)
    rows = processes.gather(moments.rows)
    for part in zip(counts[1:], means[1:], scatters[1:], rows[1:], strict=True):
        running.merge(Moments(int(part[0]), *part[1:]))
    return running
