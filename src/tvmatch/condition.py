"""What samples are conditioned on: class labels or embeddings, and the guidance weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tvmatch.errors import InputError

Guidance = float | tuple[float, float]
"""A guidance weight w, or the range (low, high) of the weights that a network is trained for."""
MOST_GUIDANCE = 1e6
"""Weights are float32, and the loss divides by w²."""


class Condition(NamedTuple):
    """The condition of B samples. `Condition()` conditions on nothing, at guidance weight 1.

    A network is called with `labels` and `guidance_weight`, and with `embeddings` and `mask` where there are
    embeddings.

    Attributes:
        labels: int64 (B,), the class count for a dropped label. None: no labels, or all are dropped.
        guidance_weight: (B,) w. None means 1 for all.
        embeddings: (B, L, D), L vectors a sample, such as the tokens of a text. None: no embeddings, or all
            are dropped.
        mask: bool (B, L), False for vectors that do not count; a sample without any has its embeddings
            dropped. None: all count.
    """

    labels: Tensor | None = None
    guidance_weight: Tensor | None = None
    embeddings: Tensor | None = None
    mask: Tensor | None = None

    def rows(self, which: slice | Tensor) -> "Condition":
        """The condition of some of the samples."""
        return Condition(*(None if x is None else x[which] for x in self))

    def to(self, device: torch.device | str) -> "Condition":
        """The same on another device."""
        return Condition(*(None if x is None else x.to(device) for x in self))

    def drop(self, dropped: Tensor, null_label: int) -> "Condition":
        """Labels and embeddings dropped, with weight 1, where `dropped`, bool (B,), is true.

        Args:
            dropped: which samples.
            null_label: the number of a dropped label: the class count.
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
        """Labels and embeddings dropped for all samples, at weight 1."""
        weight = self.guidance_weight
        return Condition(guidance_weight=None if weight is None else torch.ones_like(weight))

    @property
    def is_unconditional(self) -> bool:
        """Whether there are neither labels nor embeddings."""
        return self.labels is None and self.embeddings is None

    def embedding_arguments(self) -> dict[str, Any]:
        """A network's keyword arguments besides `labels` and `guidance_weight`: none without embeddings."""
        return {} if self.embeddings is None else {"embeddings": self.embeddings, "mask": self.mask}

    def check(self, x: Tensor) -> None:
        """Refuse a condition that is not one of the samples x, (B, ...). Values are not read.

        Raises:
            InputError: naming what has another shape, dtype or device.
        """
        expect_per_sample(x, labels=self.labels, guidance_weight=self.guidance_weight)
        if self.embeddings is None:
            if self.mask is not None:
                raise InputError("mask", "there are no embeddings that it is for")
            return
        for name, value in (("embeddings", self.embeddings), ("mask", self.mask)):
            if value is not None and not isinstance(value, Tensor):
                raise InputError(name, f"must be a tensor, got {type(value).__name__}")
        sizes = self.embeddings.shape[1:]
        _expect_vectors("embeddings", self.embeddings, x, sizes, 3, torch.is_floating_point)
        if self.mask is not None:
            _expect_vectors("mask", self.mask, x, sizes[:1], 2, lambda mask: mask.dtype == torch.bool)


def as_condition(labels: Tensor | Condition | None, guidance_weight: Tensor | None = None) -> Condition:
    """Labels (B,), or None, and a guidance weight as a `Condition`; a `Condition` is returned as it is.

    Raises:
        InputError: if a weight is given beside a `Condition`, which has its own.
    """
    if not isinstance(labels, Condition):
        return Condition(labels, guidance_weight)
    if guidance_weight is not None:
        raise InputError("guidance_weight", "give it within the Condition")
    return labels


def expect_per_sample(x: Tensor, **arguments: Tensor | None) -> None:
    """Refuse what is not a number for each sample of x (B, ...), on its device. Values are not looked at.

    Args:
        x: a batch.
        arguments: by name; None passes. `labels` are int64 or int32, all others floating-point.

    Raises:
        InputError: naming the argument.
    """
    for name, numbers in arguments.items():
        if numbers is None:
            continue
        if not isinstance(numbers, Tensor):
            raise InputError(name, f"a tensor is needed, got a {type(numbers).__name__}")
        if numbers.shape != x.shape[:1]:
            raise InputError(
                name,
                f"the shape ({x.shape[0] if x.ndim else 'B'},) is needed, a number for each sample, "
                f"got {tuple(numbers.shape)}",
            )
        labels = name == "labels"
        if not (numbers.dtype in (torch.int64, torch.int32) if labels else numbers.is_floating_point()):
            kind = "the dtype int64" if labels else "a floating-point dtype"
            raise InputError(name, f"{kind} is needed, got {numbers.dtype}")
        if numbers.device != x.device:
            raise InputError(name, f"the device {x.device} of the data is needed, got {numbers.device}")


def _expect_vectors(
    name: str,
    given: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    dimensions: int,
    has_right_dtype: Callable[[Tensor], bool],
) -> None:
    """Refuse what is not of shape (B, *shape) on x's device."""
    if given.ndim != dimensions or given.shape != (x.shape[0], *shape):
        needed = ", ".join(map(str, (x.shape[0], *shape) if dimensions == 2 else (x.shape[0], "L", "D")))
        raise InputError(name, f"the shape ({needed}) is needed, got {tuple(given.shape)}")
    if not has_right_dtype(given):
        kind = "bool" if dimensions == 2 else "floating-point"
        raise InputError(name, f"a {kind} dtype is needed, got {given.dtype}")
    if given.device != x.device:
        raise InputError(name, f"the device {x.device} of the data is needed, got {given.device}")
