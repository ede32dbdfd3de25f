"""The interface of data sets, and the order in which training sees their elements.

Shapes: `B` elements of a batch, `C` channels, `H` rows, `W` columns.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tvmatch.condition import Condition
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws, generator


class Batch(NamedTuple):
    """Elements of a data set in data units.

    Attributes:
        values: float32 of shape (B, *spec.shape); images lie in [0, 1].
        labels: int64 class numbers of shape (B,), or None for data without classes.
        embeddings: float32 (B, L, spec.embedding_size), or None for data without embeddings.
        mask: bool (B, L), False for vectors to ignore; None if none is ignored.
    """

    values: Tensor
    labels: Tensor | None = None
    embeddings: Tensor | None = None
    mask: Tensor | None = None

    @property
    def condition(self) -> Condition:
        """The condition of the elements, for the network."""
        return Condition(self.labels, embeddings=self.embeddings, mask=self.mask)


class Dataset(Protocol):
    """A source of batches, each a pure function of the arguments.

    Training step k calls `batch(k, size, seed)`. A resumed run therefore sees the same data as an
    uninterrupted one without saved state, and any worker process can compute any step.
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
            InputError: `count` is less than 1 or exceeds the number of elements.
        """
        ...


def checked_batch(batch: Batch | tuple[Tensor, Tensor | None], dataset: Dataset, size: int) -> Batch:
    """Check that the batch of a training step is a `Batch` that fits the data set's `spec`.

    A batch may be shorter than `size`, like the last one of an epoch. Values may be non-finite.

    Raises:
        InputError: it does not; names the data set.
    """
    spec, name = dataset.spec, f"{type(dataset).__name__}.batch"
    try:
        values, labels, embeddings, mask = Batch(*batch)
    except (TypeError, ValueError):
        raise InputError(
            name, f"must return a Batch of values and labels, got {type(batch).__name__}"
        ) from None
    _check_tensor(name, "values", values, torch.float32, spec.shape)
    if not 1 <= len(values) <= size:
        raise InputError(name, f"{size} elements were asked for, it returned {len(values)}")
    if (embeddings is None) != (spec.embedding_size is None):
        raise InputError(
            name,
            f"spec has embedding_size {spec.embedding_size}, but "
            f"{'none' if embeddings is None else 'some'} of its elements have embeddings",
        )
    if embeddings is not None:
        try:
            Condition(embeddings=embeddings, mask=mask).check(values)
        except InputError as error:
            raise error.within(name) from None
        if embeddings.shape[2] != spec.embedding_size:
            raise InputError(
                name, f"embeddings of size {spec.embedding_size} are needed, got {embeddings.shape[2]}"
            )
    if (labels is None) != (spec.class_count == 0):
        given = "none" if labels is None else "some"
        raise InputError(
            name, f"spec has {spec.class_count} classes, but {given} of its elements have labels"
        )
    if labels is None:
        return Batch(values, None, embeddings, mask)
    _check_tensor(name, "labels", labels, torch.int64, ())
    if len(labels) != len(values):
        raise InputError(name, f"it returned {len(labels)} labels for {len(values)} elements")
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= spec.class_count:
        hint = "; classes are numbered from 0" if low > 0 and high == spec.class_count else ""
        raise InputError(
            name, f"labels must lie in 0 … {spec.class_count - 1}, got {low if low < 0 else high}{hint}"
        )
    return Batch(values, labels, embeddings, mask)


def _check_tensor(
    subject: str, name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    expected = f"must be a {dtype} tensor of shape ({', '.join(map(str, ('B', *shape)))}) on the CPU"
    if not isinstance(tensor, Tensor):
        raise InputError(subject, f"{name} {expected}, got {type(tensor).__name__}")
    fits = tensor.ndim > 0 and tensor.shape[1:] == shape
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu":
        raise InputError(
            subject,
            f"{name} {expected}, got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}",
        )


def _permutation(length: int, random: torch.Generator) -> Tensor:
    return torch.randperm(length, dtype=torch.int64, device="cpu", generator=random)


@lru_cache(maxsize=4)
def _epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    return _permutation(length, generator(seed, "order", epoch))


def epoch_indices(length: int, step: int, size: int, seed: int) -> Tensor:
    """Indices of the elements of training step `step`; each epoch contains every element exactly once.

    Sample n = step · size + i (i = 0 … size − 1) is element n mod length of the permutation of
    (seed, epoch n // length). A batch may span epochs and may be larger than the data set.

    Returns:
        int64 tensor of shape (size,) with values in 0 … length − 1.

    Raises:
        ValueError: `length` or `size` is less than 1, or `step` is negative.
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
    """`count` distinct indices, int64 of shape (count,), in random order.

    Raises:
        InputError: `count` is not within 1 … length.
    """
    if not 1 <= count <= length:
        raise InputError("count", f"{count} elements were asked for, the data set has {length}")
    return _permutation(length, generator(seed, "take"))[:count]


def mirrored_at_random(rows: range, step: int, seed: int) -> Tensor:
    """Whether to mirror each image, with probability 1/2: bool (len(rows),), drawn for (seed, step, row)."""
    return RowDraws(seed, "step", step).uniform("flip", rows) < 0.5


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Attributes `crop` and `class_counts` of a data set, which checkpoints record for evaluations.

    Returns:
        "crop": how its images were cropped, see `data.images.pixels.Crop`; "class_counts": the number of
        elements of each class. An attribute that is missing or None is left out.
    """
    facts = {name: getattr(dataset, name, None) for name in ("crop", "class_counts")}
    return {name: fact for name, fact in facts.items() if fact is not None}


class StoredDataset(ABC):
    """`batch` and `take` for data sets with indexed elements; a subclass reads the elements.

    Args:
        spec: of the elements.
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
        """The elements of these indices, not mirrored."""

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The elements of training step `step`, mirrored at random if configured; see `Dataset.batch`."""
        batch = self._select(epoch_indices(len(self), step, size, seed))
        if not self._horizontal_flip:
            return batch
        mirrored = mirrored_at_random(range(size), step, seed).view(-1, 1, 1, 1)
        return batch._replace(values=torch.where(mirrored, batch.values.flip(-1), batch.values))

    def take(self, count: int, seed: int) -> Batch:
        """`count` distinct random elements, never mirrored; see `Dataset.take`."""
        return self._select(distinct_indices(len(self), count, seed))
