"""Attention with a tangent: time, memory and error of ours and of the other ways, on the same inputs.

    PYTHONPATH=src python benchmarks/attention.py                 # the whole comparison
    PYTHONPATH=src python benchmarks/attention.py --sweep         # the best tiles of each kernel (GPU)

Prints a table and writes attention.json, attention.md and attention.png to benchmarks/results/<device>/.
The exit code is 1 if ours fails or its error is above the tolerance of its precision.
"""

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import tile_sweep
import torch
from attention_contenders import Contender, Shape, compared, contenders, float64_results, relative_error
from attention_report import (
    CPU_SHAPES,
    GPU_SHAPES,
    Row,
    draw,
    rows_table,
    short_table,
    verdicts,
    verdicts_table,
    wrong,
)
from common import Ceilings, Timing, Work
from torch import Tensor

# --- measuring -----------------------------------------------------------------------------------------


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and their tangents as leaves, and the two cotangents: normal numbers."""
    draws = torch.Generator(device).manual_seed(sum(shape))
    tensors = [torch.randn(shape, generator=draws, device=device, dtype=dtype) for _ in range(8)]
    return [x.requires_grad_() for x in tensors[:6]], tensors[6:]


def compare_shape(
    shape: Shape, ways: Sequence[Contender | str], arguments: argparse.Namespace, ceilings: Ceilings
) -> list[Row]:
    """One row for each way."""
    device, dtype = arguments.device, common.chosen_dtype(arguments)
    x, cotangents = make_inputs(shape, dtype, device)
    part = compared(shape, device)
    sliced = [part(a) for a in x], [part(a) for a in cotangents]
    references = {tangent: float64_results(*sliced, tangent) for tangent in (True, False)}
    rows = []
    for way in ways:
        if isinstance(way, str):
            continue
        progress(f"{shape}: {way.name}")
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(way.half_reductions)
        row = Row(shape, way.name, note=does_not_fit(way, shape, dtype, device))
        if not row.note:
            try:
                errors, memory = check(way, x, cotangents, part, references[way.tangent], device)
                times = measure(way, x, cotangents, device, 0.1 if arguments.quick else 0.3)
                row = make_row(shape, way, times, ceilings, errors, memory)
            except Exception as error:
                row = row._replace(note=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        if row.note:
            print(f"  no numbers: {row.note}")
        rows.append(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    torch.compiler.reset()
    return rows


def does_not_fit(way: Contender, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Why the N × N buffers do not fit in the memory that is free, or nothing."""
    batch, heads, length, _ = shape
    needed = way.square_buffers * batch * heads * length**2 * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30
    if needed <= 0.9 * free:
        return ""
    return f"needs about {needed / 2**30:.0f} GiB for N × N matrices, {free / 2**30:.0f} GiB are free"


def run_backward(outputs: Sequence[Tensor], x: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Any:
    """The gradients of the inputs that the outputs depend on."""
    inputs = x if len(outputs) == 2 else x[:3]
    return torch.autograd.grad(list(outputs), list(inputs), list(cotangents[: len(outputs)]))


def forward_and_backward(way: Contender, x: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of the inputs (none where the way has no backward)."""
    with torch.set_grad_enabled(way.backward):
        outputs = way.function(x)
    gradients = run_backward(outputs, x, cotangents) if way.backward else ()
    return [a.detach() for a in (*outputs, *gradients)]


def check(
    way: Contender,
    x: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    part: Callable[[Tensor], Tensor],
    reference: Sequence[Tensor],
    device: torch.device,
) -> tuple[list[float | None], int | None]:
    """Errors of value, tangent and (the worst of the) gradients; peak memory of forward with backward."""
    run = partial(forward_and_backward, way, x, cotangents)
    results = run()  # compiles
    errors = [relative_error(part(a), b) for a, b in zip(results, reference, strict=False)]
    count = 2 if way.tangent else 1
    gradients = max(errors[count:], default=None)
    del results  # or they would count as held before
    memory = common.peak_memory(run, device)
    return [errors[0], errors[1] if way.tangent else None, gradients], memory


def measure(
    way: Contender, x: Sequence[Tensor], cotangents: Sequence[Tensor], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Times of the forward pass, as training runs it, and of the backward pass alone."""

    def forward(_: object = None) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(way.backward):
            return way.function(x)

    works = {"forward": Work(forward)}
    if way.backward:
        works["backward"] = Work(lambda outputs: run_backward(outputs, x, cotangents), forward)
    return common.time_together(works, device, seconds=seconds, warm_up=1)


def make_row(
    shape: Shape,
    way: Contender,
    times: dict[str, Timing],
    ceilings: Ceilings,
    errors: Sequence[float | None],
    memory: int | None,
) -> Row:
    """Times as rates and shares of the peak."""
    numbers: dict[str, float] = {}
    for name, flops in (("forward", way.forward_flops(shape)), ("backward", way.backward_flops(shape))):
        if name in times:
            rate = flops / times[name].median
            numbers |= {f"{name}_ms": times[name].ms, f"{name}_rate": rate / 1e12}
            numbers[f"{name}_share"] = rate / ceilings.flops
    mib = None if memory is None else memory / 2**20
    return Row(shape, way.name, **numbers, memory=mib, **dict(zip(ERRORS, errors, strict=True)))


ERRORS = ("error_value", "error_tangent", "error_gradients")


def where_time_goes(
    shapes: Sequence[Shape], ours: Contender, dtype: torch.dtype, device: torch.device
) -> list[tuple[Shape, str, float]]:
    """(shape, kernel, ms) of the longest kernels of a forward and backward pass. Run it after all timing."""
    found = []
    for shape in shapes:
        x, cotangents = make_inputs(shape, dtype, device)
        try:
            kernels = common.kernel_times(partial(forward_and_backward, ours, x, cotangents), device, 6)
        except Exception as error:  # the profiler needs more of the driver than the kernels do
            progress(f"no profile: {error}")
            return []
        found += [(shape, name, ms) for name, ms in kernels]
    return found


def progress(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


STARTED = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if ours is wrong."""
    parser = common.options("Attention with a tangent: time, memory and error.")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="B,H,N,D")
    parser.add_argument("--backend", choices=("auto", "reference", "triton"), default="auto", help="of ours")
    parser.add_argument("--sweep", action="store_true", help="time tiles of the kernels instead")
    arguments = parser.parse_args(argv)
    if arguments.sweep:
        return tile_sweep.main(arguments)
    device, dtype = arguments.device, common.chosen_dtype(arguments)
    shapes = arguments.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    facts = common.record(device) | {"dtype": str(dtype), "backend": arguments.backend}
    progress(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {dtype}")
    if device.type == "cuda":
        tile_sweep.compile_table(shapes, dtype, device)
        progress("kernels compiled")
    ceilings = common.measured_ceilings(device, dtype)
    facts["peak_tflops"] = round(ceilings.flops / 1e12, 3)
    facts["copy_gb_per_s"] = round(ceilings.bandwidth / 1e9, 1)
    ways = contenders(arguments.backend, arguments.quick, device)
    folder = common.results_folder(device, arguments.out)

    absent = [way for way in ways if isinstance(way, str)]
    rows: list[Row] = []
    for shape in shapes:
        rows += compare_shape(shape, ways, arguments, ceilings)
        # After every shape: a run that is cut short leaves what it has.
        write(folder, facts, rows, absent, ceilings, [])
    text = write(folder, facts, rows, absent, ceilings, where_time_goes(shapes, ways[0], dtype, device))
    print(f"\n{text}\n\nwritten to {folder}")
    return 1 if wrong(rows, dtype) else 0


def write(
    folder: Path,
    facts: dict[str, Any],
    rows: Sequence[Row],
    absent: Sequence[str],
    ceilings: Ceilings,
    kernels: Sequence[tuple[Shape, str, float]],
) -> str:
    """Write all files of the results; returns the tables."""
    dtype = common.DTYPES[facts["dtype"].removeprefix("torch.")]
    skipped = [*absent, *(f"{row.name} on {row.shape}: {row.note}" for row in rows if row.note)]
    found = [verdict for verdict in verdicts(rows, dtype.itemsize) if verdict.met is not None]
    text = [rows_table(rows), *([""] if skipped else []), *(f"- {line}" for line in skipped)]
    if kernels:
        lines = [["×".join(map(str, shape)), name[:60], ms] for shape, name, ms in kernels]
        text += ["", "One forward and backward of ours under the profiler:", ""]
        text += [common.table(("shape", "kernel", "ms"), lines)]
    text += ["", "## In short", "", short_table(rows), *(["", verdicts_table(found)] if found else [])]
    text += [f"- WRONG: {line}" for line in wrong(rows, dtype)]
    results = {
        "rows": [row._asdict() for row in rows],
        "verdicts": [verdict._asdict() for verdict in found],
        "kernels": kernels,
        "not_compared": skipped,
    }
    measured = any(row.forward_ms for row in rows)
    plot = (lambda figure: draw(figure, rows, ceilings)) if measured else None
    common.write_results(folder, "attention", facts, results, "\n".join(text), plot)
    return "\n".join(text)


def _shape(text: str) -> Shape:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: four positive numbers B,H,N,D")
    return sizes


if __name__ == "__main__":
    raise SystemExit(main())
