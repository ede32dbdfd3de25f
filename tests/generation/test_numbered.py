"""Labels and bytes as others make theirs: drawn at random, truncated."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import randomize_, small_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from small_extractor import SmallExtractor
from torch import Tensor

import tvmatch
from tvmatch.cli import main
from tvmatch.data import TensorDataset
from tvmatch.data.spec import DataSpec
from tvmatch.errors import InputError
from tvmatch.evaluation import FeatureRequest, evaluate_features
from tvmatch.evaluation.references import cache
from tvmatch.generation.numbered import numbered_samples, sample_labels
from tvmatch.generation.uint8 import as_uint8, to_bytes
from tvmatch.trained_model import TrainedModel, load

EXTRACTOR = "--extractor=small_extractor:SmallExtractor"


def model(class_count: int = 4, **provenance: Any) -> TrainedModel:
    names = tuple("abcdefgh"[:class_count]) or None
    spec = DataSpec("image", (3, 4, 4), names, (0.5,) * 3, (0.5,) * 3)
    network = randomize_(small_dit((3, 4, 4), class_count)).requires_grad_(False).eval()
    return TrainedModel(network, spec, scaled=False, guidance=1.0, provenance=provenance)


COUNTED = model(class_counts=[1, 2, 3, 4])


class TestLabels:
    @pytest.mark.parametrize(
        ("source", "counts", "shares"),
        [("uniform", None, [0.25] * 4), ("data", [30, 0, 10, 60], [0.3, 0, 0.1, 0.6])],
    )
    def test_shares(self, source: Any, counts: list[int] | None, shares: list[float]) -> None:
        drawn = sample_labels(model(class_counts=counts), source, 0)(range(4000))
        assert drawn is not None
        for k, share in enumerate(shares):
            # Five standard deviations of a binomial; none at all of a class that the data lack.
            assert abs(drawn.count(k) / 4000 - share) <= 5 * (share * (1 - share) / 4000) ** 0.5

    @settings(max_examples=30, deadline=None)
    @given(cut=st.integers(0, 40), seed=st.integers(0, 2**40))
    def test_a_label_belongs_to_seed_and_number(self, cut: int, seed: int) -> None:
        labels = sample_labels(COUNTED, "data", seed)
        whole = labels(range(7, 47))
        assert whole is not None
        assert labels(range(7, 7 + cut)) == whole[:cut]
        assert labels(range(7 + cut, 47)) == whole[cut:]

    def test_another_seed_draws_others(self) -> None:
        draws = [sample_labels(model(), "uniform", seed)(range(50)) for seed in (0, 1)]
        assert draws[0] != draws[1]

    def test_in_turn(self) -> None:
        assert sample_labels(model(), None, 3)(range(5, 10)) == [1, 2, 3, 0, 1]
        assert sample_labels(model(0), None, 3)(range(5, 10)) is None

    @pytest.mark.parametrize(
        ("made", "source", "message"),
        [
            (model(), "data", "labels_from: this checkpoint does not record how many"),
            (model(0), "uniform", "labels_from: this model has no classes"),
            (model(), "even", "labels_from: must be data or uniform, got 'even'"),
            (model(class_counts=[1, 2]), "data", "must be 4 whole numbers, not all 0"),
            (model(class_counts=[0] * 4), "data", "must be 4 whole numbers, not all 0"),
            (model(class_counts=[1, 2, -3, 4.5]), "data", "must be 4 whole numbers, not all 0"),
        ],
    )
    def test_what_cannot_be(self, made: TrainedModel, source: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            sample_labels(made, source, 0)

    def test_a_checkpoint_records_the_classes_of_its_data(self, tmp_path: Path) -> None:
        from runs import tiny_config

        data = TensorDataset(torch.rand(9, 1, 4, 4), [0, 2, 2, 0, 2, 0, 2, 2, 3])
        tvmatch.train(tiny_config(1), data, tmp_path / "run")
        assert load(tmp_path / "run").provenance["class_counts"] == [3, 0, 5, 1]

    def test_samples_by_number(self) -> None:
        made = model()
        draw = numbered_samples(made, sample_labels(made, "uniform", 5), steps=2, seed=5)
        labels = sample_labels(made, "uniform", 5)(range(3, 6))
        assert torch.equal(draw(range(3, 6)), made.sample(labels, first=3, steps=2, seed=5))


class TestBytes:
    @given(levels=st.lists(st.floats(0, 255, width=32), min_size=1, max_size=20))
    def test_the_level_below(self, levels: list[float]) -> None:
        images = torch.tensor(levels).div(255).view(1, 1, 1, -1)
        below, nearest = as_uint8(images, "truncate"), as_uint8(images)
        exact = images * 255
        assert (below <= exact).all()
        assert (exact < below + 1.0).all()
        assert ((nearest - exact).abs() <= 0.5).all()

    def test_half_a_level_on_average(self) -> None:
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        difference = to_bytes(images).double().mean() - to_bytes(images, "truncate").double().mean()
        assert difference == pytest.approx(0.5, abs=0.02)  # 24,576 pixels of variance 1/4: 0.003

    def test_no_such_rule(self) -> None:
        with pytest.raises(InputError, match="uint8: must be round or truncate, got 'floor'"):
            as_uint8(torch.zeros(1, 1, 2, 2), "floor")  # type: ignore[arg-type]


class Pixels(SmallExtractor):
    """Keeps the bytes that it has seen."""

    seen: list[Tensor]

    def forward(self, images: Tensor) -> Any:
        self.seen.append(images)
        return super().forward(images)


def test_figures_of_drawn_labels_and_truncated_bytes() -> None:
    made = model(class_counts=[0, 0, 5, 5])
    extractor = Pixels()
    extractor.seen = []
    result = evaluate_features(
        made,
        extractor,
        None,
        FeatureRequest(
            metrics=("is",), count=20, steps=(1,), seed=2, labels_from="data", uint8="truncate", batch_size=20
        ),
    )
    assert result is not None
    samples = made.sample(sample_labels(made, "data", 2)(range(20)), seed=2, batch_size=20)
    assert torch.equal(extractor.seen[-1], samples.mul(255).floor().byte())
    (row,) = result["rows"]
    assert (row["labels_from"], row["uint8"]) == ("data", "truncate")
    assert "labels drawn as the training data of 4 classes have them" in row["provenance"]
    assert "floor(255 x) clipped to 0 … 255" in row["provenance"]
    assert result["provenance"]["labels_from"] == "data"
    with pytest.raises(InputError, match="uint8: must be"):
        evaluate_features(made, extractor, None, FeatureRequest(metrics=("is",), uint8="up"))  # type: ignore[arg-type]


def test_each_way_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second evaluation with other settings neither replaces the first's figures nor mixes with them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path / "home"))
    Path("checkpoint").mkdir()
    model(class_counts=[1, 2, 3, 4]).save(Path("checkpoint"))
    common = [
        "evaluate",
        "checkpoint",
        EXTRACTOR,
        "--metrics=is",
        "--samples=20",
        "--steps=1",
        "--device=cpu",
    ]
    ways: dict[str, list[str]] = {
        "": [],
        "_labels_data": ["--labels_from=data"],
        "_labels_uniform": ["--labels_from=uniform"],
        "_uint8_truncate": ["--uint8=truncate"],
        "_labels_data_uint8_truncate": ["--labels_from=data", "--uint8=truncate"],
    }
    before: dict[str, str] = {}
    for way, arguments in ways.items():
        assert main([*common, *arguments]) == 0
        path = f"checkpoint/metrics_small_extractor_SmallExtractor{way}.json"
        assert capsys.readouterr().out.splitlines()[-1] == path
        for earlier, content in before.items():
            assert Path(earlier).read_text() == content
        before[path] = Path(path).read_text()
    scores = {json.loads(text)["rows"][0]["inception_score"] for text in before.values()}
    assert len(scores) == len(ways)
    assert main([*common, "--uint8=round"]) == 0  # the default by its name
    assert capsys.readouterr().out.splitlines()[-1] == next(iter(before))
    for arguments, message in (
        (["--labels_from=even"], "labels_from: must be data or uniform, got 'even'"),
        (["--uint8=floor"], "uint8: must be round or truncate, got 'floor'"),
    ):
        assert main([*common, *arguments]) == 2
        assert capsys.readouterr().err == f"tvmatch: error: {message}\n"
