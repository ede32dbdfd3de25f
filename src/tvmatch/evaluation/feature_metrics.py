"""FID and its kin: generated images against a reference, in an extractor's features.

Shapes: n samples; d features.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from tvmatch.distributed import ALONE, Processes
from tvmatch.errors import InputError
from tvmatch.evaluation.collection import Collected, FeatureSizes, Kept, collect, feature_sizes
from tvmatch.evaluation.extractors import Extractor
from tvmatch.evaluation.metrics.frechet import frechet_distance
from tvmatch.evaluation.metrics.inception_score import inception_score
from tvmatch.evaluation.metrics.precision_and_recall import precision_recall
from tvmatch.evaluation.provenance import provenance_line, provenance_of
from tvmatch.evaluation.references.files import Reference
from tvmatch.evaluation.samples import Progress, check_steps
from tvmatch.generation.numbered import LabelsFrom, numbered_samples, sample_labels
from tvmatch.generation.uint8 import Uint8, check_uint8
from tvmatch.trained_model import TrainedModel

_LOGGER = logging.getLogger(__name__)

Metric = Literal["fid", "sfid", "is", "pr"]
METRICS: tuple[Metric, ...] = get_args(Metric)
SPLITS = 10  # of the Inception Score
NEIGHBOURS = 3  # k of precision and recall


def evaluate_features(
    model: TrainedModel,
    extractor: Extractor,
    reference: Reference | None,
    *,
    metrics: Sequence[Metric] | None = None,
    count: int = 50_000,
    steps: Sequence[int] = (1, 2, 4),
    guidance: Sequence[float] | None = None,
    seed: int = 0,
    labels_from: LabelsFrom | None = None,
    uint8: Uint8 = "round",
    batch_size: int = 64,
    processes: Processes = ALONE,
    on_progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Figures of `count` samples for every guidance weight and number of steps.

    Sample k has the noise of (seed, k) and class k mod K, or one drawn for (seed, k), for every row and any
    number of processes. Images are rounded to bytes, as a PNG file would, before the extractor sees them.

    Args:
        model: that gives images: of pixels, or of latents with its decoder.
        extractor: images to features.
        reference: of the same extractor, from `load_reference`; in the first process alone. None will do for
            the Inception Score.
        metrics: "fid" (Fréchet distance of the pooled features: FID with "inception", FD-DINOv2 with
            "dinov2"), "sfid" (of the spatial features, Nash et al., arXiv 2103.03841), "is" (Inception Score,
            10 splits), "pr" (precision and recall, k = 3). By default all that extractor and reference allow.
        count: of samples, n.
        steps: numbers of network evaluations a sample.
        guidance: weights w; by default the model's one, or the highest of its range.
        seed: of the noise, and of drawn labels.
        labels_from: labels drawn as often as in the training "data", or "uniform" ones, in place of k mod K.
        uint8: "truncate" has the samples' bytes truncated; those of the reference are what they are.
        batch_size: samples at a time, in each process.
        processes: that share the work; every one must call this function.
        on_progress: called with the samples done and all, over all rows.

    Returns:
        In the first process {"provenance": what all rows have in common, "warnings": [lines], "rows":
        [{"guidance", "steps", "fid", …, "images_per_second", "provenance": one line}]}; None in others.
        Rows of drawn labels or truncated bytes say so by "labels_from" and "uint8" besides.
        Images a second count the sampling alone, of all processes together, without each one's first batch
        where there are more.

    Raises:
        InputError: for a model that gives no images, a metric that extractor or reference do not allow, too
            few samples for one, steps, guidance, count, seed or batch size out of range, labels that cannot
            be drawn so, or samples that are not finite.
    """
    check_request(
        model,
        metrics=metrics,
        count=count,
        steps=steps,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        labels_from=labels_from,
        uint8=uint8,
    )
    labels = sample_labels(model, labels_from, seed)
    weights = _default_guidance(model) if guidance is None else guidance
    _, height, width = model.output_shape
    sizes = feature_sizes(extractor, height, width)
    # Where the reference is, in the first process, its statistics decide; others only give features.
    chosen = _chosen(metrics, count, extractor, sizes, reference) if processes.is_first else ()
    kept = Kept(
        spatial=processes.as_first("sfid" in chosen),
        vectors=count if processes.as_first("pr" in chosen) else 0,
        logits=processes.as_first("is" in chosen),
    )
    warnings = _warnings(count, sizes, reference, chosen) if processes.is_first else []
    for line in warnings:
        _LOGGER.warning("%s", line)

    common = provenance_of(
        model, extractor, reference, count, seed, batch_size, processes, labels_from, uint8
    )
    unusual: dict[str, Any] = {} if labels_from is None else {"labels_from": labels_from}
    unusual |= {} if uint8 == "round" else {"uint8": uint8}
    rows: list[dict[str, Any]] = []
    grid = [(weight, step_count) for weight in weights for step_count in steps]
    for row, (weight, step_count) in enumerate(grid):
        collected = collect(
            numbered_samples(model, labels, steps=step_count, guidance=weight, seed=seed),
            count,
            extractor,
            sizes,
            kept,
            batch_size=batch_size,
            processes=processes,
            uint8=uint8,
            on_progress=_in_row(on_progress, row, len(grid)),
        )
        if collected is not None:
            place = {"guidance": weight, "steps": step_count}
            rows.append(
                place
                | unusual
                | _figures(collected, reference, chosen, extractor, model.device)
                | {"images_per_second": collected.images_per_second}
                | {"provenance": provenance_line(common | place)}
            )
    return {"provenance": common, "warnings": warnings, "rows": rows} if processes.is_first else None


def check_request(
    model: TrainedModel,
    *,
    metrics: Sequence[str] | None,
    count: int,
    steps: Sequence[int],
    guidance: Sequence[float] | None,
    seed: int,
    batch_size: int,
    labels_from: LabelsFrom | None = None,
    uint8: Uint8 = "round",
) -> None:
    """All of `evaluate_features` that can be wrong before a reference is known, which may take hours.

    Raises:
        InputError: naming the argument.
    """
    if not model.gives_images:
        hint = "; it needs its autoencoder" if model.spec.kind == "latents" else ""
        raise InputError("model", f"must give images, this one gives {model.spec.kind}{hint}")
    check_steps(steps)
    if metrics is not None and (not metrics or not set(metrics) <= set(METRICS)):
        raise InputError("metrics", f"must be among {', '.join(METRICS)}, got {', '.join(metrics) or 'none'}")
    if count < 2:
        raise InputError("count", f"must be at least 2, got {count}")
    if seed < 0:
        raise InputError("seed", f"must not be negative, got {seed}")
    if batch_size < 1:
        raise InputError("batch_size", f"must be at least 1, got {batch_size}")
    check_uint8(uint8)
    sample_labels(model, labels_from, seed)
    if guidance is None:
        return
    low, high = model.guidance if isinstance(model.guidance, tuple) else (model.guidance, model.guidance)
    for weight in guidance:
        if not (low <= weight <= high or math.isclose(weight, low)):
            trained = f"for {low:g} to {high:g}" if low < high else f"at the one weight {low:g}"
            raise InputError("guidance", f"this model was trained {trained}, got {weight:g}")
    if not guidance or len(set(guidance)) < len(guidance):
        raise InputError("guidance", f"must be one or more different weights, got {list(guidance)}")


def _default_guidance(model: TrainedModel) -> list[float]:
    return [model.guidance[1] if isinstance(model.guidance, tuple) else model.guidance]


def _chosen(
    metrics: Sequence[Metric] | None,
    count: int,
    extractor: Extractor,
    sizes: FeatureSizes,
    reference: Reference | None,
) -> tuple[Metric, ...]:
    """The metrics to compute, in the order of `METRICS`; one that was asked for and cannot be is refused."""
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
            lacking["pr"] = "the reference has statistics alone, no images"
        elif len(reference.vectors) <= NEIGHBOURS:
            lacking["pr"] = f"the reference has only {len(reference.vectors)} images"
    if sizes.spatial is None:
        lacking["sfid"] = f"{extractor.name} gives no spatial features"
    if sizes.logits is None:
        lacking["is"] = f"{extractor.name} gives no class probabilities"
    if metrics is None and reference is None:
        raise InputError(
            "reference", "name one; without it only the Inception Score can be computed (metrics is)"
        )
    for name in metrics or ():
        if name in lacking:
            raise InputError("metrics", f"{name} cannot be computed, {lacking[name]}")
    return tuple(name for name in METRICS if name not in lacking and (metrics is None or name in metrics))


def _check_reference(reference: Reference, extractor: Extractor, sizes: FeatureSizes) -> None:
    """Refuse statistics of other features."""
    if len(reference.pooled.mean) != sizes.pooled:
        raise InputError(
            "reference",
            f"holds statistics of {len(reference.pooled.mean)} features, "
            f"{extractor.name} gives {sizes.pooled}",
        )
    theirs, ours = reference.provenance.get("extractor_fingerprint"), extractor.fingerprint
    if theirs is not None and theirs != ours:
        raise InputError(
            "reference", f"was computed with the extractor {theirs[:12]}…, this one is {ours[:12]}…"
        )


def _warnings(
    count: int, sizes: FeatureSizes, reference: Reference | None, chosen: Sequence[Metric]
) -> list[str]:
    """What the reader of a Fréchet distance must know, one line each."""
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


def _figures(
    collected: Collected,
    reference: Reference | None,
    chosen: Sequence[Metric],
    extractor: Extractor,
    device: torch.device,
) -> dict[str, float]:
    figures: dict[str, float] = {}
    if "fid" in chosen and reference is not None:
        name = {"inception": "fid", "dinov2": "fd_dinov2"}.get(extractor.name, "fd")
        figures[name] = frechet_distance(collected.pooled, reference.pooled)
    if "sfid" in chosen and reference is not None and reference.spatial is not None and collected.spatial:
        name = "sfid" if extractor.name == "inception" else "spatial_fd"
        figures[name] = frechet_distance(collected.spatial, reference.spatial)
    if "is" in chosen:
        score = inception_score(collected.logits, SPLITS)
        figures |= {"inception_score": score.mean, "inception_score_std": score.std}
    if "pr" in chosen and reference is not None and reference.vectors is not None:
        shares = precision_recall(collected.vectors, reference.vectors, neighbours=NEIGHBOURS, device=device)
        figures |= {"precision": shares.precision, "recall": shares.recall}
    return figures
