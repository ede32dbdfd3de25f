"""What every data set offers, and the order in which training sees its elements.

Shapes: `B` elements of a batch, `C` channels, `H` rows, `W` columns.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.seeds import generator


class Batch(NamedTuple):
    """Elements of a data set in data units.

    Attributes:
        values: float32 of shape (B, *spec.shape); images lie in [0, 1].
        labels: int64 class numbers of shape (B,), or None for unconditional data.
    """

    values: Tensor
    labels: Tensor | None


class Dataset(Protocol):
    """A source of batches whose every draw is a pure function of the arguments.

    Training step k asks for `batch(k, size, seed)` and nothing else, so a resumed run sees the same data
    as an uninterrupted one without any saved state, and a `DataLoader` may compute steps in any process.
    """

    @property
    def spec(self) -> DataSpec:
        """Shape, classes and normalisation of the elements."""
        ...

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The `size` training elements of step `step` (0, 1, …)."""
        ...

    def take(self, count: int, seed: int) -> Batch:
        """`count` distinct random elements, without augmentation, for evaluation.

        Raises:
            InputError: if `count` < 1, or more than there are.
        """
        ...


def checked_labels(batch: Batch, spec: DataSpec) -> Batch:
    """The batch, if its labels are what its data set says; a label K would be taken for a dropped one.

    Raises:
        InputError: labels without classes or the other way round, not one integer an element, or outside
            0 … K − 1.
    """
    labels, count = batch.labels, spec.class_count
    if labels is None and count == 0:
        return batch
    if labels is None:
        raise InputError("data: the data set has class_names, but no labels")
    if count == 0:
        raise InputError("data: the data set has labels, but its spec no class_names")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"data: labels must be integers, the data set gives {labels.dtype}")
    if labels.shape != batch.values.shape[:1]:
        raise InputError(
            f"data: there must be a label for each of {len(batch.values)} elements, the data set gives "
            f"labels of shape {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        hint = "; classes are numbered from 0" if low > 0 and high == count else ""
        wrong = low if low < 0 else high
        raise InputError(f"data: the data set gives label {wrong}, which is outside 0 … {count - 1}{hint}")
    return batch


@lru_cache(maxsize=4)
def _epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(length, generator=generator(seed, "order", epoch))


def epoch_indices(length: int, step: int, size: int, seed: int) -> Tensor:
    """Which elements training step `step` uses: every element exactly once an epoch.

    Sample number n = step · size + i (i = 0 … size − 1) is element number n mod length of the permutation
    that belongs to (seed, epoch n // length). A batch may reach into the next epoch and may be larger than
    the data set.

    Returns:
        int64 tensor of shape (size,) with values in 0 … length − 1.

    Raises:
        ValueError: if `length` or `size` is less than 1, or `step` is negative.
    """
    if length < 1 or size < 1 or step < 0:
        raise ValueError(f"need length >= 1, size >= 1 and step >= 0, got {length}, {size} and {step}")
    first, last = step * size, (step + 1) * size
    parts = []
    for epoch in range(first // length, (last - 1) // length + 1):
        start = epoch * length
        parts.append(_epoch_order(length, seed, epoch)[max(first - start, 0) : last - start])
    return torch.cat(parts)


def distinct_indices(length: int, count: int, seed: int) -> Tensor:
    """`count` different element numbers, int64 of shape (count,), in random order.

    Raises:
        InputError: if `count` is not within 1 … length.
    """
    if not 1 <= count <= length:
        raise InputError(f"count: {count} elements were asked for, the data set has {length}")
    return torch.randperm(length, generator=generator(seed, "take"))[:count]


def mirrored_at_random(count: int, step: int, seed: int) -> Tensor:
    """Which images of a step to mirror, each with probability 1/2: bool (count,), drawn for (seed, step)."""
    return torch.rand(count, generator=generator(seed, "flip", step)) < 0.5


def flip_at_random(images: Tensor, step: int, seed: int) -> Tensor:
    """Mirror each image of (B, C, H, W) left to right with probability 1/2, drawn for (seed, step)."""
    mirrored = mirrored_at_random(len(images), step, seed)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


class StoredDataset(ABC):
    """`batch` and `take` of a data set with numbered elements; a subclass says how to read them.

    Args:
        spec: what the elements are.
        horizontal_flip: mirror each training image with probability 1/2.
    """

    def __init__(self, spec: DataSpec, *, horizontal_flip: bool) -> None:
        self.spec = spec
        self._horizontal_flip = horizontal_flip

    @abstractmethod
    def __len__(self) -> int:
        """Number of elements."""

    @abstractmethod
    def _select(self, indices: Tensor) -> Batch:
        """The elements of these numbers, unmirrored."""

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The elements of training step `step`, mirrored at random if asked; see `Dataset.batch`."""
        batch = self._select(epoch_indices(len(self), step, size, seed))
        values = flip_at_random(batch.values, step, seed) if self._horizontal_flip else batch.values
        return Batch(values, batch.labels)

    def take(self, count: int, seed: int) -> Batch:
        """`count` distinct random elements, never mirrored; see `Dataset.take`."""
        return self._select(distinct_indices(len(self), count, seed))
