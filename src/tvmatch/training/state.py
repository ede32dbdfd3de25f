"""The training state: weights, their moving averages, the optimiser."""

from dataclasses import dataclass

import torch
from torch import nn

from tvmatch.acceleration import accelerate
from tvmatch.config.schema import Config, TrainingConfig
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.models import BaseNetwork, build_network
from tvmatch.models.ema import ParameterAverage


@dataclass
class TrainingState:
    """The training state; checkpoints save all of it.

    Attributes:
        network: the trained network.
        target: the moving average that is the target θ*; None if the target is another network.
        evaluation: the moving average for sampling.
        optimizer: AdamW over the network's parameters, in their order.
        step: number of optimiser steps done.
        seconds: wall-clock time of the training steps.
    """

    network: nn.Module
    target: ParameterAverage | None
    evaluation: ParameterAverage
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def untrained_network(config: Config, spec: DataSpec) -> BaseNetwork:
    """The network with initial weights, which depend only on the configuration and its seed.

    Raises:
        InputError: if it does not fit the data or into memory.
    """
    try:
        with torch.device("cpu"):  # PyTorch's default device may be another
            return build_network(
                config.network, spec.shape, spec.class_count, config.seed, embedding_size=spec.embedding_size
            )
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "Storage size" not in str(error):
            raise
        raise InputError("network", "too large for the memory of this machine") from None


def initial_state(
    config: Config, spec: DataSpec, device: torch.device | None, network: nn.Module | None = None
) -> TrainingState:
    """The state before the first step.

    Args:
        config: the run.
        spec: of its data.
        device: of the networks; None: the network is not moved.
        network: network with its initial weights. Default: `untrained_network`.

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


def accelerate_training(
    state: TrainingState,
    training: TrainingConfig,
    teacher: nn.Module | None = None,
    backend: str | None = None,
) -> None:
    """Apply recomputation and compilation to all networks except the evaluation average, which is saved."""
    accelerate(state.network, recompute=training.recompute, compiled=training.compile, backend=backend)
    for network in (None if state.target is None else state.target.network, teacher):
        if network is not None:
            accelerate(network, compiled=training.compile, backend=backend)
