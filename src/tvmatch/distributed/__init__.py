"""Several processes: rank and device of this process, small exchanges, and common failure."""

from tvmatch.distributed.failures import ProcessError
from tvmatch.distributed.launch import (
    Position,
    device_of_process,
    is_first,
    is_reported_by_another,
    launched,
    leave_last,
    print_once,
    refuse_several,
    several,
)
from tvmatch.distributed.processes import ALONE, Processes, joined_processes

__all__ = [
    "ALONE",
    "Position",
    "ProcessError",
    "Processes",
    "device_of_process",
    "is_first",
    "is_reported_by_another",
    "joined_processes",
    "launched",
    "leave_last",
    "print_once",
    "refuse_several",
    "several",
]
