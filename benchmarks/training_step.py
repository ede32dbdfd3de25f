"""A full training step: target, flow term, gradients, AdamW and both moving averages, by several ways.

    PYTHONPATH=src python benchmarks/training_step.py             # GPU: DiT-XL/2; CPU: the digits' network
    PYTHONPATH=src python benchmarks/training_step.py --threads 1
    PYTHONPATH=src python benchmarks/training_step.py --preset S/2 --batch 2 --quick   # another network

Prints tables and writes training_step.json and training_step.md to benchmarks/results/<device>/. All ways run
the same network on the same numbers and are checked against float64; one that is wrong is shown, and does not
count. The exit code is 1 if ours is wrong.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import common
import torch
from common import Timing, Work
from torch.profiler import ProfilerActivity, profile
from training_activations import activation_table
from training_contenders import (
    CPU_WAYS,
    DIGITS,
    GPU_WAYS,
    IMAGENET,
    OURS,
    OURS_COMPILED,
    Case,
    Step,
    Way,
    errors,
    float64_gradients,
    forward_flops,
    make_zeros_dense,
)

from tvmatch.models import DiTConfig

# Relative errors of the gradient that rounding explains: float32 keeps 24 bits and bfloat16 8, and a network
# of many layers amplifies their last one: 5e-7 and 1e-2 were seen on a CPU with 4 and 28 blocks.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
GIB, GB = 2**30, 1e9


class Row(NamedTuple):
    """What was found for one way; None where it was not measured."""

    way: Way
    timing: Timing | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    memory: int | None = None
    preparation: float | None = None
    note: str = ""


STARTED = time.perf_counter()


def elapsed() -> float:
    """Seconds since the start."""
    return time.perf_counter() - STARTED


def progress(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{elapsed():6.1f} s] {text}", flush=True)


# --- measuring -----------------------------------------------------------------------------------------


def prepare(way: Way, case: Case, arguments: argparse.Namespace, reference: Any) -> tuple[Step | None, Row]:
    """Build the step, run it twice, and compare its gradient with float64."""
    precision = arguments.precision if arguments.precision != torch.float32 else None
    start = time.perf_counter()
    try:
        step = Step(way, case, arguments.device, precision)
        found = errors(step, reference)
        step()
        common.synchronize(arguments.device)
    except Exception as error:
        return None, Row(way, note=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160])
    took = time.perf_counter() - start
    note = "" if found[1] <= TOLERANCES[arguments.precision] else "WRONG"
    return step, Row(way, None, *found, preparation=took, note=note)


def measure_together(case: Case, arguments: argparse.Namespace, reference: Any) -> list[Row]:
    """CPU: all ways in interleaved rounds, so that whatever else the machine does touches all alike."""
    rows, steps = [], {}
    for way in CPU_WAYS:
        if arguments.quick and way.jvp and way.compiled:
            continue
        progress(way.name)
        step, row = prepare(way, case, arguments, reference)
        rows.append(row)
        if step is not None:
            steps[way.name] = Work(step)
    rounds = 5 if arguments.quick else 40
    progress("timing")
    timings = common.time_together(steps, arguments.device, least=rounds, most=rounds)
    return [row._replace(timing=timings.get(row.way.name)) for row in rows]


def measure_one_by_one(case: Case, arguments: argparse.Namespace, reference: Any) -> list[Row]:
    """GPU: one way after the other, for their memory; those for which no time is left are not tried."""
    rows = []
    for way in GPU_WAYS:
        if elapsed() > arguments.seconds * 0.7:
            rows.append(Row(way, note="no time left"))
            continue
        progress(way.name)
        step, row = prepare(way, case, arguments, reference)
        if step is not None:
            torch.cuda.reset_peak_memory_stats(arguments.device)
            rounds = 5 if arguments.quick else 15
            timings = common.time_together(
                {"step": Work(step)}, arguments.device, queued=False, least=3, most=rounds, seconds=5.0
            )
            memory = torch.cuda.max_memory_allocated(arguments.device) - _bytes(reference[1])
            row = row._replace(timing=timings["step"], memory=memory)
        rows.append(row)
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# --- where the time goes -------------------------------------------------------------------------------

# Parts of the names of kernels (GPU) or operators (CPU), in the order in which they are looked for.
GROUPS = {
    "attention backward": (
        "query_gradients",
        "key_gradients",
        "value_gradients",
        "flash_bwd",
        "attention_backward",
        "attention_for_cpu_backward",
    ),
    "attention forward": ("attention_forward", "flash_fwd", "attention_for_cpu", "fmha", "softmax"),
    "matrix products": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "::mm", "::addmm", "::bmm", "splitk"),
    "optimiser and averages": ("adam", "multi_tensor", "foreach", "lerp"),
}
REST = "pointwise, norms and the rest"


def group_of(name: str) -> str:
    """The group that a kernel or operator belongs to."""
    lower = name.lower()
    found = (group for group, parts in GROUPS.items() if any(part in lower for part in parts))
    return next(found, REST)


def where_time_goes(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by groups: of the device's kernels, or of a CPU's operators (median of 5)."""
    cuda = device.type == "cuda"
    rounds: list[dict[str, float]] = []
    for _ in range(2 if cuda else 5):
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            step()
            common.synchronize(device)
        sums = dict.fromkeys([*GROUPS, REST], 0.0)
        for event in profiler.key_averages():
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            sums[group_of(event.key)] += spent / 1e3
        rounds.append(sums)
    return {group: statistics.median(sums[group] for sums in rounds) for group in rounds[0]}


# --- report --------------------------------------------------------------------------------------------


def rows_table(rows: Sequence[Row], case: Case, flops: float) -> str:
    """One line for each way."""
    lines = []
    for row in rows:
        rate = images = None
        if row.timing is not None:
            rate = case.forward_equivalents * flops / row.timing.median / 1e12
            images = case.batch / row.timing.median
        lines.append(
            (
                row.way.name,
                row.timing and row.timing.ms,
                row.timing and f"{1e3 * row.timing.lower:.4g} – {1e3 * row.timing.upper:.4g}",
                images,
                rate,
                None if row.memory is None else row.memory / GB,
                row.loss_error,
                row.gradient_error,
                row.preparation,
                row.note,
            )
        )
    columns = ("step", "ms", "quartiles", "images/s", "TFLOP/s", "GB", "error of loss", "of gradient")
    return common.table((*columns, "first steps, s", "note"), lines)


def verdicts(rows: Sequence[Row], device: torch.device) -> list[str]:
    """What the targets say: ratios to the fastest right step by `torch.func.jvp`."""
    right = {row.way: row.timing.median for row in rows if row.timing is not None and row.note != "WRONG"}
    times = {way.name: seconds for way, seconds in right.items()}
    eager = min((t for way, t in right.items() if way.jvp and not way.compiled), default=None)
    compiled = min((t for way, t in right.items() if way.jvp and way.compiled), default=None)
    lines = []
    for name, target in ((OURS, 1.5), (OURS_COMPILED, 2.0)):
        if name in times and eager is not None:
            lines.append(
                f"{name}: {eager / times[name]:.2f} times as fast as the faster eager jvp (target {target})"
            )
    if OURS_COMPILED in times and compiled is not None:
        ratio = compiled / times[OURS_COMPILED]
        lines.append(
            f"{OURS_COMPILED}: {ratio:.2f} times as fast as the faster compiled jvp, "
            "which PyTorch 2.13 can only run with its zero tensors made dense, as here"
        )
    if device.type == "cuda" and times:
        best = min((row for row in rows if row.timing and not row.way.jvp), key=lambda row: row.timing.median)  # type: ignore
        memory = "" if best.memory is None else f" and {best.memory / GB:.1f} GB (target ≤ 40)"
        lines.append(f"{best.way.name}: {best.timing.median:.3f} s (DiT-XL/2: target ≤ 0.24){memory}")  # type: ignore
    return lines


def chosen_case(arguments: argparse.Namespace) -> Case:
    """The device's case, changed by the options."""
    case = IMAGENET if arguments.device.type == "cuda" else DIGITS
    if arguments.preset is not None:
        case = replace(IMAGENET, config=DiTConfig(preset=arguments.preset))
    return case if arguments.batch is None else replace(case, batch=arguments.batch)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if ours is wrong."""
    parser = common.options("A full training step by several ways.")
    parser.add_argument("--preset", help="of a DiT at 4 × 32 × 32 latents with guidance")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--seconds", type=float, default=140.0, help="GPU: time for everything, roughly")
    arguments = parser.parse_args(argv)
    device, cuda = arguments.device, arguments.device.type == "cuda"
    arguments.precision = common.chosen_dtype(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    case = chosen_case(arguments)
    facts = common.record(device) | {
        "network": case.config.preset,
        "images a step": case.batch,
        "image": list(case.shape),
        "precision": str(arguments.precision),
    }
    progress(f"{facts['device']}, torch {facts['torch']}, {case.config.preset}, {case.batch} images")

    make_zeros_dense()
    flops = forward_flops(case)
    activations = activation_table(case if cuda else IMAGENET, device)
    progress("gradient in float64")
    reference = float64_gradients(case, device)
    measure = measure_one_by_one if cuda else measure_together
    rows = measure(case, arguments, reference)
    shares = breakdown(rows, case, arguments)
    return report(arguments, facts, case, flops, rows, shares, activations)


def breakdown(rows: Sequence[Row], case: Case, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`where_time_goes` of ours; a machine whose profiler does not work has none."""
    cuda = arguments.device.type == "cuda"
    names = [row.way for row in rows if row.timing is not None and not row.way.jvp]
    if cuda and (not names or elapsed() > arguments.seconds * 0.9):
        return {}
    found = {}
    for way in names[:1] if cuda else names:
        progress(f"where the time goes: {way.name}")
        try:
            precision = arguments.precision if arguments.precision != torch.float32 else None
            step = Step(way, case, arguments.device, precision)
            step()
            found[way.name] = where_time_goes(step, arguments.device)
        except Exception as error:
            progress(f"no profile: {error}")
    return found


def report(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    case: Case,
    flops: float,
    rows: Sequence[Row],
    shares: dict[str, dict[str, float]],
    activations: str,
) -> int:
    """Print and write everything."""
    parts = []
    for name, groups in shares.items():
        lines = [(group, ms, 100 * ms / sum(groups.values())) for group, ms in groups.items()]
        title = f"Where the time of one step goes, {name}"
        if arguments.device.type == "cpu":  # the plain reference serves the pass with the tangent
            title += " (attention with a tangent is among the matrix products and the rest)"
        parts.append(f"{title}:\n\n{common.table(('part', 'ms', '%'), lines)}")
    preset = case.config.preset if arguments.device.type == "cuda" else IMAGENET.config.preset
    parts.append(
        f"Memory that the blocks of {preset} hold until the backward pass, under bfloat16 autocast and with "
        f"fused attention:\n\n{activations}"
    )
    lines = "\n".join(f"- {line}" for line in verdicts(rows, arguments.device))
    text = "\n\n".join([*parts, "## In short", rows_table(rows, case, flops), lines])
    folder = common.results_folder(arguments.device, arguments.out)
    results = {
        "forward_flops": flops,
        "forward_equivalents": case.forward_equivalents,
        "rows": [row._asdict() | {"way": row.way._asdict(), "timing": _numbers(row.timing)} for row in rows],
        "where_time_goes_ms": shares,
        "verdicts": verdicts(rows, arguments.device),
    }
    common.write_results(folder, "training_step", facts, results, text)
    print(f"\n{text}\n\nwritten to {folder}")
    ours = [row for row in rows if not row.way.jvp and row.note != "no time left"]
    return 1 if any(row.note for row in ours) or not ours else 0


def _numbers(timing: Timing | None) -> dict[str, float] | None:
    return None if timing is None else timing._asdict()


if __name__ == "__main__":
    raise SystemExit(main())
