"""A data set in memory, made of tensors."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tvmatch.data.base import Batch, StoredDataset
from tvmatch.data.findings import lines_of_findings
from tvmatch.data.spec import MOST_CLASSES, DataSpec
from tvmatch.errors import InputError, one_line

Labels = Tensor | Sequence[int] | NDArray[np.integer[Any]]


class TensorDataset(StoredDataset):
    """Images or points given as one tensor.

    Args:
        values: images (N, C, H, W), floating point in [0, 1] or uint8 in 0 … 255 (kept as bytes and divided
            by 255 when used), or points (N, D) of any finite size.
        labels: N class numbers 0 … K − 1 (an integer tensor or array, or a sequence), or None for
            unconditional data.
        class_names: one name per class; by default "0" … "K − 1", where K − 1 is the largest label.
        horizontal_flip: mirror each training image with probability 1/2.
        mean: per channel or coordinate in data units; by default 0.5 for images and 0 for points.
        std: per channel or coordinate in data units; by default 0.5 for images, so that the network sees
            [−1, 1], and 1 for points.

    Attributes:
        findings: lines about elements and classes, and about classes without elements.

    Raises:
        InputError: values are empty, of another shape or type, non-finite or outside [0, 1]; labels have
            another number, type or range; there are names without labels, or flips of points.
    """

    def __init__(
        self,
        values: Tensor,
        labels: Labels | None = None,
        *,
        class_names: Sequence[str] | None = None,
        horizontal_flip: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self._values = _checked_values(values)
        self._labels, names = _checked_labels(labels, class_names, len(values))
        image = values.ndim == 4
        if horizontal_flip and not image:
            raise InputError("horizontal_flip", "only images can be mirrored, these are points")
        size = values.shape[1]
        spec = DataSpec(
            kind="image" if image else "points",
            shape=tuple(values.shape[1:]),
            class_names=names,
            mean=tuple(mean) if mean is not None else (0.5 if image else 0.0,) * size,
            std=tuple(std) if std is not None else (0.5 if image else 1.0,) * size,
        )
        super().__init__(spec, horizontal_flip=horizontal_flip)
        numbers = None if self._labels is None else self._labels.numpy()
        self.findings = lines_of_findings(
            "data", len(self), names, numbers, unit="images" if image else "points"
        )

    @property
    def class_counts(self) -> list[int] | None:
        """Elements of each class; None without labels."""
        if self._labels is None:
            return None
        return torch.bincount(self._labels, minlength=self.spec.class_count).tolist()

    def __len__(self) -> int:
        """Number of elements."""
        return len(self._values)

    def _select(self, indices: Tensor) -> Batch:
        values = self._values[indices]
        values = values.float().div_(255) if values.dtype == torch.uint8 else values
        return Batch(values, None if self._labels is None else self._labels[indices])


def _checked_values(values: Tensor) -> Tensor:
    """The values on the CPU, as uint8 or float32; raises an `InputError` if they are invalid."""
    if not isinstance(values, Tensor):
        raise InputError("values", f"must be a torch.Tensor, got {type(values).__name__}")
    if values.ndim not in (2, 4):
        raise InputError(
            "values", f"must be (N, C, H, W) images or (N, D) points, got shape {tuple(values.shape)}"
        )
    if values.numel() == 0:
        raise InputError("values", f"there are no elements, the shape is {tuple(values.shape)}")
    values = values.detach().cpu()
    if values.dtype == torch.uint8 and values.ndim == 4:
        return values
    if not values.is_floating_point():
        raise InputError("values", f"must be floating point, or uint8 for images, got {values.dtype}")
    values = values.float()  # before the checks, as float64 may overflow
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        raise InputError("values", f"element {int(finite.int().argmin())} holds a number that is not finite")
    low, high = values.aminmax()
    if values.ndim == 4 and (low < 0 or high > 1):
        raise InputError(
            "values", f"pixels must lie in [0, 1], they lie in [{low.item():g}, {high.item():g}]"
        )
    return values


def _checked_labels(
    labels: Labels | None, class_names: Sequence[str] | None, count: int
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as int64 of shape (count,) and class names; raises an `InputError` if they are invalid."""
    if labels is None:
        if class_names is not None:
            raise InputError("class_names", "there are names but no labels")
        return None, None
    if class_names is not None:
        # The order of a mapping from names to numbers, or of a set, may differ from that of the numbers.
        if isinstance(class_names, str | bytes | Mapping | Set) or not isinstance(class_names, Iterable):
            raise InputError("class_names", f"must be one name per class, got {reprlib.repr(class_names)}")
        class_names = tuple(class_names)
        if not class_names:
            raise InputError("class_names", "there are labels but no names")
    numbers = _class_numbers(labels)
    if numbers.shape != (count,):
        raise InputError(
            "labels", f"there must be one for each of the {count} elements, got shape {tuple(numbers.shape)}"
        )
    low, high = int(numbers.min()), int(numbers.max())
    most = MOST_CLASSES if class_names is None else len(class_names)
    if low < 0 or high >= most:
        wrong = low if low < 0 else high
        raise InputError("labels", f"{wrong} is {'negative' if wrong < 0 else f'outside 0 … {most - 1}'}")
    names = tuple(str(number) for number in range(high + 1)) if class_names is None else class_names
    return numbers, names


def _class_numbers(labels: Labels) -> Tensor:
    """Labels as int64 on the CPU."""
    try:
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    except (TypeError, ValueError) as error:  # lists of several lengths, or a type that NumPy lacks
        raise InputError("labels", f"must be integers, one per element ({one_line(error)})") from None
    if array.dtype.kind not in "iu":  # of objects, 1.5 would become 1
        raise InputError("labels", f"must be integers, one per element, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))
