"""Rows, verdicts, tables and the plot of `attention.py`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import common
import torch
from attention_contenders import MATH, OURS, VALUE_ONLY, Shape
from common import Ceilings

DIT_SHAPES: list[Shape] = [(32, 18, 256, 64), (8, 18, 1024, 64)]
LONG: Shape = (1, 24, 32768, 128)
# Those with targets first, in case time runs out.
GPU_SHAPES: list[Shape] = [
    *DIT_SHAPES,
    LONG,
    *((1, 24, length, 128) for length in (4096, 8192, 16384)),
    (1, 1, 32768, 128),
]
CPU_SHAPES: list[Shape] = [(2, 2, 64, 16), (1, 2, 100, 32)]

# About four times what the reference itself loses when every input and product is rounded to the type:
# bfloat16 has 8 bits (2⁻⁹ a rounding; 4e-3 seen in gradients), float16 11, float32 24.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


class Row(NamedTuple):
    """One way on one shape. Times in ms, rates in TFLOP/s, shares of the measured peak, memory in MiB.

    `error` is the worst relative error among value, tangent and all gradients against float64; `note`
    says why there are no numbers.
    """

    shape: Shape
    name: str
    forward_ms: float | None = None
    forward_rate: float | None = None
    forward_share: float | None = None
    backward_ms: float | None = None
    backward_rate: float | None = None
    backward_share: float | None = None
    memory: float | None = None
    error_value: float | None = None
    error_tangent: float | None = None
    error_gradients: float | None = None
    note: str = ""

    @property
    def error(self) -> float | None:
        """The worst of the errors, or None if none was measured."""
        errors = [e for e in (self.error_value, self.error_tangent, self.error_gradients) if e is not None]
        return max(errors, default=None)


# --- verdicts ------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """A target, what was measured (None: not in this run), and whether it is met."""

    target: str
    measured: float | None
    met: bool | None


def verdicts(rows: Sequence[Row], itemsize: int) -> list[Verdict]:
    """The targets for an H100 or H200 in bfloat16; on other devices they are for orientation.

    Args:
        rows: of all shapes.
        itemsize: bytes of an element of the inputs.
    """
    by_name = {(row.shape, row.name): row for row in rows}
    long = by_name.get((LONG, OURS), Row(LONG, OURS))
    found = [
        _at_most("forward + tangent, (1, 24, 32768, 128): at most 100 ms", long.forward_ms, 100),
        _at_most("joint backward, (1, 24, 32768, 128): at most 400 ms", long.backward_ms, 400),
    ]
    for shape in DIT_SHAPES:
        for direction in ("forward", "backward"):
            ratio = times_faster(rows, shape, direction)
            text = f"{direction}, {shape}: at least 3 times faster than math SDPA under torch.func.jvp"
            found.append(Verdict(text, ratio, None if ratio is None else ratio >= 3))
    for shape in GPU_SHAPES:
        memory = by_name.get((shape, OURS), Row(shape, OURS)).memory
        units = None if memory is None else memory * 2**20 / (torch.Size(shape).numel() * itemsize)
        # Two outputs, six gradients and float32 statistics of N numbers each; room for float32 copies of two.
        found.append(_at_most(f"memory, {shape}: at most 16 times one input's", units, 16))
    return found


def times_faster(rows: Sequence[Row], shape: Shape, direction: str) -> float | None:
    """Time of the fastest math SDPA whose results are right over ours; None where one is missing."""
    here = [row for row in rows if row.shape == shape]
    math = [row for row in here if row.name.startswith(MATH) and row.error is not None and row.error < 2e-2]
    others = [ms for row in math if (ms := getattr(row, f"{direction}_ms")) is not None]
    ours = [ms for row in here if row.name == OURS and (ms := getattr(row, f"{direction}_ms")) is not None]
    return min(others) / ours[0] if others and ours else None


def _at_most(target: str, measured: float | None, bound: float) -> Verdict:
    return Verdict(target, measured, None if measured is None else measured <= bound)


def wrong(rows: Sequence[Row], dtype: torch.dtype) -> list[str]:
    """What of ours failed or is less exact than its precision allows."""
    ours = [row for row in rows if row.name in (OURS, VALUE_ONLY)]
    bad = [row for row in ours if row.error is None or row.error > TOLERANCES[dtype]]
    return [f"{row.name} on {row.shape}: {row.note or f'error {row.error:.1e}'}" for row in bad]


# --- writing down --------------------------------------------------------------------------------------

COLUMNS = (
    "shape",
    "method",
    "forward ms",
    "TFLOP/s",
    "of peak",
    "backward ms",
    "TFLOP/s",
    "of peak",
    "peak MiB",
    "error value",
    "tangent",
    "gradients",
)


def rows_table(rows: Sequence[Row]) -> str:
    """All rows that have numbers."""
    return common.table(
        COLUMNS, [["×".join(map(str, row.shape)), *row[1:-1]] for row in rows if not row.note]
    )


def short_table(rows: Sequence[Row]) -> str:
    """Ours alone, with the factor over the fastest math SDPA."""
    columns = ("shape", "forward ms", "TFLOP/s", "× math", "backward ms", "TFLOP/s", "× math", "MiB", "error")
    lines = []
    for row in rows:
        if row.name == OURS and not row.note:
            forward, backward = (times_faster(rows, row.shape, way) for way in ("forward", "backward"))
            line = [row.forward_ms, row.forward_rate, forward, row.backward_ms, row.backward_rate, backward]
            lines.append(["×".join(map(str, row.shape)), *line, row.memory, row.error])
    return common.table(columns, lines)


def verdicts_table(found: Sequence[Verdict]) -> str:
    """Targets that this run measured."""
    words = {True: "met", False: "missed", None: "not measured"}
    return common.table(("target", "measured", "verdict"), [[t, m, words[met]] for t, m, met in found])


def draw(figure: Any, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """TFLOP/s of every method over the shapes, forward and backward."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for name in names:
            found = {row.shape: getattr(row, f"{direction}_rate") for row in rows if row.name == name}
            points = [(i, found[s]) for i, s in enumerate(shapes) if found.get(s) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.axhline(ceilings.flops / 1e12, color="black", linestyle=":", label="large matrix product")
        axis.set_xticks(range(len(shapes)), ["×".join(map(str, s)) for s in shapes], rotation=40, ha="right")
        axis.set(title=direction, yscale="log")
    axes[0].set_ylabel("TFLOP/s (12 N²d, 30 N²d a head; a third without tangent)")
    axes[1].legend(fontsize="x-small")
