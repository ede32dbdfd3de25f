"""The batches of a run's steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from tvmatch.config.schema import Config
from tvmatch.data.base import Batch, Dataset
from tvmatch.data.read_ahead import read_ahead


def step_batches(
    dataset: Dataset, config: Config, steps: Sequence[int], *, stopped: Callable[[], object] = bool
) -> AbstractContextManager[Iterator[Batch]]:
    """The batches of the steps (from 0) of a run, read ahead by its workers if it has any.

    They end early when `stopped` is true while a worker is waited for. Raises: see `read_ahead`.
    """
    read = partial(_step_batch, dataset, config.training.batch_size, config.seed)
    return read_ahead(read, steps, config.training.data_workers, stopped=stopped)


def _step_batch(dataset: Dataset, size: int, seed: int, step: int) -> Batch:
    """The same, whoever reads it and in whichever process."""
    return dataset.batch(step, size, seed)
