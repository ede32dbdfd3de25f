"""Description of a data set, shared by training, sampling and checkpoints."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tvmatch.errors import InputError

# Means and deviations published with five digits are accurate to 1e-6 standard deviations; bfloat16 to 2e-3.
ROUNDING = 1e-5  # standard deviations
MOST_CLASSES = 100_000  # for labels without class names, where one wrong label would add many classes


def agree(numbers: Sequence[float], others: Sequence[float], std: Sequence[float]) -> bool:
    """Whether two means, or two standard deviations, are equal up to rounding to five digits.

    Args:
        numbers: per channel.
        others: per channel.
        std: standard deviation per channel, the unit of the tolerance.
    """
    if not len(numbers) == len(others) == len(std):
        return False
    return all(abs(x - y) <= ROUNDING * scale for x, y, scale in zip(numbers, others, std, strict=True))


@dataclass(frozen=True)
class AutoencoderInfo:
    """Identifies the autoencoder of latents.

    Attributes:
        source: the folder or the name on the Hugging Face Hub that it was loaded from.
        fingerprint: SHA-256 of its weights (`Autoencoder.fingerprint`); "" for a model that was imported
            without its autoencoder, which then cannot be checked.
        image_shape: (C, H, W) of the images.
    """

    source: str
    fingerprint: str
    image_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise InputError("image_shape", f"must be three positive sizes, got {self.image_shape}")


@dataclass(frozen=True)
class DataSpec:
    """Shape, classes and normalisation of a data set.

    Attributes:
        kind: "image" for pixels in [0, 1], "points" for unbounded vectors, "latents" for images encoded by
            an autoencoder, without a scaling factor.
        shape: of one element, (C, H, W) for images and latents, (D,) for points.
        class_names: in the order of the class numbers; None without labels.
        mean: per channel (images, latents) or coordinate (points), in data units.
        std: per channel or coordinate, in data units; the network sees (data − mean) / std.
        autoencoder: of latents; None for other data.
        embedding_size: D of the elements' embeddings (B, L, D); None without embeddings.
    """

    kind: Literal["image", "points", "latents"]
    shape: tuple[int, ...]
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder: AutoencoderInfo | None = None
    embedding_size: int | None = None

    def __post_init__(self) -> None:
        expected_rank = {"image": 3, "points": 1, "latents": 3}[self.kind]
        if len(self.shape) != expected_rank or min(self.shape) < 1:
            raise InputError(
                f"shape of {self.kind} data must have {expected_rank} positive sizes, got {self.shape}"
            )
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0]:
            raise InputError(
                f"mean and std must have one number for each of {self.shape[0]} channels, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(number) for number in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise InputError(f"mean must be finite and std positive, got {self.mean} and {self.std}")
        if self.class_names is not None and (
            isinstance(self.class_names, str) or not all(isinstance(name, str) for name in self.class_names)
        ):
            raise InputError(f"class names must be text, got {self.class_names!r:.200}")
        if self.class_names is not None and (
            not self.class_names or len(set(self.class_names)) < self.class_count
        ):
            raise InputError(f"class names must be distinct and not empty, got {self.class_names}")
        if self.embedding_size is not None and self.embedding_size < 1:
            raise InputError("embedding_size", f"must be at least 1, got {self.embedding_size}")
        if (self.kind == "latents") != (self.autoencoder is not None):
            raise InputError("autoencoder", f"must be given for latents only, this is {self.kind} data")

    def describe(self) -> dict[str, Any]:
        """Plain values for JSON, to be read by `from_description`."""
        content = asdict(self)
        return {
            name: value
            for name, value in content.items()
            if value is not None or name not in ("autoencoder", "embedding_size")
        }

    @classmethod
    def from_description(cls, content: Mapping[str, Any]) -> "DataSpec":
        """The spec of a description.

        Raises:
            InputError, KeyError, TypeError, ValueError, AttributeError: the description is invalid.
        """
        values: dict[str, Any] = {name: _tuple(x) for name, x in content.items()}
        if values.get("autoencoder") is not None:
            autoencoder = {name: _tuple(x) for name, x in values["autoencoder"].items()}
            values["autoencoder"] = AutoencoderInfo(**autoencoder)
        return cls(**values)

    @property
    def is_conditional(self) -> bool:
        """Whether elements have labels or embeddings."""
        return self.class_count > 0 or self.embedding_size is not None

    @property
    def class_count(self) -> int:
        """Number of classes, 0 without labels."""
        return 0 if self.class_names is None else len(self.class_names)

    def _per_channel(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(
            -1, *[1] * (len(self.shape) - 1)
        )

    def normalize(self, data: Tensor) -> Tensor:
        """Data units to network units: (data − mean) / std, shape (B, *shape)."""
        return (data - self._per_channel(self.mean, data)) / self._per_channel(self.std, data)

    def denormalize(self, values: Tensor) -> Tensor:
        """Network units to data units: values · std + mean, shape (B, *shape)."""
        return values * self._per_channel(self.std, values) + self._per_channel(self.mean, values)

    def label_indices(self, labels: Sequence[int | str]) -> Tensor:
        """Class numbers of names or numbers, int64 of shape (len(labels),).

        A text is first compared with the class names, then without surrounding blanks, then read as a number.

        Raises:
            InputError: an unknown name, a number outside 0 … K − 1, or data without classes.
        """
        if self.class_names is None:
            raise InputError("labels", f"this model has no classes, got {list(labels)[:3]}")
        return torch.tensor([self._label_index(label) for label in labels], dtype=torch.int64, device="cpu")

    def sample_labels(
        self, labels: int | str | Sequence[int | str] | None, count: int | None
    ) -> tuple[Tensor | None, int]:
        """Class number of each sample, None for data without classes; and the number of samples.

        Raises:
            InputError: as in `label_indices`, or `count` is less than 1 or differs from the number of labels.
        """
        if count is not None and count < 1:
            raise InputError("count", f"must be at least 1, got {count}")
        if labels is None:
            if self.class_names is None:
                return None, 16 if count is None else count
            count = self.class_count if count is None else count
            return torch.arange(count, device="cpu") % self.class_count, count
        if isinstance(labels, int | str | np.integer):
            labels = [labels] * (1 if count is None else count)
        classes = self.label_indices(list(labels))
        if len(classes) == 0:
            raise InputError("labels", "the list is empty")
        if count is not None and count != len(classes):
            raise InputError("count", f"{count} samples for {len(classes)} labels")
        return classes, len(classes)

    def labels_in(self, text: str) -> Tensor:
        """Class numbers of a list such as "3, cat", int64 of shape (number of labels,).

        Names may contain commas, as ImageNet's "maillot, tank suit" does. A text that is one class's whole
        name means that class; any other is cut at those commas that leave what `label_indices` takes.

        Raises:
            InputError: as `label_indices`; also where a place is empty, or there is more than one way to cut.
        """
        if self.class_names is None or self._find(text) is not None:
            return self.label_indices([text])
        parts = text.split(",")
        longest = 1 + max(name.count(",") for name in self.class_names)
        # For each number of parts that can be read as labels: where the last of these labels may begin.
        begins: dict[int, list[int]] = {0: []}
        for stop in range(1, len(parts) + 1):
            starts = [k for k in range(max(0, stop - longest), stop) if k in begins]
            found = [k for k in starts if self._find(",".join(parts[k:stop])) is not None]
            if found:
                begins[stop] = found
        if len(parts) not in begins:
            if not all(part.strip() for part in parts):
                raise InputError("labels", f"must be names or numbers like 3,cat, got {text!r}")
            return self.label_indices(parts)  # which says what is wrong with one of them
        # With the longest and the shortest names from the end: the same if there is one way only.
        long, short = (self.label_indices(_cut(parts, begins, choose)) for choose in (min, max))
        if not torch.equal(long, short):
            ways = " or ".join(",".join(map(str, way.tolist())) for way in (long, short))
            raise InputError(
                "labels",
                f"{_shortened(text)!r} can be cut into names of classes in several ways, since some "
                f"hold commas; write their numbers, {_shortened(ways)}",
            )
        return long

    def _label_index(self, label: int | str) -> int:
        """The class that a name or a number means."""
        assert self.class_names is not None
        index = self._find(label)
        if index is not None:
            return index
        try:
            number = _number(label)
        except (TypeError, ValueError) as error:
            shown = ", ".join(self.class_names[:12]) + (", …" if len(self.class_names) > 12 else "")
            raise InputError("labels", f"no class is named {label!r}; the classes are {shown}") from error
        raise InputError("labels", f"{number} is outside 0 … {len(self.class_names) - 1}")

    def _find(self, label: int | str) -> int | None:
        """The class that a name or a number means, None if there is none; a name goes before a number."""
        assert self.class_names is not None
        if isinstance(label, str):
            for name in (label, label.strip()):
                if name in self.class_names:
                    return self.class_names.index(name)
        try:
            number = _number(label)
        except (TypeError, ValueError):
            return None
        return number if 0 <= number < len(self.class_names) else None


def _number(label: int | str) -> int:
    # Not int(label) of anything, which would take 1.5 for 1.
    return int(label) if isinstance(label, str) else operator.index(label)


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"


def _cut(
    parts: Sequence[str], begins: Mapping[int, Sequence[int]], choose: Callable[[Sequence[int]], int]
) -> list[str]:
    """The labels of one reading, from the last label, whose beginning is chosen, to the first."""
    labels, stop = [], len(parts)
    while stop:
        start = choose(begins[stop])
        labels.append(",".join(parts[start:stop]))
        stop = start
    return labels[::-1]


def _tuple(x: Any) -> Any:
    """JSON has lists where we have tuples."""
    return tuple(x) if isinstance(x, list) else x
