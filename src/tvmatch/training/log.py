"""What a run writes while it goes: a progress bar, `log.jsonl`, and TensorBoard events."""

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
    """The scalars of a run, to the terminal, to `log.jsonl` and to TensorBoard.

    A resumed run first drops what an interrupted one wrote after the checkpoint.

    Args:
        run: the run folder.
        first_step: steps done so far.
        steps: steps in all.
        batch_size: samples a step.
        unit: what a sample is called.
        terms: names of the loss's terms, which the progress bar shows.

    Raises:
        OSError: here and in every method, if a file cannot be written.
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
        with suppress(*([Exception] if kind else [])):  # the first of several failures is the one to tell
            self.events.close()
        with suppress(*([Exception] if kind else [])):
            self.file.close()

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        self.progress.update(self.task, completed=step)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of `step`."""
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
        if not self.console.is_terminal and tenths[1] > tenths[0]:  # a file gets ten lines, not a bar
            self.last_line = step
            self.console.print(f"step {step:,}/{self.steps:,}  {terms}", highlight=False, soft_wrap=True)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Show a picture in TensorBoard."""
        pixels = np.asarray(image)
        self.events.write(step, summary.image(name, pixels, dataformats="HW" if pixels.ndim == 2 else "HWC"))

    def flush(self) -> None:
        """Make sure that what was recorded so far is on the disk, before a checkpoint counts on it."""
        self.events.flush()
        os.fsync(self.file.fileno())

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)


class EventFile:
    """TensorBoard events, written at once: `SummaryWriter` has a thread that a full disk kills unseen.

    Args:
        run: the folder; every start of a run adds a file.
        first_step: TensorBoard hides what earlier files hold of later steps.
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
        """Hand what was written to the operating system."""
        self.writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


def read_log(run: Path) -> list[dict[str, float]]:
    """The rows of a run's `log.jsonl`; a last line cut off by a kill is left out."""
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
