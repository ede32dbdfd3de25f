"""A data set of embeddings with a mask and a network that reads them, in a whole run; no class is there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, tiny_config
from torch import Tensor, nn

import tvmatch
from tvmatch.condition import Condition
from tvmatch.config import Config
from tvmatch.data import DataSpec
from tvmatch.data.base import Batch, distinct_indices, epoch_indices
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap
from tvmatch.models import register_network
from tvmatch.objectives import TVM
from tvmatch.seeds import RowDraws
from tvmatch.training import Trainer

LENGTH, SIZE = 3, 4


@dataclass
class ReaderConfig:
    """Attributes:
    width: of the hidden layer.
    """

    width: int = 16


@register_network("reader of embeddings", ReaderConfig)
class Reader(nn.Module):
    """Points move by what the mean of the counted embeddings says; without any, by a vector of its own."""

    def __init__(
        self, config: ReaderConfig, shape: tuple[int, ...], class_count: int, *, seed: int | None = None
    ) -> None:
        super().__init__()
        (coordinates,) = shape
        self.enter = nn.Linear(coordinates + 3 + SIZE, config.width)
        self.leave = nn.Linear(config.width, coordinates)
        self.nothing = nn.Parameter(torch.ones(SIZE))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        assert labels is None
        read = self.nothing.expand(len(x), SIZE)
        if embeddings is not None:
            counted = torch.ones_like(embeddings[..., 0]) if mask is None else mask.to(embeddings.dtype)
            total = counted.sum(1, keepdim=True)
            mean = (counted[..., None] * embeddings).sum(1) / total.clamp(min=1)
            read = torch.where(total > 0, mean, read)
        weight = torch.ones_like(t) if guidance_weight is None else guidance_weight
        numbers = torch.stack([t, s, 1 / weight], dim=1)
        return self.leave(torch.tanh(self.enter(torch.cat([x, numbers, read], dim=1))))


class Captions:
    """Forty points, each with embeddings of one to three vectors that say where it is."""

    spec = DataSpec("points", (2,), None, (0.0, 0.0), (1.0, 1.0), embedding_size=SIZE)

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.values = torch.randn(40, 2, generator=random)
        self.embeddings = torch.randn(40, LENGTH, SIZE, generator=random)
        self.embeddings[:, 0, :2] = self.values
        self.mask = torch.arange(LENGTH) <= (torch.arange(40) % LENGTH)[:, None]

    def __len__(self) -> int:
        return len(self.values)

    def _select(self, indices: Tensor) -> Batch:
        return Batch(self.values[indices], None, self.embeddings[indices], self.mask[indices])

    def batch(self, step: int, size: int, seed: int) -> Batch:
        return self._select(epoch_indices(len(self), step, size, seed))

    def take(self, count: int, seed: int) -> Batch:
        return self._select(distinct_indices(len(self), count, seed))


def config(steps: int = 6, **objective: Any) -> Config:
    made = tiny_config(steps)
    made.network = ReaderConfig()
    made.objective = TVM(**({"guidance_weight": 2.0, "label_dropout": 0.5} | objective))
    return made


def test_it_trains_resumes_loads_and_samples(tmp_path: Path) -> None:
    """Stopped and resumed it is the run of one piece; samples hang on their own embeddings alone."""
    data = Captions()
    Trainer(config(), data, tmp_path / "whole", device="cpu").run()
    Trainer(config(), data, tmp_path / "parts", device="cpu").run(until=3)
    Trainer(config(), data, tmp_path / "parts", device="cpu", resume=tmp_path / "parts").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    model = tvmatch.load(tmp_path / "whole")
    assert model.spec == data.spec
    condition = data.take(5, 0).condition
    samples = model.sample(condition, seed=1)
    assert samples.shape == (5, 2)
    torch.testing.assert_close(model.sample(condition, seed=1, batch_size=2), samples, rtol=1e-6, atol=1e-7)
    assert torch.equal(model.sample(condition, seed=1, count=5), samples)
    changed = condition._replace(embeddings=condition.embeddings.clone())  # type: ignore[union-attr]
    changed.embeddings[2] += 1  # type: ignore[index]
    others = model.sample(changed, seed=1)
    assert [bool((a == b).all()) for a, b in zip(samples, others, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
    ]
    nothing = condition._replace(mask=torch.zeros(5, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(
        model.sample(nothing, seed=1), model.sample(count=5, seed=1), rtol=1e-6, atol=1e-7
    )
    assert not torch.equal(model.sample(count=5, seed=1), samples)


def test_dropped_embeddings() -> None:
    """Dropped for a half, with weight 1, and the mask says so; the others stay as they were."""
    batch = Captions().take(40, 0)
    inputs = TVM(guidance_weight=2.0, label_dropout=0.5).draw(
        batch.values, batch.condition, 0, RowDraws(0), range(40)
    )
    dropped = inputs.condition.guidance_weight == 1
    assert 5 < dropped.sum() < 35
    assert inputs.condition.mask is not None
    assert batch.mask is not None
    assert not inputs.condition.mask[dropped].any()
    assert torch.equal(inputs.condition.mask[~dropped], batch.mask[~dropped])
    assert inputs.condition.embeddings is batch.embeddings
    without_mask = Condition(embeddings=batch.embeddings).drop(dropped, 0)
    assert without_mask.mask is not None
    assert torch.equal(without_mask.mask, ~dropped[:, None].expand(40, LENGTH))


x, vectors = torch.zeros(4, 2), torch.zeros(4, LENGTH, SIZE)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(mask=torch.ones(4, 3, dtype=torch.bool)), "mask: needs embeddings"),
        (Condition(embeddings=vectors[:3]), r"embeddings: the shape \(4, L, D\) is needed, got \(3, 3, 4\)"),
        (Condition(embeddings=vectors[0]), r"embeddings: the shape \(4, L, D\) is needed, got \(3, 4\)"),
        (
            Condition(embeddings=vectors.long()),
            "embeddings: a floating-point dtype is needed, got torch.int64",
        ),
        (
            Condition(embeddings=vectors, mask=torch.ones(4, 3)),
            "mask: a bool dtype is needed, got torch.float32",
        ),
        (
            Condition(embeddings=vectors, mask=torch.ones(4, 2, dtype=torch.bool)),
            r"mask: the shape \(4, 3\) is needed, got \(4, 2\)",
        ),
        (Condition(embeddings=vectors.to("meta")), "embeddings: the device cpu of the data is needed"),
        (Condition(labels=torch.zeros(4, 1).long()), r"labels: the shape \(4,\) is needed"),
    ],
)
def test_a_condition_of_other_samples_is_refused(condition: Condition, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        condition.check(x)


def test_rows_and_devices() -> None:
    condition = Condition(torch.arange(4), torch.ones(4), vectors, torch.ones(4, 3, dtype=torch.bool))
    part = condition.rows(slice(1, 3))
    assert [len(tensor) for tensor in part if tensor is not None] == [2, 2, 2, 2]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 2]
    assert all(tensor.device.type == "meta" for tensor in condition.to("meta") if tensor is not None)
    free = condition.unconditional()
    assert free.is_unconditional
    assert torch.equal(free.guidance_weight, torch.ones(4))  # type: ignore[arg-type]


def test_a_data_set_that_is_not_as_its_spec_says(tmp_path: Path) -> None:
    class Without(Captions):
        def batch(self, step: int, size: int, seed: int) -> Batch:
            return super().batch(step, size, seed)._replace(embeddings=None, mask=None)

    class Narrow(Captions):
        def batch(self, step: int, size: int, seed: int) -> Batch:
            batch = super().batch(step, size, seed)
            return batch._replace(embeddings=batch.embeddings[..., :2])  # type: ignore[index]

    for data, message in (
        (Without(), "Without.batch: spec has embedding_size 4, but none of its elements have embeddings"),
        (Narrow(), "Narrow.batch: embeddings of size 4 are needed, got 2"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(config(), data, tmp_path / type(data).__name__, device="cpu").run()


def test_samples_of_another_size_are_refused(tmp_path: Path) -> None:
    model = Trainer(config(), Captions(), tmp_path, device="cpu").trained_model()
    with pytest.raises(InputError, match="labels: embeddings of size 5, the model was trained with 4"):
        model.sample(Condition(embeddings=torch.zeros(2, 3, 5)))
    with pytest.raises(InputError, match="labels: give the guidance weight as guidance"):
        model.sample(Condition(embeddings=vectors, guidance_weight=torch.ones(4)))
    with pytest.raises(InputError, match=r"labels: a Condition of \[4\] samples, for a count of 3"):
        model.sample(Condition(embeddings=vectors), count=3)
    with pytest.raises(InputError, match=r"objective\.label_dropout: must be positive"):
        Trainer(config(label_dropout=0.0), Captions(), tmp_path / "other", device="cpu")


def test_distillation(tmp_path: Path) -> None:
    """The teacher is asked with the embeddings; its guided velocity is the student's target."""
    data = Captions()
    Trainer(config(guidance_weight=1.0), data, tmp_path / "teacher", device="cpu").run()
    made = config(teacher=str(tmp_path / "teacher"), label_dropout=0.0)
    trainer = Trainer(made, data, tmp_path / "student", device="cpu")
    batch = data.take(8, 0)
    velocity = FlowMap(tvmatch.load(tmp_path / "teacher").network, scaled=True).velocity
    s = torch.full((8,), 0.4)
    weight = torch.full((8,), 2.0)
    told = FlowMap(trainer.target, scaled=True).velocity(
        batch.values, s, batch.condition._replace(guidance_weight=weight)
    )
    guided = 2 * velocity(batch.values, s, batch.condition) - velocity(batch.values, s)
    torch.testing.assert_close(told, guided, rtol=1e-5, atol=1e-6)  # a division and a product by w
    trainer.run()


def test_a_teacher_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    tvmatch.train(config(guidance_weight=1.0), Captions(), tmp_path / "teacher", device="cpu")
    others = Captions()
    others.embeddings = torch.cat([others.embeddings, others.embeddings[..., :1]], 2)
    others.spec = replace(Captions.spec, embedding_size=SIZE + 1)
    student = config(teacher=str(tmp_path / "teacher"))
    with pytest.raises(
        InputError, match=r"^objective\.teacher: the data's embedding_size is 4 in .*, here it is 5"
    ):
        Trainer(student, others, tmp_path / "student", device="cpu")
