"""Two-dimensional samples against fresh data."""

from collections.abc import Sequence
from typing import Any

from tvmatch.data.base import Dataset
from tvmatch.errors import InputError
from tvmatch.evaluation.generation import Progress, Sampler, check_steps, generate
from tvmatch.evaluation.transport import wasserstein2
from tvmatch.seeds import fold


def evaluate_points(
    sample: Sampler,
    dataset: Dataset,
    *,
    steps: Sequence[int] = (1, 2, 4),
    count: int = 2000,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Exact 2-Wasserstein distance between `count` samples and `count` data points, for each number of steps.

    Args:
        sample: `TrainedModel.sample` or anything called like it.
        dataset: of points; gives two disjoint sets of `count`: the reference, and the one that
            shows how far apart two real sets are.
        steps: numbers of network evaluations a sample.
        count: of samples, and of points in each real set.
        seed: of the noise and of the choice of data.
        on_progress: called after each distance.

    Returns:
        {"real_wasserstein2": …, "nfe": {"1": {"wasserstein2": …, "points_per_second": …}, …}},
        distances in data units (see `wasserstein2`). Samples are drawn for the reference's labels
        where there are any.

    Raises:
        InputError: for images, `steps` < 1, `count` < 1, or fewer data points than 2 `count`.
    """
    check_steps(steps)
    if dataset.spec.kind != "points":
        raise InputError(f"dataset: must hold points, it holds data of kind {dataset.spec.kind!r}")
    if count < 1:
        raise InputError(f"count: must be at least 1, got {count}")
    real = dataset.take(2 * count, fold(seed, "real"))
    reference, other = real.values[:count], real.values[count:]
    labels = None if real.labels is None else real.labels[:count]

    report = on_progress or (lambda done, total: None)
    result: dict[str, Any] = {"real_wasserstein2": wasserstein2(other, reference), "nfe": {}}
    report(1, len(steps) + 1)
    for done, step_count in enumerate(steps, start=2):
        drawn = generate(sample, reference, labels, steps=step_count, seed=fold(seed, "noise"))
        result["nfe"][str(step_count)] = {
            "wasserstein2": wasserstein2(drawn.values, reference),
            "points_per_second": count / drawn.seconds,
        }
        report(done, len(steps) + 1)
    return result
