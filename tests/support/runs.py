"""Shared by the tests of training and of the command line: runs of a second, and what they leave on disk."""

import hashlib
import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tvmatch.config import Config
from tvmatch.config.schema import OptimizerConfig, TrainingConfig
from tvmatch.data import TensorDataset
from tvmatch.data.base import Batch, Dataset
from tvmatch.data.spec import DataSpec
from tvmatch.models import DiTConfig, MLPConfig
from tvmatch.training import checkpoints

TINY_DIT = DiTConfig(hidden_size=8, depth=1, heads=2, patch_size=2, time_frequencies=4)
TINY_MLP = MLPConfig(hidden_size=8, depth=1, time_frequencies=4)

# The same for the command line, after a recipe of images and for a few steps.
SHORT_RUN = [
    "--objective.guidance_weight=1",
    "--training.steps=4",
    "--training.batch_size=8",
    "--training.log_every=1",
    "--training.sample_every=0",
    "--training.checkpoint_every=100",
]
TINY_NETWORK = [
    "--network.preset=null",
    "--network.hidden_size=8",
    "--network.depth=1",
    "--network.heads=2",
    "--network.patch_size=2",
    "--network.time_frequencies=4",
]
TINY_POINTS = ["--network.hidden_size=8", "--network.depth=1", "--network.time_frequencies=4"]


def environment() -> dict[str, str]:
    """For processes of a test's own: one thread, and these helpers within reach."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def images(count: int = 20, **options: Any) -> TensorDataset:
    """Random 4 × 4 images of three classes. Twenty make batches of eight cross the ends of epochs."""
    random = torch.Generator().manual_seed(0)
    values = torch.rand(count, 1, 4, 4, generator=random)
    labels = torch.arange(count) % 3
    return TensorDataset(values, labels, class_names=["ant", "bee", "cow"], **options)


def tiny_config(steps: int = 8, **training: Any) -> Config:
    """A short run on `images()`, logged at every step, without pictures; nothing of it is a recipe's."""
    settings: dict[str, Any] = {"batch_size": 8, "log_every": 1, "sample_every": 0, "checkpoint_every": 3}
    return Config(
        network=deepcopy(TINY_DIT),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        training=TrainingConfig(steps=steps, **(settings | training)),
    )


def every_switch(steps: int = 8, **training: Any) -> Config:
    """A run in which everything random or stateful takes part."""
    config = tiny_config(steps, accumulation=2, ema_warmup=True, **training)
    config.objective.guidance_weight = (1.5, 3.0)
    config.objective.label_dropout = 0.3
    config.objective.times.equal_probability = 0.2
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_steps = 3
    config.optimizer.decay_fraction = 0.5
    config.optimizer.gradient_clip = 0.5
    return config


@dataclass
class Disturbed:
    """A data set that does something before it gives the batch of a step, and may change the batch."""

    inner: Dataset
    disturb: Callable[[int, Batch], Batch | None]

    @property
    def spec(self) -> DataSpec:
        return self.inner.spec

    @property
    def class_counts(self) -> list[int] | None:
        return getattr(self.inner, "class_counts", None)

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def batch(self, step: int, size: int, seed: int) -> Batch:
        batch = self.inner.batch(step, size, seed)
        return self.disturb(step, batch) or batch

    def take(self, count: int, seed: int) -> Batch:
        return self.inner.take(count, seed)


def newest(run: Path) -> Path:
    return checkpoints(run)[-1]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights, both averages and AdamW's moments."""
    tensors = load_file(checkpoint / "training.safetensors")
    return tensors | {
        f"evaluation/{name}": x for name, x in load_file(checkpoint / "model.safetensors").items()
    }


def assert_same_run(actual: Path, expected: Path) -> None:
    """Every tensor of the last checkpoint bit for bit, its description, and every scalar of the log."""
    ours, theirs = newest(actual), newest(expected)
    assert ours.name == theirs.name
    tensors, wanted = saved_tensors(ours), saved_tensors(theirs)
    assert tensors.keys() == wanted.keys()
    assert {name.split("/")[0] for name in wanted} >= {"network", "evaluation", "exp_avg", "exp_avg_sq"}
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name
    assert description(ours) == description(theirs)
    assert (actual / "log.jsonl").read_text() == (expected / "log.jsonl").read_text()


def description(checkpoint: Path) -> dict[str, Any]:
    """`model.json` without the time that training took."""
    content: dict[str, Any] = json.loads((checkpoint / "model.json").read_text())
    del content["provenance"]["train_seconds"]
    return content


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }
