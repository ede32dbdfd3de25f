"""Plots of two-dimensional samples and of training curves.

Matplotlib's global state (`pyplot`) is not used, so plotting needs no display and is thread-safe.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.pictures.images import save_png

Floats = NDArray[np.float64]

_INK, _GREY, _PALE, _BLUE, _ORANGE = "#22262b", "#8a9099", "#e4e6ea", "#2f6fb5", "#d9822b"
_LOSS_COLOURS = (_INK, _BLUE, _ORANGE, _GREY)  # of the loss and its terms, in the log's order
_FAMILY = matplotlib.colormaps["viridis"]  # for curves with an order: blocks, time bins
_PATH_COLOURS = LinearSegmentedColormap.from_list("noise to data", ["#c9ced6", _BLUE])
_LEGEND_LINES = 8


def points_picture(
    data: Tensor, samples: Mapping[int, Tensor], trajectories: Tensor, path: str | Path
) -> None:
    """Draw a row of panels: the data, the samples for each number of steps, and trajectories.

    The panels of data and samples show the same window, slightly larger than the data. A number in the corner
    counts the samples outside it.

    Args:
        data: real points, (n, 2).
        samples: points, (n, 2), by number of steps.
        trajectories: (m + 1, k, 2), positions of k points from noise (first) to data (last), as
            `TrainedModel.trajectory` returns them. More than about 100 points are hard to read.
        path: of the PNG.

    Raises:
        InputError: for another shape or non-finite coordinates.
        OSError: if the file cannot be written.
    """
    real = _points("data", data)
    clouds = {steps: _points(f"samples[{steps}]", points) for steps, points in samples.items()}
    if trajectories.ndim != 3 or trajectories.shape[0] < 2 or trajectories.shape[2] != 2:
        raise InputError("trajectories", f"must be (m + 1 ≥ 2, k, 2), got {tuple(trajectories.shape)}")
    paths = _points("trajectories", trajectories.flatten(0, 1)).reshape(trajectories.shape)

    figure = _figure(3.1 * (len(clouds) + 2), 3.6)
    panels: NDArray[Any] = figure.subplots(1, len(clouds) + 2, squeeze=False)[0]
    low, high = _window(real)
    _plane(panels[0], "data", low, high)
    _scatter(panels[0], real, _INK)
    for axes, (steps, points) in zip(panels[1:], clouds.items(), strict=False):
        _plane(axes, _steps(steps), low, high)
        _scatter(axes, points, _BLUE)
        outside = int(((points < low) | (points > high)).any(axis=1).sum())
        if outside:
            axes.text(0.02, 0.02, f"{outside} outside", transform=axes.transAxes, color=_GREY, fontsize=9)
    everything = np.concatenate([real, paths.reshape(-1, 2)])
    _plane(panels[-1], f"trajectories, {_steps(len(paths) - 1)}", *_window(everything))
    _draw_paths(panels[-1], paths, real)
    save_png(_render(figure), path)


def points_square(points: Tensor, centre: Sequence[float], half_width: float) -> Image.Image:
    """Points, (n, 2), as dots in a square window around `centre`, without axes.

    Raises:
        InputError: for another shape or non-finite coordinates.
    """
    figure = Figure(figsize=(4, 4), dpi=120, facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    _scatter(axes, _points("points", points), _BLUE)
    x, y = centre
    axes.set(xlim=(x - half_width, x + half_width), ylim=(y - half_width, y + half_width), aspect="equal")
    axes.set_axis_off()
    return _render(figure)


def training_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Plot the training log: losses, activations, gradient, tangent and learning rate, one panel each.

    Thin lines are the recorded values, thick lines their running mean over a thirtieth of the run.

    Args:
        history: rows of the training log: `step` and any of `loss`, its terms by name, `gradient_norm`,
            `learning_rate`, `modulation_norm/<name>` and `tangent_norm/<time bin>`. Panels without data are
            left out, and so are values that are not positive and finite: axes are logarithmic, except that
            of the learning rate.
        path: of the PNG.

    Raises:
        InputError: if there is nothing to draw.
        OSError: if the file cannot be written.
    """
    panels: list[tuple[str, list[Curve]]] = []
    for title, wanted in _PANELS:
        keys = dict.fromkeys(key for row in history for key in row if wanted(key))
        family = any("/" in key for key in keys)
        curves = [_curve(history, key) for key in (sorted(keys, key=_natural) if family else keys)]
        curves = [curve for curve in curves if len(curve.steps)]
        if curves:
            panels.append((title, curves))
    if not panels:
        raise InputError("history", "there is no step with a positive finite number to draw")
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4.8 * columns, 3.4 * rows)
    grid = figure.add_gridspec(rows, columns)
    spare = rows * columns - len(panels)  # the first panel, the losses, is wider by this many columns
    for index, (title, curves) in enumerate(panels):
        cell = 0 if index == 0 else index + spare
        row, column = divmod(cell, columns)
        span = slice(column, column + 1 + (spare if index == 0 else 0))
        _draw_curves(figure.add_subplot(grid[row, span]), title, curves)
    save_png(_render(figure), path)


_NO_LOSS = ("step", "gradient_norm", "learning_rate")
_PANELS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("loss", lambda key: "/" not in key and key not in _NO_LOSS),
    ("gradient norm", lambda key: key == "gradient_norm"),
    ("modulation before its norm, RMS", lambda key: key.startswith("modulation_norm/")),
    ("∂F/∂s by time, RMS", lambda key: key.startswith("tangent_norm/")),
    ("learning rate", lambda key: key == "learning_rate"),
)


class Curve(NamedTuple):
    """The rows of a history in which `key` is a positive finite number."""

    key: str
    steps: Floats
    values: Floats


def _curve(history: Sequence[Mapping[str, float]], key: str) -> Curve:
    pairs = [(row["step"], row[key]) for row in history if key in row and "step" in row]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    kept = np.isfinite(values) & (values > 0)
    return Curve(key, steps[kept], values[kept])


def _running_mean(values: Floats) -> Floats:
    """Mean over the values at most a sixtieth of the run away, fewer at both ends."""
    count, half = len(values), len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(count) - half, 0)
    last = np.minimum(np.arange(count) + half + 1, count)
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _draw_curves(axes: Axes, title: str, curves: Sequence[Curve]) -> None:
    family = "/" in curves[0].key
    labelled = set(np.linspace(0, len(curves) - 1, min(len(curves), _LEGEND_LINES)).round().astype(int))
    for index, (key, steps, values) in enumerate(curves):
        last = max(1, len(curves) - 1)
        colour = _FAMILY(0.9 * index / last) if family else _LOSS_COLOURS[index % len(_LOSS_COLOURS)]
        label = key.split("/", 1)[-1] if index in labelled else None
        marker = "o" if len(steps) == 1 else None
        smooth = values if key == "learning_rate" else _running_mean(values)  # a schedule has no noise
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, linewidth=1.8, marker=marker, label=label)
    if curves[0].key != "learning_rate":
        _logarithmic(axes, min(c.values.min() for c in curves), max(c.values.max() for c in curves))
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(True, which="major", color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if family:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2)
    elif len(curves) > 1:
        axes.legend(frameon=False, loc="best")


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis with readable tick labels for any range."""
    axes.set_yscale("log")
    decades = float(np.log10(high / low))
    if decades < 1:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_paths(axes: Axes, paths: Floats, data: Floats) -> None:
    """Lines from noise (rings) to samples (dots), from grey to blue, over pale data points."""
    axes.scatter(data[:, 0], data[:, 1], s=3, color=_PALE, linewidths=0, zorder=1)
    pieces = np.stack([paths[:-1], paths[1:]], axis=2).reshape(-1, 2, 2)  # (m · k, from and to, 2)
    when = np.repeat(np.arange(len(paths) - 1), paths.shape[1])
    axes.add_collection(
        LineCollection(list(pieces), array=when, cmap=_PATH_COLOURS, linewidths=0.8, alpha=0.8, zorder=2)
    )
    (x, y), (end_x, end_y) = paths[0].T, paths[-1].T
    axes.scatter(x, y, s=10, facecolors="white", edgecolors=_ORANGE, linewidths=0.8, label="noise", zorder=3)
    axes.scatter(end_x, end_y, s=10, color=_BLUE, linewidths=0, label="samples", zorder=4)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False, handletextpad=0.1, fontsize=9
    )


def _scatter(axes: Axes, points: Floats, colour: str) -> None:
    size = float(np.clip(9000 / len(points), 1.0, 12.0))
    axes.scatter(points[:, 0], points[:, 1], s=size, color=colour, alpha=0.55, linewidths=0)


def _plane(axes: Axes, title: str, low: Floats, high: Floats) -> None:
    axes.set_title(title)
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_PALE)


def _window(points: Floats) -> tuple[Floats, Floats]:
    """Corners of a square slightly larger than `points`."""
    low, high = points.min(axis=0), points.max(axis=0)
    centre, half = (low + high) / 2, 0.58 * float((high - low).max()) + 1e-6
    return centre - half, centre + half


def _points(name: str, points: Tensor) -> Floats:
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 1:
        raise InputError(name, f"must have shape (n ≥ 1, 2), got {tuple(points.shape)}")
    if not points.isfinite().all():
        raise InputError(name, "has a non-finite coordinate")
    return np.asarray(points.detach().cpu().double().numpy())


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _natural(key: str) -> list[tuple[int, float, str]]:
    """Sort key that puts block 10 after block 9."""
    parts = re.split(r"(\d+(?:\.\d+)?)", key)
    return [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _render(figure: Figure) -> Image.Image:
    # Not `savefig`, which may import pyplot.
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
