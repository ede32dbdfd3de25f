"""Metrics of images: the Fréchet distance in pixel space."""

from collections.abc import Sequence
from typing import Any

from tvmatch.data.base import Dataset
from tvmatch.errors import InputError
from tvmatch.evaluation.metrics.frechet import fit_gaussian, frechet_distance
from tvmatch.evaluation.samples import Progress, Sampler, check_steps, generate
from tvmatch.seeds import fold


def evaluate_images(
    sample: Sampler,
    dataset: Dataset,
    *,
    count: int,
    steps: Sequence[int] = (1, 2, 4),
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Pixel-space Fréchet distance between `count` samples and `count` real images.

    The features are the C · H · W pixels in [0, 1], so the distance measures colours, brightness and coarse
    shapes; it is not FID. If there are fewer images than pixels, the distance of two sets of *real* images is
    far from 0, and increases as `count` decreases. Compare distances of the same `count` only, with
    `real_frechet`: a ratio of 1 is the best possible.

    Args:
        sample: `TrainedModel.sample`, or a callable with the same arguments.
        dataset: of images. It provides two disjoint sets of `count` images: the reference, and one whose
            distance to the reference is `real_frechet`.
        count: number of samples, and of images in each real set; at least 2.
        steps: numbers of network evaluations a sample.
        seed: of the noise and of the choice of images.
        on_progress: called after each distance.

    Returns:
        {"real_frechet": …, "nfe": {"1": {"frechet": …, "frechet_ratio": …, "images_per_second": …}, …}}.
        Samples have the labels of the reference if it has any.

    Raises:
        InputError: for points, `steps` < 1, `count` < 2, fewer images than 2 `count`, images that are all
            equal, or samples of another shape or with non-finite pixels.
    """
    check_steps(steps)
    if dataset.spec.kind != "image":
        raise InputError("dataset", f"must hold images, it holds data of kind {dataset.spec.kind!r}")
    if count < 2:
        raise InputError("count", f"must be at least 2, got {count}")
    real = dataset.take(2 * count, fold(seed, "real"))
    reference_images = real.values[:count]
    labels = None if real.labels is None else real.labels[:count]
    reference = fit_gaussian(reference_images.flatten(1))

    real_frechet = frechet_distance(fit_gaussian(real.values[count:].flatten(1)), reference)
    if real_frechet == 0:
        raise InputError("dataset", f"the {2 * count} images taken are all alike")

    report = on_progress or (lambda done, total: None)
    result: dict[str, Any] = {"real_frechet": real_frechet, "nfe": {}}
    report(1, len(steps) + 1)
    for done, step_count in enumerate(steps, start=2):
        drawn = generate(sample, reference_images, labels, steps=step_count, seed=fold(seed, "noise"))
        frechet = frechet_distance(fit_gaussian(drawn.values.flatten(1)), reference)
        result["nfe"][str(step_count)] = {
            "frechet": frechet,
            "frechet_ratio": frechet / real_frechet,
            "images_per_second": count / drawn.seconds,
        }
        report(done, len(steps) + 1)
    return result
