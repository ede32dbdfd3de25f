"""Samples by number: noise and label of sample k depend on (seed, k) only, not on the batch size."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws
from tvmatch.trained_model import TrainedModel

LabelsFrom = Literal["data", "uniform"]
"""Draw labels with the class frequencies of the training data, or uniformly."""

Labels = Callable[[range], list[int] | None]
"""Class numbers of the samples of these numbers; None for a model without classes."""


def labels_in_turn(classes: Sequence[int] | None) -> Labels:
    """Sample k has class k mod K of the K `classes`."""
    if classes is None:
        return lambda numbers: None
    return lambda numbers: [classes[k % len(classes)] for k in numbers]


def sample_labels(model: TrainedModel, labels_from: LabelsFrom | None, seed: int) -> Labels:
    """The class of each sample, by its number.

    Args:
        model: its checkpoint records how many elements of each class it was trained on.
        labels_from: None gives sample k class k mod K; otherwise its class is drawn from (seed, k).
        seed: of the draws.

    Raises:
        InputError: if the model has no classes to draw from, or `labels_from` is "data" and the checkpoint
            does not record the class frequencies.
    """
    count = model.spec.class_count
    if labels_from is None:
        return labels_in_turn(range(count) if count else None)
    if labels_from not in get_args(LabelsFrom):
        raise InputError("labels_from", f"must be {' or '.join(get_args(LabelsFrom))}, got {labels_from!r}")
    if count == 0:
        raise InputError("labels_from", f"this model has no classes, got {labels_from}")
    ends = list(accumulate([1] * count if labels_from == "uniform" else _class_counts(model)))

    def drawn(numbers: range) -> list[int]:
        # Element n of all, sorted by their classes, has the class whose elements end after n.
        places = ends[-1] * RowDraws(seed, "sample").uniform("label", numbers)
        return [bisect_right(ends, int(place)) for place in places]

    return drawn


def _class_counts(model: TrainedModel) -> list[int]:
    counts: Any = model.provenance.get("class_counts")
    if counts is None:
        raise InputError(
            "labels_from",
            "this checkpoint does not record how many elements each class had in training (imported "
            "checkpoints never do); use uniform to draw all classes equally often",
        )
    whole = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not whole or len(counts) != model.spec.class_count or sum(counts) == 0:
        raise InputError(
            "labels_from",
            f"class_counts of the checkpoint must be {model.spec.class_count} whole numbers, not all 0",
        )
    return list(counts)


def numbered_samples(
    model: TrainedModel,
    labels: Labels,
    *,
    steps: int = 1,
    times: Sequence[float] | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Callable[[range], Tensor]:
    """A function that draws the samples of consecutive numbers in one batch."""

    def samples(numbers: range) -> Tensor:
        classes = labels(numbers)
        return model.sample(
            classes,
            count=None if classes else len(numbers),
            first=numbers.start,
            steps=steps,
            times=times,
            guidance=guidance,
            seed=seed,
            batch_size=len(numbers),
        )

    return samples
