"""What `torchrun` tells a process: how many there are and which it is, by environment variables."""

import os

from tvmatch.errors import InputError


def several() -> bool:
    """Whether this process is one of several."""
    return os.environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1")


def rank_and_count() -> tuple[int, int] | None:
    """The number of this process, and of all; None where nobody says so.

    Raises:
        InputError: if the variables are another launcher's.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return None
    rank, count = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise InputError(
            f"RANK and WORLD_SIZE must be torchrun's, 0 … N − 1 and N, got {rank!r} and {count!r}"
        )
    return int(rank), int(count)


def is_first() -> bool:
    """Whether this process is the one that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int | None:
    """The number of this process among those of its machine."""
    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None else int(rank)


def is_watched() -> bool:
    """Whether torchrun itself is there, which ends all processes when one has failed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def refuse_several(what: str) -> None:
    """For what has no form for several processes yet.

    Raises:
        InputError: if there are several.
    """
    if several():
        raise InputError(
            "WORLD_SIZE",
            f"{os.environ['WORLD_SIZE']} processes, but {what} is for one; start it without torchrun",
        )
