"""FID, sFID, Inception Score, precision and recall of a model, in the features of an extractor.

Shapes: n samples; d features.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from tvmatch.distributed import ALONE, Processes
from tvmatch.errors import InputError
from tvmatch.evaluation.collection import Collected, FeatureSizes, Kept, collect, feature_sizes
from tvmatch.evaluation.extractors import Extractor
from tvmatch.evaluation.feature_request import METRICS, FeatureRequest, Metric
from tvmatch.evaluation.metrics.frechet import frechet_distance
from tvmatch.evaluation.metrics.inception_score import inception_score
from tvmatch.evaluation.metrics.precision_and_recall import precision_recall
from tvmatch.evaluation.provenance import provenance_line, provenance_of
from tvmatch.evaluation.references.files import Reference
from tvmatch.evaluation.samples import Progress
from tvmatch.generation.numbered import numbered_samples, sample_labels
from tvmatch.trained_model import TrainedModel

_LOGGER = logging.getLogger(__name__)

SPLITS = 10  # of the Inception Score
NEIGHBOURS = 3  # k of precision and recall
_DEFAULT_REQUEST = FeatureRequest()


def evaluate_features(
    model: TrainedModel,
    extractor: Extractor,
    reference: Reference | None,
    request: FeatureRequest = _DEFAULT_REQUEST,
    *,
    processes: Processes = ALONE,
    on_progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Compute metrics of samples for every guidance weight and number of steps.

    Noise and label of sample k are the same in every row and for any number of processes. Samples are
    converted to bytes, as in a PNG file, before the extractor sees them.

    Args:
        model: generates images, of pixels or of latents with a decoder.
        extractor: images to features.
        reference: of the same extractor, from `load_reference`; needed in the first process only. The
            Inception Score needs none.
        request: metrics and samples.
        processes: share the work; all of them must call this function.
        on_progress: called with the number of samples done and the total over all rows.

    Returns:
        In the first process {"provenance": what all rows have in common, "warnings": [lines], "rows":
        [{"guidance", "steps", "fid", …, "images_per_second", "provenance": one line}]}; None in the others.
        Rows have "labels_from" and "uint8" only if these are not the defaults. "images_per_second" counts
        sampling only, summed over processes, without the first batch of each process if there are more.

    Raises:
        InputError: for an invalid request (see `FeatureRequest.check`), a metric that extractor, reference or
            number of samples do not allow, or samples that are not finite.
    """
    request.check(model)
    labels = sample_labels(model, request.labels_from, request.seed)
    weights = request.guidance
    if weights is None:
        weights = [model.guidance[1] if isinstance(model.guidance, tuple) else model.guidance]
    _, height, width = model.output_shape
    sizes = feature_sizes(extractor, height, width)
    # The reference is in the first process, so the metrics are chosen there.
    chosen = _chosen(request, extractor, sizes, reference) if processes.is_first else ()
    kept = Kept(
        spatial=processes.as_first("sfid" in chosen),
        vectors=request.count if processes.as_first("pr" in chosen) else 0,
        logits=processes.as_first("is" in chosen),
    )
    warnings = _warnings(request.count, sizes, reference, chosen) if processes.is_first else []
    for line in warnings:
        _LOGGER.warning("%s", line)

    common = provenance_of(model, extractor, reference, request, processes)
    options: dict[str, Any] = {} if request.labels_from is None else {"labels_from": request.labels_from}
    options |= {} if request.uint8 == "round" else {"uint8": request.uint8}
    rows: list[dict[str, Any]] = []
    grid = [(weight, step_count) for weight in weights for step_count in request.steps]
    for row, (weight, step_count) in enumerate(grid):
        collected = collect(
            numbered_samples(model, labels, steps=step_count, guidance=weight, seed=request.seed),
            request.count,
            extractor,
            sizes,
            kept,
            batch_size=request.batch_size,
            processes=processes,
            uint8=request.uint8,
            on_progress=_in_row(on_progress, row, len(grid)),
        )
        if collected is not None:
            place = {"guidance": weight, "steps": step_count}
            rows.append(
                place
                | options
                | _metrics(collected, reference, chosen, extractor, model.device)
                | {"images_per_second": collected.images_per_second}
                | {"provenance": provenance_line(common | place)}
            )
    return {"provenance": common, "warnings": warnings, "rows": rows} if processes.is_first else None


def _chosen(
    request: FeatureRequest, extractor: Extractor, sizes: FeatureSizes, reference: Reference | None
) -> tuple[Metric, ...]:
    """The metrics to compute, in the order of `METRICS`. Raises InputError for one that is not possible."""
    metrics, count = request.metrics, request.count
    lacking: dict[Metric, str] = {}
    if count < SPLITS:
        lacking["is"] = f"it needs at least {SPLITS} samples, got {count}"
    if count <= NEIGHBOURS:
        lacking["pr"] = f"it needs at least {NEIGHBOURS + 1} samples, got {count}"
    if reference is None:
        lacking |= dict.fromkeys(("fid", "sfid", "pr"), "there is no reference")
    else:
        _check_reference(reference, extractor, sizes)
        if reference.spatial is None:
            lacking["sfid"] = "the reference has no statistics of spatial features"
        if reference.vectors is None:
            lacking["pr"] = "the reference has statistics only, no images"
        elif len(reference.vectors) <= NEIGHBOURS:
            lacking["pr"] = f"the reference has only {len(reference.vectors)} images"
    if sizes.spatial is None:
        lacking["sfid"] = f"{extractor.name} gives no spatial features"
    if sizes.logits is None:
        lacking["is"] = f"{extractor.name} gives no class probabilities"
    if metrics is None and reference is None:
        raise InputError("reference", "is required for all metrics but the Inception Score (metrics is)")
    for name in metrics or ():
        if name in lacking:
            raise InputError("metrics", f"{name} cannot be computed, {lacking[name]}")
    return tuple(name for name in METRICS if name not in lacking and (metrics is None or name in metrics))


def _check_reference(reference: Reference, extractor: Extractor, sizes: FeatureSizes) -> None:
    """Raise InputError unless the reference was computed with the same extractor."""
    if len(reference.pooled.mean) != sizes.pooled:
        raise InputError(
            "reference",
            f"holds statistics of {len(reference.pooled.mean)} features, "
            f"{extractor.name} gives {sizes.pooled}",
        )
    theirs, ours = reference.provenance.get("extractor_fingerprint"), extractor.fingerprint
    if theirs is not None and theirs != ours:
        raise InputError("reference", f"was computed with extractor {theirs[:12]}…, this one is {ours[:12]}…")


def _warnings(
    count: int, sizes: FeatureSizes, reference: Reference | None, chosen: Sequence[Metric]
) -> list[str]:
    """One line for each set of images with too few images for an unbiased Fréchet distance."""
    features = max(sizes.pooled if "fid" in chosen else 0, (sizes.spatial or 0) if "sfid" in chosen else 0)
    lines = []
    real = None if reference is None else reference.count
    for name, number in (("samples", count), ("reference", real)):
        if features and number is not None and number <= features:
            lines.append(
                f"{name}: {number:,} images give the covariance of {features:,} features only rank "
                f"{number - 1:,}: the Fréchet distance is biased upwards, and comparable only with others of "
                "equally many images"
            )
    return lines


def _in_row(on_progress: Progress | None, row: int, rows: int) -> Progress | None:
    if on_progress is None:
        return None
    report = on_progress
    return lambda done, total: report(row * total + done, rows * total)


def _metrics(
    collected: Collected,
    reference: Reference | None,
    chosen: Sequence[Metric],
    extractor: Extractor,
    device: torch.device,
) -> dict[str, float]:
    values: dict[str, float] = {}
    if "fid" in chosen and reference is not None:
        name = {"inception": "fid", "dinov2": "fd_dinov2"}.get(extractor.name, "fd")
        values[name] = frechet_distance(collected.pooled, reference.pooled)
    if "sfid" in chosen and reference is not None and reference.spatial is not None and collected.spatial:
        name = "sfid" if extractor.name == "inception" else "spatial_fd"
        values[name] = frechet_distance(collected.spatial, reference.spatial)
    if "is" in chosen:
        score = inception_score(collected.logits, SPLITS)
        values |= {"inception_score": score.mean, "inception_score_std": score.std}
    if "pr" in chosen and reference is not None and reference.vectors is not None:
        shares = precision_recall(collected.vectors, reference.vectors, neighbours=NEIGHBOURS, device=device)
        values |= {"precision": shares.precision, "recall": shares.recall}
    return values
