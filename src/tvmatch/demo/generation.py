"""The samples that the page shows: the same noise at several numbers of steps, with timing."""

import math
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.pictures import image_grid, points_square
from tvmatch.trained_model import TrainedModel

MAX_STEPS = 8
MAX_SEED = 2**53 - 1  # numbers of a browser are float64
_BATCH = {"images": 16, "points": 10_000}  # samples at a time, which limits memory
_WINDOW = 2.5  # half width of the plot of points, in standard deviations of the data


@dataclass(frozen=True)
class Request:
    """Checked options of the page, made by `Demonstration.request`.

    Attributes:
        label: a class number; None for all classes in turn, or for a model without classes.
        seed: of the noise.
        steps: numbers of network evaluations, increasing.
        count: number of samples.
        guidance: weight w; None for the model's default.
    """

    label: int | None
    seed: int
    steps: tuple[int, ...]
    count: int
    guidance: float | None


@dataclass(frozen=True)
class Result:
    """The samples for one number of steps.

    Attributes:
        steps: network evaluations a sample.
        samples: images (n, C, H, W) in [0, 1] or points (n, 2); the noise of sample k does not depend on
            `steps`.
        seconds: wall time of drawing all samples: noise, network, decoding, transfer to the CPU.
    """

    steps: int
    samples: Tensor
    seconds: float

    @property
    def milliseconds(self) -> float:
        """Wall time divided by the number of samples."""
        return 1000 * self.seconds / len(self.samples)


@dataclass
class Demonstration:
    """A model together with the limits and defaults of the page.

    Attributes:
        model: to draw samples from.
        drawing: whether a thread is drawing samples now.

    Raises:
        InputError: for a model of latents without an autoencoder, or of points that are not in the plane.
    """

    model: TrainedModel
    drawing: bool = field(default=False, init=False)
    _warm: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        spec = self.model.spec
        if spec.kind == "latents" and not self.model.gives_images:
            raise InputError(
                "autoencoder", "this model generates latents; an autoencoder is needed to decode them"
            )
        if spec.kind == "points" and spec.shape != (2,):
            raise InputError(
                "checkpoint", f"only points in the plane can be shown, these have {spec.shape[0]} numbers"
            )

    @property
    def unit(self) -> str:
        """The kind of sample: "images" or "points"."""
        return "images" if self.model.gives_images else "points"

    @property
    def max_count(self) -> int:
        """Largest number of samples of one request."""
        return 64 if self.model.gives_images else 10_000

    @property
    def default_count(self) -> int:
        """Number of samples when the page opens."""
        if not self.model.gives_images:
            return 2000
        return 16 if max(self.model.output_shape[1:]) <= 64 else 4

    def request(
        self, seed: Any, steps: Sequence[Any] | None, count: Any, label: Any = None, guidance: Any = None
    ) -> Request:
        """Check the values of the page's controls, where a number may be a float or missing.

        Raises:
            InputError: for an invalid value. `results` raises it for a guidance weight out of range.
        """
        spec = self.model.spec
        if not steps:
            raise InputError("steps", "choose at least one number of steps")
        numbers = {_whole_number("steps", number, 1, MAX_STEPS) for number in steps}
        if not isinstance(guidance, int | float | None):
            raise InputError("guidance", f"must be a number, got {guidance!r}")
        return Request(
            label=None if label is None else int(spec.label_indices([label])[0]),
            seed=_whole_number("seed", seed, 0, MAX_SEED),
            steps=tuple(sorted(numbers)),
            count=_whole_number(self.unit, count, 1, self.max_count),
            guidance=guidance,
        )

    def results(self, request: Request) -> Iterator[Result]:
        """Yield the result for each number of steps, in increasing order.

        Before the first request of a given number of samples is timed, one evaluation runs as a warm-up.

        Raises:
            InputError: for a guidance weight out of range, or if the samples do not fit into the memory of
                the device.
        """
        if request.count not in self._warm:
            self._sample(request, 1)
            self._warm.add(request.count)
        for steps in request.steps:
            start = time.perf_counter()
            samples = self._sample(request, steps)
            yield Result(steps, samples, time.perf_counter() - start)

    def _sample(self, request: Request, steps: int) -> Tensor:
        self.drawing = True
        try:
            return self.model.sample(
                request.label,
                count=request.count,
                steps=steps,
                guidance=request.guidance,
                seed=request.seed,
                batch_size=_BATCH[self.unit],
            )
        except torch.OutOfMemoryError:
            raise InputError(
                self.unit, f"{request.count} do not fit into the memory of {self.model.device}"
            ) from None
        finally:
            self.drawing = False

    def picture(self, samples: Tensor) -> Image.Image:
        """Images in a nearly square grid, or points in a square around the mean of the data.

        Raises:
            InputError: for samples that are not finite.
        """
        if self.model.gives_images:
            return image_grid(samples, math.ceil(math.sqrt(len(samples))))
        return points_square(samples, self.model.spec.mean, _WINDOW * max(self.model.spec.std))

    def facts(self) -> dict[str, str]:
        """Properties of the model for the head of the page, by name."""
        model, spec = self.model, self.model.spec
        parameters = sum(parameter.numel() for parameter in model.network.parameters())
        own, device = model.guidance, model.device
        facts = {
            "network": type(model.network).__name__,
            "parameters": f"{parameters:,}",
            self.unit: _dimensions(model.output_shape) if model.gives_images else "in the plane",
            "classes": f"{spec.class_count:,}" if spec.class_count else "none",
            "guidance weight": f"{own[0]:g} to {own[1]:g}" if isinstance(own, tuple) else f"{own:g}",
            "trained": steps_name(model.step),
            "runs on": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        }
        if spec.kind == "latents":
            facts["latents"] = _dimensions(spec.shape)
        return facts


def steps_name(steps: int) -> str:
    """1 step, 2 steps."""
    return "1 step" if steps == 1 else f"{steps:,} steps"


def time_name(milliseconds: float) -> str:
    """Three significant digits and a unit: 0.123 ms, 45.6 ms, 7.89 s."""
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1000:.3g} s"


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    """Convert a value of the page, an int or a float without a fraction, to a whole number in a range."""
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high or isinstance(value, bool):
        shown = "nothing" if value is None else f"{value:g}" if isinstance(value, float) else repr(value)
        raise InputError(name, f"must be a whole number from {low} to {high}, got {shown}")
    return number


def _dimensions(shape: tuple[int, ...]) -> str:
    """8 × 8 grey, 256 × 256 RGB, 32 × 32 of 4 channels."""
    channels, height, width = shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"of {channels} channels")
    return f"{height} × {width} {kind}"
