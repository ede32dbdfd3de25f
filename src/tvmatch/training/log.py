"""The log of a run: progress bar, `log.jsonl` and TensorBoard events."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from tvmatch.storage.files import parse_json, replacing

LOG_NAME = "log.jsonl"


class RunLog:
    """Writes the scalars of a run to the terminal, to `log.jsonl` and to TensorBoard.

    When a run is resumed, the rows of `log.jsonl` after step `first_step` are removed.

    Args:
        run: the run folder.
        first_step: number of steps done so far.
        steps: total number of steps.
        batch_size: samples per step.
        unit: name of the samples, such as "images".
        terms: names of the loss terms that the progress bar shows.

    Raises:
        OSError: also in every method, if a file cannot be written.
    """

    def __init__(
        self, run: Path, first_step: int, steps: int, batch_size: int, unit: str, terms: Sequence[str]
    ) -> None:
        self.console = Console(stderr=True)
        self.steps, self.batch_size, self.unit, self.terms = steps, batch_size, unit, terms
        self.path = run / LOG_NAME
        kept = [row for row in read_log(run) if row["step"] <= first_step]
        with replacing(self.path) as unfinished:
            unfinished.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        self.events = EventFile(run, first_step)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=steps, completed=first_step, terms="")
        self.last_scalars = (first_step, time.perf_counter())
        self.last_line = first_step

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        with suppress(*([Exception] if kind else [])):  # do not hide the original exception
            self.events.close()
        with suppress(*([Exception] if kind else [])):
            self.file.close()

    def advance(self, step: int) -> None:
        """Set the progress bar to `step` completed steps."""
        self.progress.update(self.task, completed=step)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of `step`."""
        self.file.write(_line({"step": step, **scalars}))
        self.file.flush()
        for name, value in scalars.items():
            self.events.write(step, summary.scalar(name if "/" in name else f"training/{name}", value))
        self.events.flush()
        self._show(step, scalars)

    def _show(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.perf_counter()
        (past, then), self.last_scalars = self.last_scalars, (step, now)
        rate = self.batch_size * (step - past) / max(now - then, 1e-9)
        values = "  ".join(f"{name} {scalars[name]:.4f}" for name in self.terms)
        terms = f"{values}  {rate:,.0f} {self.unit}/s"
        self.progress.update(self.task, terms=terms)
        tenths = [10 * number // self.steps for number in (self.last_line, step)]
        if (
            not self.console.is_terminal and tenths[1] > tenths[0]
        ):  # without a terminal: ten lines instead of a bar
            self.last_line = step
            self.console.print(f"step {step:,}/{self.steps:,}  {terms}", highlight=False, soft_wrap=True)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Write an image to TensorBoard."""
        pixels = np.asarray(image)
        self.events.write(step, summary.image(name, pixels, dataformats="HW" if pixels.ndim == 2 else "HWC"))

    def flush(self) -> None:
        """Flush all files, and `log.jsonl` to disk, before a checkpoint is written."""
        self.events.flush()
        os.fsync(self.file.fileno())

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)


class EventFile:
    """TensorBoard events, written synchronously.

    `SummaryWriter` writes in a thread, which prints a traceback when the disk is full.

    Args:
        run: the run folder; each start of the run adds a file.
        first_step: number of steps done so far; TensorBoard ignores later steps in earlier files.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        # TensorBoard reads files in the order of their names.
        self.writer = RecordWriter((run / f"events.out.tfevents.{time.time_ns()}").open("xb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        self.flush()

    def write(self, step: int, content: Summary) -> None:
        """Add a scalar or an image of `step`."""
        self._write(Event(wall_time=time.time(), step=step, summary=content))

    def _write(self, event: Event) -> None:
        self.writer.write(event.SerializeToString())

    def flush(self) -> None:
        """Flush to the operating system."""
        self.writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


def read_log(run: Path) -> list[dict[str, float]]:
    """Read the rows of a run's `log.jsonl`, up to the first line that is not valid JSON.

    The last line may be incomplete if the run was killed.
    """
    path = run / LOG_NAME
    rows: list[dict[str, float]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(parse_json(line))
        except ValueError:
            break
    return rows


def _line(row: Mapping[str, float]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
