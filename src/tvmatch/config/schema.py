"""The configuration of a run as dataclasses: the recipes' YAML files and the command line fill them."""

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
        learning_rate: the highest of the schedule.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        decay_fraction: last part of all steps over which it falls linearly to 0; 0 keeps it constant.
        gradient_clip: largest gradient norm; null does not clip.
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
        batch_size: samples an optimiser step.
        accumulation: parts a batch is split into, one after the other, to save memory.
        precision: auto takes bfloat16 autocast where the device has it, else float32.
        compile: torch.compile the networks; the first step takes a minute or more.
        recompute: what the backward pass computes again to save memory, norms and activation functions
            (pointwise) or whole blocks.
        evaluation_ema: rate of the moving average of the weights that is sampled and saved.
        ema_warmup: bound both averages' rates by (1 + n) / (10 + n) after n steps, for short runs.
        data_workers: processes that read batches ahead; 0 reads in the training process.
        log_every: steps between log entries.
        sample_every: steps between pictures of samples; 0 draws none during training.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints that are kept; null keeps all.
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
        recipe: the name it goes by.
        seed: of the initial weights, the data order, the noise and the times.
        initial: a checkpoint whose weights the run starts from (fine-tuning); null draws them.
        data: the data set; None for one that is given from Python.
        network: size and switches of the network.
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
        """Check everything once more, for a configuration that was changed after it was made.

        Raises:
            InputError: naming the option that is unknown, of another type, out of range, or does not go with
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
