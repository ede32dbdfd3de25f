"""The batches of a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from tvmatch.config.schema import Config
from tvmatch.data.base import Batch, Dataset
from tvmatch.data.read_ahead import read_ahead


def step_batches(
    dataset: Dataset, config: Config, steps: Sequence[int], *, stopped: Callable[[], object] = bool
) -> AbstractContextManager[Iterator[Batch]]:
    """The batches of the given steps (from 0), read ahead by worker processes if there are any.

    The iterator ends early if `stopped()` is true while it waits for a worker. Raises: see `read_ahead`.
    """
    read = partial(_step_batch, dataset, config.training.batch_size, config.seed)
    return read_ahead(read, steps, config.training.data_workers, stopped=stopped)


def _step_batch(dataset: Dataset, size: int, seed: int, step: int) -> Batch:
    """The batch of a step; it does not depend on the process that reads it."""
    return dataset.batch(step, size, seed)
