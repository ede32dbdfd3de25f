"""What the benchmarks share: how to time, what a device can do, and how results are written down.

Only PyTorch is needed (matplotlib for the plots, when it is installed). Units are seconds, bytes and
FLOP/s unless a name says otherwise.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# --- options -------------------------------------------------------------------------------------------


def options(description: str) -> argparse.ArgumentParser:
    """A parser with --device, --dtype, --out and --quick; add what is particular to a benchmark."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="cpu, cuda, cuda:1 …")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/<device>/)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    return parser


def _device(text: str) -> torch.device:
    """The device of that name; a GPU becomes the current one, which events and synchronisation refer to."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"{text}: PyTorch sees no GPU here")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def chosen_dtype(arguments: argparse.Namespace) -> torch.dtype:
    """What --dtype says, or the device's default."""
    default = "bfloat16" if arguments.device.type == "cuda" else "float32"
    return DTYPES[arguments.dtype or default]


# --- what was measured on ------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    name = model.group(1) if model else platform.processor() or platform.machine()
    return f"CPU {name}"


def record(device: torch.device) -> dict[str, Any]:
    """Device, versions and date: every result is written down with these."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    else:
        facts["threads"] = torch.get_num_threads()
        facts["cores"] = os.cpu_count()
    return facts


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Commit of the source, marked if files differ from it; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


# --- timing --------------------------------------------------------------------------------------------


def _nothing() -> None:
    return None


class Work(NamedTuple):
    """Something to time: `call(prepare())`, of which only `call` is timed.

    Attributes:
        call: takes what `prepare` returned; for a backward pass, `torch.autograd.grad` of it.
        prepare: makes the state anew before every call; for a backward pass, the forward pass.
    """

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = _nothing


class Timing(NamedTuple):
    """Seconds of one call: the median over `calls`, and the quartiles as a measure of the noise."""

    median: float
    lower: float
    upper: float
    calls: int

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return 1e3 * self.median


def time_together(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    seconds: float = 0.5,
    queued: bool = True,
    warm_up: int = 2,
    least: int = 5,
    most: int = 100,
) -> dict[str, Timing]:
    """Time several works in interleaved rounds, so that a drifting clock touches all alike.

    On a GPU, CUDA events around each call measure the time. With `queued`, the cache is emptied before
    each call by overwriting a buffer larger than it, as many times as it takes for the host to get the
    call's launches queued: what is measured is then the device's own time on cold inputs. Without, the
    device is idle at the start and launch gaps count, as they do for a user: right for whole steps.

    Args:
        works: by name.
        device: where they run.
        seconds: time to spend on each work, roughly.
        queued: GPU only, see above.
        warm_up: calls before the first timed one (compilation, autotuning, handles), at least 1.
        least, most: bounds on the number of rounds.
    """
    cuda = device.type == "cuda"
    scrub = torch.empty(_scrub_bytes(device), dtype=torch.int8, device=device) if cuda and queued else None
    sweeps: dict[str, int] = {}
    expected = 0.0
    for name, work in works.items():
        for _ in range(warm_up):
            work.call(work.prepare())
        host, whole = _host_seconds(work, device)
        expected += whole
        sweeps[name] = 0 if scrub is None else _sweeps(host, scrub)
    rounds = max(least, min(most, int(seconds * len(works) / max(expected, 1e-9))))

    measure = _measure_cuda if cuda else _measure_cpu
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(measure(work, scrub, sweeps[name]))
    return {name: _timing(times) for name, times in samples.items()}


def _timing(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, lower, upper, len(times))


def _scrub_bytes(device: torch.device) -> int:
    return max(256 * 2**20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)


def _host_seconds(work: Work, device: torch.device) -> tuple[float, float]:
    """Until `call` returns to the host, and until prepare and call are done on the device."""
    synchronize(device)
    start = time.perf_counter()
    state = work.prepare()
    synchronize(device)
    called = time.perf_counter()
    work.call(state)
    returned = time.perf_counter()
    synchronize(device)
    return returned - called, time.perf_counter() - start


def _sweeps(host: float, scrub: torch.Tensor) -> int:
    """Overwrites of `scrub` that keep the device busy for 1.5 times `host` seconds, at most 50 ms."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    scrub.zero_()
    start.record()
    scrub.zero_()
    end.record()
    end.synchronize()
    one = max(start.elapsed_time(end) / 1e3, 1e-6)
    return 1 + math.ceil(min(1.5 * host, 0.05) / one)


def _measure_cuda(work: Work, scrub: torch.Tensor | None, sweeps: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    state = work.prepare()
    torch.cuda.synchronize()
    if scrub is not None:
        for _ in range(sweeps):
            scrub.zero_()
    start.record()
    work.call(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _measure_cpu(work: Work, _scrub: torch.Tensor | None, _sweeps: int) -> float:
    state = work.prepare()
    start = time.perf_counter()
    work.call(state)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that PyTorch held at once during `function`, above what it held before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernel_times(
    function: Callable[[], object], device: torch.device, most: int = 12
) -> list[tuple[str, float]]:
    """Where one call spends its time: the `most` longest kernels (on a CPU: operators) and their total ms."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        function()
        synchronize(device)
    events = profiler.key_averages()
    totals = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3 for e in events}
    return sorted(totals.items(), key=lambda item: -item[1])[:most]


# --- ceilings of the device ----------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What the device reached here: FLOP/s of a large matrix product, bytes/s of a large copy (both ways)."""

    flops: float
    bandwidth: float


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A square matrix product (2 n³ FLOPs) and a copy, every byte of which is read and written once."""
    cuda = device.type == "cuda"
    n, length = (8192, 2**31) if cuda else (512, 2**25)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(length, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    works = {
        "product": Work(lambda _: torch.mm(a, b, out=product)),
        "copy": Work(lambda _: target.copy_(source)),
    }
    timings = time_together(works, device, seconds=0.4 if cuda else 0.05)
    return Ceilings(2 * n**3 / timings["product"].median, 2 * length / timings["copy"].median)


# --- results -------------------------------------------------------------------------------------------


def safe_name(name: str) -> str:
    """A name for a folder: letters, digits, dots, dashes; everything else becomes one underscore."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_.-") or "unknown"


def results_folder(device: torch.device, out: Path | None = None) -> Path:
    """`out`, or `benchmarks/results/<device>/`; made if it is not there."""
    folder = out or ROOT / "results" / safe_name(device_name(device))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(
    folder: Path,
    name: str,
    facts: Mapping[str, Any],
    results: Mapping[str, Any],
    markdown: str,
    plot: Callable[[Any], None] | None = None,
) -> None:
    """Write `name.json` (facts and results), `name.md`, and `name.png` where matplotlib is installed.

    Args:
        folder: exists.
        name: of the benchmark.
        facts: what `record` returned, and settings of the run.
        results: plain numbers, strings, lists and dicts.
        markdown: tables and sentences, without the facts, which are put above it.
        plot: draws into the matplotlib figure that it is given.
    """
    content = json.dumps({"record": dict(facts), **results}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(content + "\n", encoding="utf-8")
    lines = [f"# {name}", "", *(f"- {key}: {value}" for key, value in facts.items()), "", markdown, ""]
    (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    if plot is not None:
        _write_plot(folder / f"{name}.png", plot)


def _write_plot(path: Path, plot: Callable[[Any], None]) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure)
    figure.savefig(path, dpi=120)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that also reads well in a terminal. Floats get three digits, None a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.{min(digits, 6)}f}"
    return str(value)
