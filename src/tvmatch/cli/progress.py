"""Progress on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_PER_LINE = 60


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


@contextmanager
def progress_bar(text: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, or one line a minute if standard error is not a terminal.

    Yields a function of (parts done, all parts).
    """
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    bar = shown and console.is_terminal
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        progress.update(task, completed=done, total=total)
        if shown and not bar and time.monotonic() - last > _SECONDS_PER_LINE:
            last = time.monotonic()
            print(f"{text}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    with Progress(*columns, console=console, transient=True, disable=not bar) as progress:
        task = progress.add_task(text, total=None)
        yield report
