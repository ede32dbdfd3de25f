"""Samples by their numbers: sample k has noise and label of its own, however many are drawn at a time."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, get_args

from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws
from tvmatch.trained_model import TrainedModel

LabelsFrom = Literal["data", "uniform"]
"""Labels drawn at random: as often as in the training data, or all classes alike."""

Labels = Callable[[range], list[int] | None]
"""Class numbers of the samples of these numbers; None for a model without classes."""


def labels_in_turn(classes: Sequence[int] | None) -> Labels:
    """Sample k has class k mod K of `classes`, K being their number."""
    if classes is None:
        return lambda numbers: None
    return lambda numbers: [classes[k % len(classes)] for k in numbers]


def sample_labels(model: TrainedModel, labels_from: LabelsFrom | None, seed: int) -> Labels:
    """Which class each sample has.

    Args:
        model: its checkpoint records how many elements of each class it was trained on.
        labels_from: None gives sample k the class k mod K; else it is drawn for (seed, k) alone.
        seed: of the draws.

    Raises:
        InputError: if labels are to be drawn for a model without classes, or as in data of which the
            checkpoint does not say how many elements each class has.
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
            "this checkpoint does not record how many elements each class had in training (nor "
            "do imported ones and those of earlier versions); uniform draws all classes alike",
        )
    whole = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not whole or len(counts) != model.spec.class_count or sum(counts) == 0:
        raise InputError(
            "labels_from",
            "the class_counts of the checkpoint are no numbers of elements of "
            f"{model.spec.class_count} classes",
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
    """A function that draws the samples of consecutive numbers, all of them at a time."""

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
