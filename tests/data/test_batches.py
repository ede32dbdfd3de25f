"""What a data set may give for a training step, and what is refused before it does harm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Disturbed, images, tiny_config
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from tvmatch.data import TensorDataset
from tvmatch.data.base import Batch
from tvmatch.errors import InputError
from tvmatch.training import Trainer
from tvmatch.training.state import untrained_network


def weights_of(network: nn.Module) -> Tensor:
    return parameters_to_vector(network.parameters()).detach()


def test_a_run_on_short_batches(tmp_path: Path) -> None:
    """A data set whose last batch of an epoch is short trains, in parts too."""

    def shorten(step: int, batch: Batch) -> Batch:
        assert batch.labels is not None
        return Batch(batch.values[: 1 + step], batch.labels[: 1 + step])

    runs = {}
    for accumulation in (1, 4):
        config = tiny_config(8, accumulation=accumulation)
        config.optimizer.learning_rate = 1e-4
        runs[accumulation] = Trainer(config, Disturbed(images(), shorten), tmp_path / str(accumulation))
        runs[accumulation].run()
    # Eight steps of AdamW in float32, whose first divide gradients by their own size.
    moved = weights_of(untrained_network(tiny_config(), images().spec)) - weights_of(runs[1].state.network)
    assert (
        weights_of(runs[4].state.network) - weights_of(runs[1].state.network)
    ).norm() < 0.01 * moved.norm()


X, Y = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(X[:0], Y[:0]), r"8 elements were asked for, it returned 0"),
        (Batch(torch.cat([X, X]), torch.cat([Y, Y])), r"8 elements were asked for, it returned 16"),
        (Batch(X[:, 0], Y), r"values must be a torch.float32 tensor of shape \(B, 1, 4, 4\).*\(8, 4, 4\)"),
        (Batch(X[..., :3], Y), r"values must .*\(B, 1, 4, 4\).*got torch.float32 of shape \(8, 1, 4, 3\)"),
        (Batch(X.double(), Y), "values must .*got torch.float64"),
        (Batch((X * 255).byte(), Y), "values must .*got torch.uint8"),
        (Batch(X.to("meta"), Y), "values must .* on the CPU, got .* on meta"),
        (Batch(torch.tensor(1.0), Y), r"values must .*of shape \(\)"),
        (Batch("x", Y), "values must .*got str"),
        (Batch(X, None), "spec has 3 classes, but none of its elements have labels"),
        (Batch(X, Y.float()), "labels must .*got torch.float32"),
        (Batch(X, Y[:, None]), r"labels must .*of shape \(8, 1\)"),
        (Batch(X, Y[:5]), "it returned 5 labels for 8 elements"),
        (Batch(X, Y + 1), "labels must lie in 0 … 2, got 3"),
        (Batch(X, Y - 1), "labels must lie in 0 … 2, got -1"),
        ((X, Y, Y, Y, Y), "must return a Batch of values and labels, got tuple"),
        ((X, Y, X), "spec has embedding_size None, but some of its elements have embeddings"),
        (3, "must return a Batch of values and labels, got int"),
    ],
)
def test_what_a_data_set_returns_is_checked(batch: Any, message: str, tmp_path: Path) -> None:
    data = Disturbed(images(), lambda step, _: batch if step == 1 else None)
    with pytest.raises(InputError, match=rf"Disturbed\.batch: ({message})"):
        Trainer(tiny_config(), data, tmp_path).run()


def test_a_pair_is_a_batch(tmp_path: Path) -> None:
    data = Disturbed(images(), lambda step, batch: tuple(batch))  # type: ignore[return-value,arg-type]
    assert Trainer(tiny_config(2), data, tmp_path).run().step == 2


def test_what_a_worker_returns_is_checked(tmp_path: Path) -> None:
    data = Disturbed(images(), lambda step, batch: Batch(batch.values[:0], Y[:0]))
    with pytest.raises(InputError, match=r"^Disturbed\.batch: 8 elements were asked for, it returned 0$"):
        Trainer(tiny_config(data_workers=1), data, tmp_path).run()


def test_labels_without_classes_are_refused(tmp_path: Path) -> None:
    data = Disturbed(
        TensorDataset(X), lambda step, batch: Batch(batch.values, torch.zeros(8, dtype=torch.int64))
    )
    config = tiny_config()
    config.objective.guidance_weight, config.objective.label_dropout = 1.0, 0.0
    with pytest.raises(InputError, match="spec has 0 classes, but some of its elements have labels"):
        Trainer(config, data, tmp_path).run()
