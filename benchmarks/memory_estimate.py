"""The memory that `tvmatch train --dry_run` predicts, beside that of a real training step.

    PYTHONPATH=src python benchmarks/memory_estimate.py                 # GPU: DiT-XL/2; CPU: a small DiT
    PYTHONPATH=src python benchmarks/memory_estimate.py --preset B/2 --batch 16 --compile

On a GPU the peak is that of PyTorch's allocator (`torch.cuda.max_memory_allocated`). On a CPU, whose
allocator keeps no record, it is the highest running sum of the profiler's record of every allocation and
release: exact to the byte, and taken below the operators, where the estimate never looks. What the operating
system says (the peak of resident memory, Linux alone) stands beside it: it counts pages, and includes what
libraries allocate for themselves.
"""

import argparse
import ctypes
import gc
from dataclasses import replace
from pathlib import Path

import common
import torch
from torch.profiler import ProfilerActivity, profile

from tvmatch.acceleration import accelerate
from tvmatch.config.schema import Config, TrainingConfig
from tvmatch.data.base import Batch
from tvmatch.data.spec import DataSpec
from tvmatch.dry_run.estimate import estimate
from tvmatch.models import DiTConfig
from tvmatch.objectives import TVM
from tvmatch.training.state import TrainingState, initial_state
from tvmatch.training.step import draw_inputs, training_step

GB = 1e9
CLEAR_REFS = Path("/proc/self/clear_refs")


def image_spec(shape: tuple[int, int, int], class_count: int) -> DataSpec:
    """Images that the network sees as they are."""
    names = tuple(str(k) for k in range(class_count)) or None
    return DataSpec("image", shape, names, (0.0,) * shape[0], (1.0,) * shape[0])


class RealStep:
    """Training steps on random data, as a run takes them.

    Args:
        config: the run.
        spec: shape and classes of the data.
        device: where.
    """

    def __init__(self, config: Config, spec: DataSpec, device: torch.device) -> None:
        self.config, self.spec, self.device = config, spec, device
        self.state: TrainingState = initial_state(config, spec, device)
        training = config.training
        accelerate(self.state.network, recompute=training.recompute, compiled=training.compile)
        if self.state.target is not None:
            accelerate(self.state.target.network, compiled=training.compile)

    def __call__(self) -> None:
        """One step, with both averages."""
        config, state = self.config, self.state
        count = config.training.batch_size
        labels = torch.zeros(count, dtype=torch.int64) if self.spec.class_count else None
        batch = Batch(torch.randn(count, *self.spec.shape), labels)
        draws = draw_inputs(batch, self.spec, config, state.step, self.device)
        autocast = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=config.training.precision == "bfloat16",
            cache_enabled=config.training.recompute != "pointwise",
        )
        target = state.network if state.target is None else state.target.network
        training_step(state.network, target, state.optimizer, draws, config, state.step, autocast)
        state.step += 1
        for average in (state.target, state.evaluation):
            if average is not None:
                average.update(state.network, state.step)

    def prepare(self) -> None:
        """Bring everything to the state between two steps."""
        for _ in range(2):
            self()  # AdamW's moments, and what is made once
        self.state.optimizer.zero_grad(set_to_none=True)
        gc.collect()

    def peak_of_allocations(self) -> int:
        """Bytes allocated at the peak of a step beyond those that are there between two steps."""
        self.prepare()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            return torch.cuda.max_memory_allocated(self.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self()
        assert profiler.profiler is not None
        assert profiler.profiler.kineto_results is not None
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak

    def peak_of_resident_memory(self) -> int | None:
        """The same in pages of the process, as Linux counts them; None elsewhere, and on a GPU."""
        if self.device.type != "cpu" or not CLEAR_REFS.exists():
            return None
        self.prepare()
        ctypes.CDLL(None).malloc_trim(0)
        before = _of_process("VmRSS")
        CLEAR_REFS.write_text("5")  # the highest is what there is now
        self()
        return _of_process("VmHWM") - before


def _of_process(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    precision = arguments.precision or ("bfloat16" if on_gpu else "float32")
    preset = arguments.preset or ("XL/2" if on_gpu else "mini/2")
    config = Config(
        # The spectral initialisation finds largest singular values: minutes for a large network.
        network=DiTConfig(preset=preset, spectral_init=False),
        objective=TVM(guidance_weight=2.0),
        training=TrainingConfig(batch_size=arguments.batch, precision=precision, compile=arguments.compile),
    )
    spec = image_spec((4, 32, 32), 1000)
    rows = []
    for recompute in ("none", "pointwise", "blocks"):
        training = replace(config.training, recompute=recompute)  # type: ignore[arg-type]
        chosen = replace(config, training=training)
        counted = estimate(chosen, spec, on_gpu=on_gpu)
        step = RealStep(chosen, spec, device)
        measured, resident = step.peak_of_allocations(), step.peak_of_resident_memory()
        beyond_state = counted.peak - counted.state
        rows.append(
            (
                recompute,
                counted.state / GB,
                beyond_state / GB,
                measured / GB,
                f"{100 * (beyond_state / measured - 1):+.1f} %",
                None if resident is None else resident / GB,
            )
        )
        del step
        gc.collect()
    columns = ("recompute", "state, GB", "beyond it, estimated", "measured", "off", "resident")
    print(
        f"{preset}, {arguments.batch} images of 4×32×32, {precision}, compile {arguments.compile}, {device}"
    )
    print(common.table(columns, rows))


if __name__ == "__main__":
    main()
