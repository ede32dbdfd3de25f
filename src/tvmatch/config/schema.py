"""The configuration of a run as dataclasses, filled from YAML files and the command line."""

from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from tvmatch.acceleration import Recompute
from tvmatch.data.config import ImagesData
from tvmatch.errors import InputError
from tvmatch.models import network_class_of
from tvmatch.objectives import TVM, Objective
from tvmatch.option_checks import check_fields, require, require_whole


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        learning_rate: the maximum of the schedule.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        decay_fraction: fraction of the steps, at the end, over which it decreases linearly to 0; 0: constant.
        gradient_clip: maximum gradient norm; null: no clipping.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_fraction: float = 0.0
    gradient_clip: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        require("optimizer.learning_rate", self.learning_rate, self.learning_rate > 0, "positive")
        require("optimizer.beta1", self.beta1, 0 <= self.beta1 < 1, "in [0, 1)")
        require("optimizer.beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1)")
        require("optimizer.epsilon", self.epsilon, self.epsilon > 0, "positive")
        require("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        require_whole("optimizer.warmup_steps", self.warmup_steps, 0)
        fraction = self.decay_fraction
        require("optimizer.decay_fraction", fraction, 0 <= fraction <= 1, "in [0, 1]")
        if self.gradient_clip is not None:
            require("optimizer.gradient_clip", self.gradient_clip, self.gradient_clip > 0, "positive or null")

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of optimiser step `step` (from 0) of `steps`: warm-up, constant, linear decay."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay_steps = self.decay_fraction * steps
        decay = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
        return self.learning_rate * warmup * decay


@dataclass
class TrainingConfig:
    """Length, batches, averages and schedules of a run.

    Attributes:
        steps: optimiser steps.
        batch_size: samples per optimiser step.
        accumulation: number of parts of a batch that are processed one after the other, to save memory.
        precision: auto is bfloat16 autocast if the device supports it, else float32.
        compile: torch.compile the networks; the first step takes a minute or more.
        recompute: parts that the backward pass computes again to save memory: norms and activation functions
            (pointwise) or whole blocks.
        evaluation_ema: rate of the moving average of the weights that is sampled and saved.
        ema_warmup: limit the rates of both averages to (1 + n) / (10 + n) after n steps, for short runs.
        data_workers: processes that read batches in advance; 0: the training process reads.
        log_every: steps between log entries.
        sample_every: steps between pictures of samples; 0: none during training.
        checkpoint_every: steps between checkpoints; the last step always has a checkpoint.
        keep_checkpoints: number of newest checkpoints to keep; null: all.
    """

    steps: int = 300_000
    batch_size: int = 64
    accumulation: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    recompute: Recompute = "none"
    evaluation_ema: float = 0.9999
    ema_warmup: bool = False
    data_workers: int = 0
    log_every: int = 50
    sample_every: int = 1_000
    checkpoint_every: int = 1_000
    keep_checkpoints: int | None = 2

    def __post_init__(self) -> None:
        check_fields(self, "training")
        for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every"):
            require_whole(f"training.{name}", getattr(self, name), 1)
        for name in ("data_workers", "sample_every"):
            require_whole(f"training.{name}", getattr(self, name), 0)
        if self.keep_checkpoints is not None:
            require_whole("training.keep_checkpoints", self.keep_checkpoints, 1)
        rate = self.evaluation_ema
        require("training.evaluation_ema", rate, 0 <= rate < 1, "in [0, 1)")
        if self.batch_size % self.accumulation:
            raise InputError(
                "training.accumulation",
                f"{self.accumulation} does not divide training.batch_size {self.batch_size}",
            )


@dataclass(kw_only=True)
class Config:
    """A complete run.

    Attributes:
        recipe: name of the run.
        seed: of the initial weights, the data order, the noise and the times.
        initial: checkpoint with the initial weights (fine-tuning); null: random weights.
        data: the data set; None if it is passed from Python.
        network: sizes and options of the network.
        objective: the objective with its options.
        optimizer: AdamW and its schedule.
        training: length, batches, averages and schedules.
    """

    recipe: str = "custom"
    seed: int = 0
    initial: str | None = None
    data: Any = None
    network: Any = None
    objective: Objective = field(default_factory=TVM)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_fields(self, "", but=("data", "network"))
        require_whole("seed", self.seed, 0)

    def check(self) -> None:
        """Check all options again, after they may have been changed.

        Raises:
            InputError: naming an option that is unknown, of another type, out of range, or incompatible with
                another.
        """
        network_class = network_class_of(self.network)
        check_fields(self.network, "network")
        if is_dataclass(self.data):
            check_fields(self.data, "data")
        for section in (self, self.objective, self.optimizer, self.training, self.network):
            if hasattr(section, "__post_init__"):
                section.__post_init__()
        weight = self.objective.guidance_weight
        if isinstance(weight, tuple) and not network_class.takes_guidance_weight(self.network):
            raise InputError(
                "network.guidance_embedding",
                f"must be true for a range of guidance weights {list(weight)}, which the network could not "
                "tell apart",
            )
        if isinstance(self.data, ImagesData):  # before the images are prepared
            if self.data.label_column is None:
                self.objective.check(False, hint=" (data.label_column names the column of classes)")
            size = f"data.resolution {self.data.resolution}"
            network_class.check(self.network, self.data.shape, size)
        else:
            network_class.check(self.network)
