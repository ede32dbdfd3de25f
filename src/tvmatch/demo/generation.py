"""What the page computes: the same samples at several numbers of steps, with their time."""

import math
import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.pictures import image_grid
from tvmatch.trained_model import TrainedModel

MAX_STEPS = 8
MAX_SEED = 2**53 - 1  # a browser's numbers are float64
_BATCH = {"images": 16, "points": 10_000}  # bounds the memory that large images take
_WINDOW = 2.5  # standard deviations shown on either side of the mean of points


@dataclass(frozen=True)
class Request:
    """What a visitor asks for; `Demonstration.request` makes valid ones.

    Attributes:
        label: a class number, or None for all classes in turn or a model without classes.
        seed: of the noise.
        steps: numbers of network evaluations, increasing.
        count: number of samples.
        guidance: weight w, or None for the model's own.
    """

    label: int | None
    seed: int
    steps: tuple[int, ...]
    count: int
    guidance: float | None


@dataclass(frozen=True)
class Result:
    """The samples of one number of steps.

    Attributes:
        steps: network evaluations of each sample.
        samples: images (n, C, H, W) in [0, 1] or points (n, 2); sample k has the same noise at any `steps`.
        seconds: wall time of all of it: noise, network, decoding, the way to the CPU's memory.
    """

    steps: int
    samples: Tensor
    seconds: float

    @property
    def milliseconds(self) -> float:
        """Wall time over the number of samples, which are drawn in batches."""
        return 1000 * self.seconds / len(self.samples)


@dataclass
class Demonstration:
    """A model as the page uses it: how many samples, which choices, what they give.

    Attributes:
        model: what is shown.
        drawing: whether a thread is at work on samples now.

    Raises:
        InputError: for latents without an autoencoder, and points that are not in the plane.
    """

    model: TrainedModel
    drawing: bool = field(default=False, init=False)
    _warm: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        spec = self.model.spec
        if spec.kind == "latents" and not self.model.gives_images:
            raise InputError(
                "autoencoder", "this model generates latents, which only an autoencoder makes images"
            )
        if spec.kind == "points" and spec.shape != (2,):
            raise InputError(
                "checkpoint", f"only points in the plane can be shown, these have {spec.shape[0]} numbers"
            )

    @property
    def unit(self) -> str:
        """What the samples are: "images" or "points"."""
        return "images" if self.model.gives_images else "points"

    @property
    def max_count(self) -> int:
        """The most samples of one request."""
        return 64 if self.model.gives_images else 10_000

    @property
    def default_count(self) -> int:
        """Samples that come quickly and can be told apart side by side."""
        if not self.model.gives_images:
            return 2000
        return 16 if max(self.model.output_shape[1:]) <= 64 else 4

    def request(
        self, seed: Any, steps: Sequence[Any] | None, count: Any, label: Any = None, guidance: Any = None
    ) -> Request:
        """Check what came from the page, where a number may be a float or missing.

        Raises:
            InputError: naming what is wrong; `results` does so for a guidance that the model does not take.
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

    def next_seed(self, request: Request) -> int:
        """The seed after that of `request`, and 0 after the last."""
        return (request.seed + 1) % (MAX_SEED + 1)

    def results(self, request: Request) -> Iterator[Result]:
        """One result after another, by increasing number of steps.

        The first time that a number of samples is asked for, one evaluation of them runs before the clock
        starts: it pays for what is set up once, such as loading kernels.

        Raises:
            InputError: for a guidance that the model does not take, or if the samples do not fit into the
                device's memory.
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
        """Images in a nearly square grid, points as dots.

        Raises:
            InputError: for samples that are not finite.
        """
        if self.model.gives_images:
            return image_grid(samples, math.ceil(math.sqrt(len(samples))))
        return self._points_picture(samples)

    def _points_picture(self, points: Tensor) -> Image.Image:
        """Dots in a square about the mean of the data, the same one whatever the samples."""
        if not points.isfinite().all():
            raise InputError("points", "a coordinate is not finite")
        (x, y), half = self.model.spec.mean, _WINDOW * max(self.model.spec.std)
        figure = Figure(figsize=(4, 4), dpi=120, facecolor="white")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        size = min(12.0, max(1.0, 9000 / len(points)))
        axes.scatter(
            points[:, 0].numpy(), points[:, 1].numpy(), s=size, color="#2f6fb5", alpha=0.55, linewidths=0
        )
        axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal")
        axes.set_axis_off()
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        return Image.open(buffer).convert("RGB")

    def facts(self) -> dict[str, str]:
        """What a visitor may want to know of the model, by its name."""
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
    """Three digits and a unit: 0.12 ms, 45.6 ms, 7.89 s."""
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1000:.3g} s"


def _whole_number(name: str, value: Any, low: int, high: int) -> int:
    """What the page sends for a whole number: an int, or a float without a fraction."""
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
