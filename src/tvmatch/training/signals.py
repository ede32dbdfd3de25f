"""Save the run, then end it, on Ctrl-C (SIGINT) and SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818  # not an error: the run is saved and can be resumed
    """SIGINT or SIGTERM ended the run after a checkpoint was saved.

    Attributes:
        signal_number: number of the signal.
        checkpoint: the saved checkpoint.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(f"{name}: saved {checkpoint}; train with resume=True to continue")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


@contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Append the first SIGINT or SIGTERM to the yielded list instead of ending the process.

    After the first signal the previous handlers are restored, so a second one has its usual effect. Outside
    the main thread, where Python allows no signal handlers, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.getsignal(number) for number in _NUMBERS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        restore()
