"""What a run writes while it goes: a progress bar, `log.jsonl`, and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"


class RunLog:
    """The scalars of a run, to the terminal, to `log.jsonl` and to TensorBoard.

    A resumed run first drops what an interrupted one wrote after the checkpoint.

    Args:
        run: the run folder.
        first_step: steps done so far.
        steps: steps in all.
    """

    def __init__(self, run: Path, first_step: int, steps: int) -> None:
        self.console = Console(stderr=True)
        self.steps = steps
        self.path = run / LOG_NAME
        kept = [row for row in read_log(run) if row["step"] <= first_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a")
        self.events = SummaryWriter(str(run), purge_step=first_step + 1 if first_step else None)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("terminal {task.fields[terminal]:.4f}  flow {task.fields[flow]:.4f}"),
            TextColumn("{task.fields[rate]:.0f}/s"),
            TimeRemainingColumn(),
            console=self.console,
        )
        nan = float("nan")
        self.task = self.progress.add_task(
            "training", total=steps, completed=first_step, terminal=nan, flow=nan, rate=0
        )

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.events.close()
        self.file.close()

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        self.progress.update(self.task, completed=step)

    def scalars(self, step: int, scalars: Mapping[str, float], rate: float) -> None:
        """Record the scalars of `step`; `rate` is in samples a second."""
        self.progress.update(self.task, terminal=scalars["terminal"], flow=scalars["flow"], rate=rate)
        row = {"step": step, **scalars}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in scalars.items():
            self.events.add_scalar(name if "/" in name else f"training/{name}", value, step)
        if not self.console.is_terminal and step % max(self.steps // 10, 1) == 0:
            self.console.print(
                f"step {step}/{self.steps}  terminal {scalars['terminal']:.4f}  flow {scalars['flow']:.4f}  "
                f"{rate:.0f}/s",
                highlight=False,
            )

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        self.console.print(text, highlight=False, soft_wrap=True)


def read_log(run: Path) -> list[dict[str, float]]:
    """The rows of a run's `log.jsonl`; a last line cut off by a kill is left out."""
    path = run / LOG_NAME
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
