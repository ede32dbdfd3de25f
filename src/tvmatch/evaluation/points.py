"""Metrics of points: the Wasserstein distance to new data."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from tvmatch.data.base import Dataset
from tvmatch.errors import InputError
from tvmatch.evaluation.metrics.wasserstein import wasserstein2
from tvmatch.evaluation.samples import Progress, Sampler, check_steps, generate
from tvmatch.seeds import fold


def evaluate_points(
    sample: Sampler,
    dataset: Dataset,
    *,
    steps: Sequence[int] = (1, 2, 4),
    count: int = 2000,
    draws: int = 5,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Exact 2-Wasserstein distance between `count` samples and `count` data points, for each number of steps.

    The distance is the mean over `draws` draws of new samples and new data, because the distance between two
    sets of 2,000 points varies by tens of per cent.

    Args:
        sample: `TrainedModel.sample`, or a callable with the same arguments.
        dataset: of points. Each draw takes two disjoint sets of `count` points: the reference, and one whose
            distance to the reference is `real_wasserstein2`.
        steps: numbers of network evaluations a sample.
        count: number of samples, and of points in each real set.
        draws: number of distances to average.
        seed: of the noise and of the choice of data.
        on_progress: called after each distance.

    Returns:
        {"real_wasserstein2": …, "real_wasserstein2_error": …, "nfe": {"1": {"wasserstein2": …,
        "wasserstein2_error": …, "points_per_second": …}, …}}: means and their standard errors (absent for
        one draw), in data units. Samples have the labels of the reference if it has any.

    Raises:
        InputError: for images, `steps` < 1, `count` < 1, `draws` < 1, or fewer data points than 2 `count`.
    """
    check_steps(steps)
    if dataset.spec.kind != "points":
        raise InputError("dataset", f"must hold points, it holds data of kind {dataset.spec.kind!r}")
    for name, number in (("count", count), ("draws", draws)):
        if number < 1:
            raise InputError(name, f"must be at least 1, got {number}")
    report = on_progress or (lambda done, total: None)
    real_distances: list[float] = []
    distances: dict[int, list[float]] = {step_count: [] for step_count in steps}
    seconds = dict.fromkeys(steps, 0.0)
    total = draws * (len(distances) + 1)
    for draw in range(draws):
        real = dataset.take(2 * count, fold(seed, "real", draw))
        reference, other = real.values[:count], real.values[count:]
        labels = None if real.labels is None else real.labels[:count]
        real_distances.append(wasserstein2(other, reference))
        done = draw * (len(distances) + 1) + 1
        report(done, total)
        for position, step_count in enumerate(distances, start=1):
            noise_seed = fold(seed, "noise", draw)
            drawn = generate(sample, reference, labels, steps=step_count, seed=noise_seed)
            distances[step_count].append(wasserstein2(drawn.values, reference))
            seconds[step_count] += drawn.seconds
            report(done + position, total)
    result: dict[str, Any] = {**_mean_and_error("real_wasserstein2", real_distances), "nfe": {}}
    for step_count, values in distances.items():
        result["nfe"][str(step_count)] = {
            **_mean_and_error("wasserstein2", values),
            "points_per_second": draws * count / seconds[step_count],
        }
    return result


def _mean_and_error(name: str, values: list[float]) -> dict[str, float]:
    numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    result = {name: float(numbers.mean())}
    if len(values) > 1:
        result[f"{name}_error"] = float(numbers.std()) / math.sqrt(len(values))
    return result
