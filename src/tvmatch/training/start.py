"""What a run starts from: a device, a folder, untrained weights, and the batches to come."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tvmatch.data.base import Batch, Dataset
from tvmatch.data.read_ahead import read_ahead
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.locks import LOCK_NAME, FolderLock, is_lock
from tvmatch.models import BaseNetwork, build_network
from tvmatch.training.checkpoint import TrainingState
from tvmatch.training.config import Config
from tvmatch.training.ema import ParameterAverage

CONFIG_NAME = "config.yaml"


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: for a name that PyTorch does not know, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):  # of names that PyTorch is going to forget
            device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":  # PyTorch knows it, but it holds no numbers
        raise InputError("device", f"no device is called {name!r}; take auto, cpu, cuda, cuda:1, …")
    try:
        torch.empty(0, device=device)
    except (NotImplementedError, ImportError):  # whose message is a page about operators and backends
        raise InputError("device", f"{name!r} cannot be used (this PyTorch is built without it)") from None
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        if "INTERNAL ASSERT" in reason:
            reason = "PyTorch has no tensors there"
        raise InputError("device", f"{name!r} cannot be used ({reason})") from None
    return device


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`wanted`, or for "auto" bfloat16 where the device computes it itself, else float32."""
    if wanted != "auto":
        return wanted
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if supported else "float32"


def check_out(out: Path, resume: str | Path | None) -> None:
    """Refuse a folder that a run must not write to.

    Raises:
        InputError: unless `out` is missing or empty, or holds the run to resume.
    """
    if not out.exists() or (out.is_dir() and all(is_lock(path.name) for path in out.iterdir())):
        return
    if resume is None:
        run = (out / CONFIG_NAME).is_file()
        raise InputError(
            "out",
            f"{out} holds another run; continue it with --resume {out}, or give another --out"
            if run
            else f"{out} is no empty folder; give another --out",
        )
    if not (out / CONFIG_NAME).is_file():
        raise InputError("resume", f"{out} is not a run, it has no {CONFIG_NAME}")


def lock_run(out: Path, resume: str | Path | None) -> FolderLock:
    """The lock of a run folder that may be written to: nobody else trains in it until it is released.

    Raises:
        InputError: as `check_out`, or if another run holds the lock.
    """
    if not (out / CONFIG_NAME).is_file() and not (out / LOCK_NAME).exists():
        check_out(out, resume)  # before there is a lock in a folder of something else
    lock = FolderLock(out, doing="trains in it")
    try:
        check_out(out, resume)
    except BaseException:
        lock.release()
        raise
    return lock


def untrained_network(config: Config, spec: DataSpec) -> BaseNetwork:
    """The network with initial weights, a function of the configuration's seed alone.

    No random state of the process takes part or changes, so threads may do this at the same time.

    Raises:
        InputError: if it does not fit the data, or into memory.
    """
    try:
        with torch.device("cpu"):  # whatever PyTorch's default is
            return build_network(config.network, spec.shape, spec.class_count, config.seed)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "Storage size" not in str(error):
            raise
        raise InputError("network", "too large for the memory of this machine") from None


def initial_state(
    config: Config, spec: DataSpec, device: torch.device | None, network: nn.Module | None = None
) -> TrainingState:
    """The network as it starts, with both averages and AdamW.

    Args:
        config: the run.
        spec: of its data.
        device: where to put everything; None leaves it where it is made.
        network: with the weights to start from; by default those of the configuration's seed.

    Raises:
        InputError: if the network does not fit the data.
    """
    network = untrained_network(config, spec) if network is None else network
    network = network if device is None else network.to(device)
    target_rate, warmup, settings = config.objective.target_ema, config.training.ema_warmup, config.optimizer
    if config.objective.teacher is not None:
        target_rate = 0.0
    return TrainingState(
        network=network,
        target=ParameterAverage(network, target_rate, warmup=warmup) if target_rate else None,
        evaluation=ParameterAverage(network, config.training.evaluation_ema, warmup=warmup),
        optimizer=torch.optim.AdamW(
            network.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        ),
    )


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
