"""`Condition`: class labels or embeddings, and the guidance weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvmatch.errors import InputError

Guidance = float | tuple[float, float]
"""A guidance weight w, or the range (low, high) of weights that a network is trained for."""
MOST_GUIDANCE = 1e6
"""Weights are float32, and the loss divides by w²."""


class Condition(NamedTuple):
    """The condition of B samples. `Condition()` is unconditional, with guidance weight 1.

    Networks are called with `labels` and `guidance_weight`, and with `embeddings` and `mask` if given.

    Attributes:
        labels: int64 (B,), the class count for a dropped label. None: no labels, or all are dropped.
        guidance_weight: (B,) w. None means 1 for all samples.
        embeddings: (B, L, D), such as L text tokens per sample. None: no embeddings, or all are dropped.
        mask: bool (B, L), False for vectors that are ignored; if all vectors of a sample are ignored, its
            embeddings are dropped. None: no vector is ignored.
    """

    labels: Tensor | None = None
    guidance_weight: Tensor | None = None
    embeddings: Tensor | None = None
    mask: Tensor | None = None

    def rows(self, which: slice | Tensor) -> "Condition":
        """The condition of a subset of the samples."""
        return Condition(*(None if x is None else x[which] for x in self))

    def to(self, device: torch.device | str) -> "Condition":
        """The condition on another device."""
        return Condition(*(None if x is None else x.to(device) for x in self))

    def drop(self, dropped: Tensor, null_label: int) -> "Condition":
        """Drop labels and embeddings of some samples, and set their weight to 1.

        Args:
            dropped: bool (B,), True for these samples.
            null_label: the number of the dropped label, which is the class count.
        """
        labels, weight, embeddings, mask = self
        if labels is not None:
            labels = torch.where(dropped, null_label, labels)
        if weight is not None:
            weight = torch.where(dropped, 1.0, weight)
        if embeddings is not None:
            if mask is None:
                mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            mask = mask & ~dropped[:, None]
        return Condition(labels, weight, embeddings, mask)

    def unconditional(self) -> "Condition":
        """Drop labels and embeddings of all samples, and set their weight to 1."""
        weight = self.guidance_weight
        return Condition(guidance_weight=None if weight is None else torch.ones_like(weight))

    @property
    def is_unconditional(self) -> bool:
        """Whether there are neither labels nor embeddings."""
        return self.labels is None and self.embeddings is None

    def embedding_arguments(self) -> dict[str, Any]:
        """Further keyword arguments of a network: `embeddings` and `mask` if there are embeddings."""
        return {} if self.embeddings is None else {"embeddings": self.embeddings, "mask": self.mask}

    def check(self, x: Tensor) -> None:
        """Check shape, dtype and device for samples x, (B, ...). Values are not read.

        Raises:
            InputError: naming the field that is wrong.
        """
        expect_per_sample(x, labels=self.labels, guidance_weight=self.guidance_weight)
        if self.embeddings is None:
            if self.mask is not None:
                raise InputError("mask", "needs embeddings, got None")
            return
        _expect("embeddings", self.embeddings, x, ("L", "D"), "a floating-point")
        if self.mask is not None:
            _expect("mask", self.mask, x, (self.embeddings.shape[1],), "a bool")


def as_condition(labels: Tensor | Condition | None, guidance_weight: Tensor | None = None) -> Condition:
    """A `Condition` from labels (B,) or None and a guidance weight; a `Condition` is returned unchanged.

    Raises:
        InputError: if a weight is given in addition to a `Condition`, which contains it.
    """
    if not isinstance(labels, Condition):
        return Condition(labels, guidance_weight)
    if guidance_weight is not None:
        raise InputError("guidance_weight", "must be part of the Condition")
    return labels


def expect_per_sample(x: Tensor, **arguments: Tensor | None) -> None:
    """Check that arguments hold one number per sample of x (B, ...), on its device. Values are not read.

    Args:
        x: a batch.
        arguments: by name; None is accepted. `labels` are int64 or int32, all others floating-point.

    Raises:
        InputError: naming the argument.
    """
    for name, numbers in arguments.items():
        if numbers is not None:
            _expect(name, numbers, x, (), "an int64" if name == "labels" else "a floating-point")


_DTYPES: dict[str, Callable[[torch.dtype], bool]] = {
    "an int64": lambda dtype: dtype in (torch.int64, torch.int32),
    "a bool": lambda dtype: dtype == torch.bool,
    "a floating-point": lambda dtype: dtype.is_floating_point,
}


def _expect(name: str, given: Tensor, x: Tensor, sizes: tuple[int | str, ...], kind: str) -> None:
    """Check that `given` is a tensor (B, *sizes) of a kind of dtype on x's device; a str is any size."""
    if not isinstance(given, Tensor):
        raise InputError(name, f"a tensor is needed, got a {type(given).__name__}")
    shape = (*(x.shape[:1] or ("B",)), *sizes)
    pairs = zip(given.shape, shape, strict=False)
    if given.ndim != len(shape) or any(size != needed for size, needed in pairs if needed not in ("L", "D")):
        needed = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        raise InputError(name, f"the shape {needed} is needed, got {tuple(given.shape)}")
    if not _DTYPES[kind](given.dtype):
        raise InputError(name, f"{kind} dtype is needed, got {given.dtype}")
    if given.device != x.device:
        raise InputError(name, f"the device {x.device} of the data is needed, got {given.device}")
