"""A data set held in memory as tensors: a user's own, or the bundled digits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tvmatch.data.base import Batch, StoredDataset
from tvmatch.data.facts import count_classes
from tvmatch.data.found import lines_of_findings
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError


class TensorDataset(StoredDataset):
    """Images or points given as one tensor.

    Args:
        values: images (N, C, H, W), floating point in [0, 1] or uint8 in 0 … 255 (kept as bytes and divided
            by 255 when used), or points (N, D) of any finite size.
        labels: N class numbers 0 … K − 1 (an integer tensor or a sequence), or None for unconditional data.
        class_names: one name a class; without it the classes are called "0" … "K − 1", K − 1 being the
            largest label.
        horizontal_flip: mirror each training image with probability 1/2.
        mean: per channel or coordinate in data units; by default 0.5 for images and 0 for points.
        std: likewise; by default 0.5 for images, so that the network sees [−1, 1], and 1 for points.

    Attributes:
        findings: what there is, for people: a line on elements and classes, and one on classes without any.

    Raises:
        InputError: values that are empty, of another shape or type, non-finite or outside [0, 1]; labels
            of another number, type or range; names without labels; flips of points.
    """

    def __init__(
        self,
        values: Tensor,
        labels: Tensor | Sequence[int] | None = None,
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
            raise InputError("horizontal_flip: only images can be mirrored, these are points")
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
        return None if self._labels is None else count_classes(self._labels, self.spec.class_count)

    def __len__(self) -> int:
        """Number of elements."""
        return len(self._values)

    def _select(self, indices: Tensor) -> Batch:
        values = self._values[indices]
        values = values.float().div_(255) if values.dtype == torch.uint8 else values
        return Batch(values, None if self._labels is None else self._labels[indices])


def _checked_values(values: Tensor) -> Tensor:
    """The values on the CPU, as uint8 or float32, or an `InputError` that says what is wrong with them."""
    if not isinstance(values, Tensor):
        raise InputError(f"values: must be a torch.Tensor, got {type(values).__name__}")
    if values.ndim not in (2, 4):
        raise InputError(
            f"values: must be (N, C, H, W) images or (N, D) points, got shape {tuple(values.shape)}"
        )
    if values.numel() == 0:
        raise InputError(f"values: there are no elements, the shape is {tuple(values.shape)}")
    values = values.detach().cpu()
    if values.dtype == torch.uint8 and values.ndim == 4:
        return values
    if not values.is_floating_point():
        raise InputError(f"values: must be floating point, or uint8 for images, got {values.dtype}")
    values = values.float()  # before the checks: a float64 may overflow in float32
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        raise InputError(f"values: element {int(finite.int().argmin())} holds a number that is not finite")
    low, high = values.aminmax()
    if values.ndim == 4 and (low < 0 or high > 1):
        raise InputError(f"values: pixels must lie in [0, 1], they lie in [{low.item():g}, {high.item():g}]")
    return values


def _checked_labels(
    labels: Tensor | Sequence[int] | None, class_names: Sequence[str] | None, count: int
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as int64 of shape (count,) and the names of the classes, or an `InputError`."""
    if labels is None:
        if class_names is not None:
            raise InputError("class_names: there are names but no labels")
        return None, None
    labels = (labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")).detach().cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels: must be integers, got {labels.dtype}")
    if labels.shape != (count,):
        raise InputError(
            f"labels: there must be one for each of the {count} elements, got shape {tuple(labels.shape)}"
        )
    labels = labels.long()
    low, high = int(labels.min()), int(labels.max())
    names = tuple(str(number) for number in range(high + 1)) if class_names is None else tuple(class_names)
    if low < 0 or high >= len(names):
        wrong = low if low < 0 else high
        allowed = f"outside 0 … {len(names) - 1}" if class_names is not None else "negative"
        raise InputError(f"labels: {wrong} is {allowed}")
    return labels, names
