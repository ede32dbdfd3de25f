"""What a run starts from: a device, a folder, untrained weights, and the batches to come."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tvmatch.data.base import Batch, Dataset, checked_labels
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.seeds import fold
from tvmatch.trained_model import build_network
from tvmatch.training.checkpoint import TrainingState
from tvmatch.training.config import Config
from tvmatch.training.ema import ParameterAverage
from tvmatch.training.signals import ignore_signals

CONFIG_NAME = "config.yaml"


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: for a name that PyTorch does not know, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":  # PyTorch knows it, but it holds no numbers
        raise InputError(f"device: no device is called {name!r}; take auto, cpu, cuda, cuda:1, …")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
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
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if resume is None:
        run = (out / CONFIG_NAME).is_file()
        raise InputError(
            f"out: {out} holds another run; continue it with --resume {out}, or give another --out"
            if run
            else f"out: {out} is no empty folder; give another --out"
        )
    if not (out / CONFIG_NAME).is_file():
        raise InputError(f"resume: {out} is not a run, it has no {CONFIG_NAME}")


def untrained_network(config: Config, spec: DataSpec) -> nn.Module:
    """The network with initial weights, a function of the configuration's seed alone.

    Raises:
        InputError: if it does not fit the data.
    """
    with torch.random.fork_rng():
        torch.manual_seed(fold(config.seed, "weights"))
        return build_network(config.network, spec)


def initial_state(
    config: Config, spec: DataSpec, device: torch.device, network: nn.Module | None = None
) -> TrainingState:
    """The network as it starts, with both averages and AdamW.

    Args:
        config: the run.
        spec: of its data.
        device: where to put everything.
        network: with the weights to start from; by default those of the configuration's seed.

    Raises:
        InputError: if the network does not fit the data.
    """
    network = (untrained_network(config, spec) if network is None else network).to(device)
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


def step_batches(dataset: Dataset, config: Config, steps: Sequence[int]) -> Iterator[Batch]:
    """The batches of the steps (from 0) of a run, read ahead by its workers if it has any."""
    batches = DataLoader(
        _StepBatches(dataset, config.training.batch_size, config.seed),
        batch_size=None,
        sampler=steps,
        num_workers=config.training.data_workers,
        worker_init_fn=ignore_signals,
    )
    return (checked_labels(batch, dataset.spec) for batch in batches)


class _StepBatches(TorchDataset[Batch]):
    """Item k is the batch of optimiser step k, whoever reads it and in whichever process."""

    def __init__(self, dataset: Dataset, size: int, seed: int) -> None:
        self.dataset, self.size, self.seed = dataset, size, seed

    def __getitem__(self, step: int) -> Batch:
        return self.dataset.batch(step, self.size, self.seed)
