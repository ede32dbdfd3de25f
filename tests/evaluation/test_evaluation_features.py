"""Figures in features: statistics in parts, Inception Score, precision and recall, whole evaluations."""

import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NothingLarger, randomize_, small_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from small_extractor import CLASSES, POOLED, SPATIAL, SmallExtractor
from torch import Tensor

from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.distributed import Processes
from tvmatch.errors import InputError
from tvmatch.evaluation import (
    FeatureRequest,
    Features,
    GaussianStatistics,
    Reference,
    RunningGaussian,
    collection,
    evaluate_features,
    features_table,
    fit_gaussian,
    frechet_distance,
    inception_score,
    load_reference,
    precision_recall,
)
from tvmatch.evaluation.collection import FeatureSizes, Kept, collect
from tvmatch.evaluation.feature_metrics import Metric
from tvmatch.evaluation.metrics import precision_and_recall, statistics
from tvmatch.generation.uint8 import to_bytes
from tvmatch.seeds import generator
from tvmatch.trained_model import TrainedModel

# float64 sums of some dozens of numbers of order one.
ROUNDING = 1e-12


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, "feature tests"))


class TestRunningGaussian:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        parts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2),
        features=st.integers(1, 6),
        processes=st.integers(1, 3),
        mean=st.sampled_from([0.0, 1e6]),
        rows=st.sampled_from([1, 5, 1024]),
    )
    def test_any_split_gives_the_statistics_of_the_whole(
        self, seed: int, parts: list[int], features: int, processes: int, mean: float, rows: int
    ) -> None:
        vectors = normal(seed, sum(parts), features) + mean
        each = [RunningGaussian(features) for _ in range(processes)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(statistics, "_ROWS", rows)
            for number, part in enumerate(vectors.split(parts)):
                each[number % processes].update(part)
        for other in each[1:]:
            each[0].merge(other.moments())
        whole, direct = each[0].statistics(), fit_gaussian(vectors)
        assert each[0].moments().count == len(vectors)
        # A mean of 1e6 rounds the vectors' differences from it by 1e-10; Σ x xᵀ − n μ μᵀ would lose 1e-4.
        torch.testing.assert_close(whole.mean, direct.mean, rtol=1e-15, atol=1e-14)
        torch.testing.assert_close(whole.covariance, direct.covariance, rtol=0, atol=1e-12 + 1e-15 * mean)
        assert torch.equal(whole.covariance, whole.covariance.T)

    def test_against_numpy(self) -> None:
        vectors, running = normal(0, 300, 5).float(), RunningGaussian(5)
        for part in vectors.split(64):
            running.update(part)
        np.testing.assert_allclose(running.statistics().covariance, np.cov(vectors.double().T), atol=1e-14)

    def test_bad_features(self) -> None:
        running = RunningGaussian(3)
        with pytest.raises(InputError, match=r"features: must be \(n, 3\), got \(2, 4\)"):
            running.update(torch.zeros(2, 4))
        with pytest.raises(InputError, match="features: 1 of 2 vectors have a non-finite entry"):
            running.update(torch.tensor([[0.0, 1, 2], [3, math.inf, 4]]))
        with pytest.raises(InputError, match="at least 2 vectors, there are 0"):
            running.statistics()
        with pytest.raises(InputError, match="must be 3 a vector, got 4"):
            running.merge(RunningGaussian(4).moments())


@given(parts=st.integers(0, 100), count=st.integers(1, 12))
def test_processes_share_all_parts_in_order(parts: int, count: int) -> None:
    shares = [Processes(rank, count).share(parts) for rank in range(count)]
    assert [part for share in shares for part in share] == list(range(parts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares))  # the first one has what all need to know


class TestInceptionScore:
    @pytest.mark.parametrize("classes", [1, 2, 7])
    def test_closed_forms(self, classes: int) -> None:
        # The same probabilities for all images: no divergence. Sure of every class equally often: log K.
        same = normal(0, classes).expand(70, -1)
        assert inception_score(same) == (pytest.approx(1, abs=1e-14), pytest.approx(0, abs=1e-14))
        numbers = torch.arange(140) % classes  # every class equally often in each of 10 splits
        balanced = torch.full((140, classes), -1e4).scatter(1, numbers[:, None], 1e4)
        assert inception_score(balanced) == (pytest.approx(classes), pytest.approx(0, abs=1e-14))

    def test_two_classes_of_known_probabilities(self) -> None:
        # Half of the images (p, 1 − p), half (1 − p, p): exp(log 2 − H(p)).
        p = 0.9
        logits = torch.tensor([p, 1 - p], dtype=torch.float64).log().repeat(40, 1)
        logits[::2] = logits[::2].flip(1)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert inception_score(logits, 4).mean == pytest.approx(math.exp(math.log(2) - entropy), rel=ROUNDING)

    def test_against_the_definition(self) -> None:
        logits, scores = 3 * normal(1, 57, 11), []
        for split in range(10):
            p = logits[split * 57 // 10 : (split + 1) * 57 // 10].softmax(1).numpy()
            kl = p * (np.log(p) - np.log(p.mean(0)))
            scores.append(np.exp(kl.sum(1).mean()))
        score = inception_score(logits.float().double())
        # The logits were rounded to float32.
        assert score == (pytest.approx(np.mean(scores), rel=1e-6), pytest.approx(np.std(scores), rel=1e-5))

    def test_bad_logits(self) -> None:
        with pytest.raises(InputError, match="splits: must be within 1 … 9 images, got 10"):
            inception_score(torch.zeros(9, 3))
        with pytest.raises(InputError, match="logits: must have shape"):
            inception_score(torch.zeros(9))
        with pytest.raises(InputError, match="logits: has a non-finite entry"):
            inception_score(torch.full((20, 2), torch.nan))


class TestPrecisionRecall:
    @pytest.mark.parametrize("block", [4, 7, 4096])
    @pytest.mark.parametrize("k", [1, 3])
    def test_against_brute_force(self, k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision_and_recall, "_BLOCK", block)
        generated, real = 0.6 * normal(2, 40, 3) + 0.5, normal(3, 33, 3)
        to_real = cdist(generated, real)
        # Sorted, each row begins with the distance to itself.
        real_radii = np.sort(cdist(real, real), axis=1)[:, k]
        generated_radii = np.sort(cdist(generated, generated), axis=1)[:, k]
        shares = precision_recall(generated, real, neighbours=k)
        assert shares.precision == (to_real <= real_radii).any(axis=1).mean()
        assert shares.recall == (to_real <= generated_radii[:, None]).any(axis=0).mean()
        assert 0 < shares.recall < shares.precision <= 1  # the generated ones are closer together

    def test_the_same_set_and_one_far_away(self) -> None:
        vectors = normal(4, 30, 5)
        assert precision_recall(vectors, vectors.flip(0)) == (1, 1)
        assert precision_recall(vectors, vectors + 1e3) == (0, 0)

    def test_copies_of_one_image_are_in_each_others_balls_of_radius_zero(self) -> None:
        # Far from the origin, where rounding would otherwise move them apart.
        copies = (normal(5, 1, 64) * 1e3).expand(9, -1)
        assert precision_recall(copies, copies.clone()) == (1, 1)

    def test_a_generator_of_one_mode_is_precise_and_recalls_half(self) -> None:
        left, right = normal(6, 50, 2), normal(7, 50, 2) + 100
        shares = precision_recall(left, torch.cat([left, right]))
        assert shares == (1, 0.5)

    def test_float32_features_far_from_the_origin(self) -> None:
        a, b = (normal(8, 40, 16) * 1e-2 + 1e3).float(), (normal(9, 40, 16) * 1e-2 + 1e3).float()
        exact = cdist(a.double(), b.double())
        radii = np.sort(cdist(b.double(), b.double()), axis=1)[:, 3]
        assert precision_recall(a, b).precision == (exact <= radii).any(axis=1).mean()

    def test_bad_features(self) -> None:
        good = torch.zeros(5, 2)
        with pytest.raises(InputError, match="generated features: must be more than 3 vectors"):
            precision_recall(good[:3], good)
        with pytest.raises(InputError, match="the two sets have 2 and 3 a vector"):
            precision_recall(good, torch.zeros(5, 3))
        with pytest.raises(InputError, match="real features: has a non-finite entry"):
            precision_recall(good, good / 0)
        with pytest.raises(InputError, match="neighbours: must be at least 1"):
            precision_recall(good, good, neighbours=0)


class TestBytes:
    def test_bytes_come_back_and_grey_becomes_three_channels(self) -> None:
        content = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        images = to_bytes(content.float() / 255)
        assert torch.equal(images, content.expand(1, 3, 16, 16))
        values = torch.tensor([-0.1, 0.4999 / 255, 0.5001 / 255, 1.1]).view(1, 1, 2, 2)
        assert to_bytes(values)[0, 0].flatten().tolist() == [0, 0, 1, 255]

    def test_bad_images(self) -> None:
        with pytest.raises(
            InputError, match=r"images: must have shape \(B, 1 or 3, H, W\), got \(1, 4, 2, 2\)"
        ):
            to_bytes(torch.zeros(1, 4, 2, 2))
        with pytest.raises(InputError, match="images: 1 of 2 have a pixel that is not finite"):
            to_bytes(torch.tensor([0.0, torch.nan]).view(2, 1, 1, 1).expand(2, 3, 2, 2))


def test_features_that_are_not_kept_are_freed() -> None:
    """Those of 1.3 million images of ImageNet would be ten gigabytes."""
    made: list[weakref.ref[Any]] = []

    class Remembering(SmallExtractor):
        def forward(self, images: Tensor) -> Features:
            values = np.zeros((len(images), POOLED), np.float32)
            made.append(weakref.ref(values))
            return Features(torch.from_numpy(values), None, None)

    def images(numbers: range) -> Tensor:
        alive.append(sum(values() is not None for values in made))
        return torch.zeros(len(numbers), 3, 2, 2)

    for vectors, most in ((0, 1), (3, 2)):  # besides the last batch only the one with the vectors to keep
        made.clear()
        alive: list[int] = []
        sizes, kept = FeatureSizes(POOLED, None, None), Kept(vectors=vectors)
        collect(images, 40, Remembering(), sizes, kept, batch_size=4, processes=Processes())
        assert len(alive) == 10
        assert max(alive) <= most


def test_the_first_batch_does_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles and allocates; where there is no other, its speed is the only one."""
    now = 0.0

    def images(numbers: range) -> Tensor:
        nonlocal now
        now += 100 if numbers.start == 0 else 0.5 * len(numbers)
        return torch.zeros(len(numbers), 3, 2, 2)

    monkeypatch.setattr(collection, "perf_counter", lambda: now)
    for count, expected in ((10, 2.0), (4, 0.04)):
        sizes = FeatureSizes(POOLED, SPATIAL, CLASSES)
        found = collect(images, count, SmallExtractor(), sizes, Kept(), batch_size=4, processes=Processes())
        assert found is not None
        assert found.images_per_second == pytest.approx(expected)


def model(guidance: float | tuple[float, float] = 2.0, class_count: int = 3) -> TrainedModel:
    """A random network of 4 × 4 images in colour."""
    names = tuple(f"class {k}" for k in range(class_count)) or None
    spec = DataSpec("image", (3, 4, 4), names, (0.5,) * 3, (0.5,) * 3)
    network = randomize_(small_dit((3, 4, 4), class_count))
    return TrainedModel(network.requires_grad_(False), spec, scaled=False, guidance=guidance, step=7)


def features_of(images: Tensor) -> Features:
    return SmallExtractor()(to_bytes(images))


def reference_of(features: Features, **provenance: Any) -> Reference:
    assert features.spatial is not None
    facts = {"source": "real", "fingerprint": "sha256 abc", "kind": "images"} | provenance
    pooled, spatial = fit_gaussian(features.pooled), fit_gaussian(features.spatial)
    return Reference(pooled, spatial, features.pooled, len(features.pooled), facts)


SCORE = ["inception_score", "inception_score_std"]
REAL = features_of(torch.rand(60, 3, 4, 4, generator=generator(0)))


class TestEvaluation:
    def test_figures_are_those_of_the_samples(self) -> None:
        made, reference = model(), reference_of(REAL)
        result = evaluate_features(
            made, SmallExtractor(), reference, FeatureRequest(count=50, steps=(1, 2), seed=3, batch_size=16)
        )
        assert result is not None
        assert [(row["guidance"], row["steps"]) for row in result["rows"]] == [(2.0, 1), (2.0, 2)]
        for row in result["rows"]:
            # In batches of the same size, which rounding in the network depends on.
            samples = made.sample([k % 3 for k in range(50)], steps=row["steps"], seed=3, batch_size=16)
            features = features_of(samples)
            assert features.spatial is not None
            assert features.logits is not None
            shares = precision_recall(features.pooled, REAL.pooled)
            score = inception_score(features.logits)
            expected = {
                "fd": frechet_distance(fit_gaussian(features.pooled), reference.pooled),
                "spatial_fd": frechet_distance(fit_gaussian(features.spatial), reference.spatial),  # type: ignore[arg-type]
                "inception_score": score.mean,
                "inception_score_std": score.std,
                "precision": shares.precision,
                "recall": shares.recall,
            }
            # The extractor's float32 features differ by 1e-7 between batches of 16 and one of 50.
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
            assert row["images_per_second"] > 0
        assert result["rows"][0]["fd"] != result["rows"][1]["fd"]

    def test_known_gaussians_in_features(self) -> None:
        """A model whose "features" are its own pixels: the distance to a Gaussian in closed form."""

        class Pixels:
            name, fingerprint = "inception", "0" * 64

            def __call__(self, images: Tensor) -> Features:
                return Features(images[:, 0].flatten(1).float() / 255, None, None)

        made = model()
        features = Pixels()(to_bytes(made.sample([k % 3 for k in range(64)])))
        own = fit_gaussian(features.pooled)
        moved = Reference(
            GaussianStatistics(own.mean + 0.25, 4 * own.covariance),
            None,
            None,
            None,
            {"source": "", "fingerprint": "", "kind": ""},
        )
        result = evaluate_features(made, Pixels(), moved, FeatureRequest(count=64, steps=(1,)))
        assert result is not None
        # |μ_a − μ_b|² + Tr S (1 + 4 − 2 · 2) with 16 features; the square root of rounded zeros costs digits.
        expected = 16 * 0.25**2 + float(own.covariance.trace())
        assert result["rows"][0]["fid"] == pytest.approx(expected, rel=1e-9)
        assert set(result["rows"][0]) == {"guidance", "steps", "fid", "images_per_second", "provenance"}

    def test_few_samples_of_many_features(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Pixels of 128 × 128 images as features: their covariance would be 19 GB."""

        class Pixels:
            name, fingerprint = "pixels", "0" * 64

            def __call__(self, images: Tensor) -> Features:
                return Features(images.flatten(1).float() / 255, None, None)

        spec = DataSpec("image", (3, 128, 128), None, (0.5,) * 3, (0.5,) * 3)
        network = randomize_(small_dit((3, 128, 128), 0, patch_size=32))
        made = TrainedModel(network, spec, scaled=False, guidance=1.0)
        with NothingLarger(30 * 3 * 128 * 128):
            pixels = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), np.uint8)
            np.savez(tmp_path / "few.npz", pixels)
            reference = load_reference(
                str(tmp_path / "few.npz"), Pixels(), (3, 128, 128), batch_size=5, cache=tmp_path / "cache"
            )
            result = evaluate_features(
                made,
                Pixels(),
                reference,
                FeatureRequest(metrics=("fid",), count=10, steps=(1,), batch_size=4),
            )
        assert reference is not None
        assert result is not None
        assert "reference statistics are not cached" in caplog.text
        samples = to_bytes(made.sample(count=10, batch_size=4)).flatten(1).double() / 255
        expected = frechet_distance(fit_gaussian(samples), reference.pooled)
        assert result["rows"][0]["fd"] == pytest.approx(expected, rel=1e-5)  # float32 features

    def test_a_row_for_each_guidance_and_number_of_steps(self) -> None:
        made, progress = model(guidance=(1.0, 3.0)), []
        result = evaluate_features(
            made,
            SmallExtractor(),
            reference_of(REAL),
            FeatureRequest(metrics=("fid",), count=20, steps=(1, 4), guidance=(1.5, 3.0), batch_size=8),
            on_progress=lambda done, total: progress.append((done, total)),
        )
        assert result is not None
        rows = result["rows"]
        assert [(row["guidance"], row["steps"]) for row in rows] == [(1.5, 1), (1.5, 4), (3.0, 1), (3.0, 4)]
        assert len({row["fd"] for row in rows}) == 4
        assert progress[-1] == (80, 80)
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)
        default = evaluate_features(
            made, SmallExtractor(), reference_of(REAL), FeatureRequest(count=20, steps=(1,))
        )
        assert default is not None
        assert default["rows"][0]["guidance"] == 3.0

    def test_every_number_says_where_it_comes_from(self) -> None:
        reference = reference_of(REAL, split="train", crop="dhariwal", images=60)
        result = evaluate_features(
            model(), SmallExtractor(), reference, FeatureRequest(count=20, steps=(1, 2), seed=11)
        )
        assert result is not None
        for row in result["rows"]:
            line = row["provenance"]
            assert "\n" not in line
            for words in (
                "extractor small 555555555555",
                "20 samples",
                "4×4 pixels as uint8, round(255 x) clipped to 0 … 255",
                "labels k mod 3",
                "reference real (sha256 abc, 60 images, split train, crop dhariwal)",
                "seed 11",
                "guidance 2",
                f"steps {row['steps']}",
                "7 training steps",
                "cpu, float32",
                f"torch {torch.__version__.split('+')[0]}",
            ):
                assert words in line, (words, line)
        assert result["provenance"]["extractor_fingerprint"] == "5" * 64

    def test_without_reference_the_inception_score(self) -> None:
        result = evaluate_features(
            model(), SmallExtractor(), None, FeatureRequest(metrics=("is",), count=20, steps=(1,))
        )
        assert result is not None
        assert 1 <= result["rows"][0]["inception_score"] <= CLASSES
        assert "no reference" in result["rows"][0]["provenance"]

    def test_by_default_what_can_be_computed(self) -> None:
        statistics = Reference(fit_gaussian(REAL.pooled), None, None, None, reference_of(REAL).provenance)
        for count, reference, names in (
            (20, reference_of(REAL), ["fd", "spatial_fd", *SCORE, "precision", "recall"]),
            (9, reference_of(REAL), ["fd", "spatial_fd", "precision", "recall"]),
            (3, reference_of(REAL), ["fd", "spatial_fd"]),
            (20, statistics, ["fd", *SCORE]),
        ):
            result = evaluate_features(
                model(), SmallExtractor(), reference, FeatureRequest(count=count, steps=(1,))
            )
            assert result is not None
            assert list(result["rows"][0])[2:-2] == names

    def test_a_model_without_classes(self) -> None:
        result = evaluate_features(
            model(class_count=0), SmallExtractor(), reference_of(REAL), FeatureRequest(count=20, steps=(1,))
        )
        assert result is not None
        assert "no labels" in result["rows"][0]["provenance"]

    @pytest.mark.parametrize("batch_size", [5, 16, 64])
    def test_the_batch_size_changes_rounding_alone(self, batch_size: int) -> None:
        one, other = (
            evaluate_features(
                model(),
                SmallExtractor(),
                reference_of(REAL),
                FeatureRequest(count=33, steps=(1,), batch_size=size),
            )
            for size in (33, batch_size)
        )
        assert one is not None
        assert other is not None
        # A pixel of 1,584 that rounds to the next byte moves a feature by 1e-2 / 9.
        assert other["rows"][0]["fd"] == pytest.approx(one["rows"][0]["fd"], rel=1e-2)

    def test_too_few_samples_for_the_covariance(self, caplog: pytest.LogCaptureFixture) -> None:
        few = reference_of(Features(REAL.pooled[:7], REAL.spatial[:7], None))  # type: ignore[index]
        with caplog.at_level(logging.WARNING):
            result = evaluate_features(
                model(), SmallExtractor(), few, FeatureRequest(metrics=("fid", "sfid"), count=POOLED)
            )
        assert result is not None
        assert result["warnings"] == caplog.messages
        assert caplog.messages == [
            f"samples: {POOLED} images give the covariance of {SPATIAL} features only rank {POOLED - 1}: the "
            "Fréchet distance is biased upwards, and comparable only with others of equally many images",
            f"reference: 7 images give the covariance of {SPATIAL} features only rank 6: the Fréchet "
            "distance is biased upwards, and comparable only with others of equally many images",
        ]
        assert result["rows"][0]["fd"] > 0
        both: tuple[Metric, ...] = ("fid", "sfid")
        enough = evaluate_features(
            model(),
            SmallExtractor(),
            reference_of(REAL),
            FeatureRequest(metrics=both, count=SPATIAL + 1, steps=(1,)),
        )
        assert enough is not None
        assert enough["warnings"] == []

    def test_table(self) -> None:
        row = {"guidance": 2.0, "steps": 4, "fid": 1.98765, "inception_score": 250.12}
        row |= {"inception_score_std": 3.04, "precision": 0.5, "recall": 2 / 3, "images_per_second": 1234.5}
        table = features_table({"rows": [row | {"provenance": "line"}, row | {"provenance": "line"}]})
        cells = {str(column.header): list(column.cells) for column in table.columns}
        assert cells == {
            "guidance": ["2"] * 2,
            "steps": ["4"] * 2,
            "FID": ["1.988"] * 2,
            "IS": ["250.1"] * 2,
            "precision": ["0.500"] * 2,
            "recall": ["0.667"] * 2,
            "images / s": ["1,234"] * 2,
        }


def broken() -> TrainedModel:
    made = model()
    with torch.no_grad():
        next(made.network.parameters()).fill_(torch.nan)
    return made


def latents() -> TrainedModel:
    made = model()
    info = AutoencoderInfo("nowhere", "", (3, 8, 8))
    made.spec = DataSpec("latents", (3, 4, 4), None, (0.0,) * 3, (1.0,) * 3, info)
    return made


EXTRACTOR = SmallExtractor()
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "steps": (
        lambda: evaluate_features(model(), EXTRACTOR, None, FeatureRequest(steps=(0,))),
        "steps: must be",
    ),
    "seed": (
        lambda: evaluate_features(model(), EXTRACTOR, None, FeatureRequest(seed=-1)),
        "seed: must be at least 0",
    ),
    "no reference": (lambda: evaluate_features(model(), EXTRACTOR, None), "reference: is required"),
    "a metric without reference": (
        lambda: evaluate_features(model(), EXTRACTOR, None, FeatureRequest(metrics=("is", "fid"))),
        "metrics: fid cannot be computed, there is no reference",
    ),
    "unknown metric": (
        lambda: evaluate_features(model(), EXTRACTOR, reference_of(REAL), FeatureRequest(metrics=("kid",))),  # type: ignore[arg-type]
        "metrics: must be among fid, sfid, is, pr, got kid",
    ),
    "statistics alone": (
        lambda: evaluate_features(
            model(),
            EXTRACTOR,
            Reference(fit_gaussian(REAL.pooled), None, None, None, {}),
            FeatureRequest(metrics=("pr",)),
        ),
        "metrics: pr cannot be computed, the reference has statistics only",
    ),
    "other features": (
        lambda: evaluate_features(
            model(), EXTRACTOR, Reference(fit_gaussian(normal(0, 9, 4)), None, None, None, {})
        ),
        "reference: holds statistics of 4 features, small gives 6",
    ),
    "another extractor": (
        lambda: evaluate_features(model(), EXTRACTOR, reference_of(REAL, extractor_fingerprint="7" * 64)),
        "reference: was computed with extractor 777777777777…, this one is 555555555555…",
    ),
    "another guidance": (
        lambda: evaluate_features(model(), EXTRACTOR, reference_of(REAL), FeatureRequest(guidance=(1.5,))),
        "guidance: this model was trained at the one weight 2, got 1.5",
    ),
    "guidance out of range": (
        lambda: evaluate_features(
            model((1.0, 2.0)), EXTRACTOR, reference_of(REAL), FeatureRequest(guidance=(1.5, 2.5))
        ),
        "guidance: this model was trained for 1 to 2, got 2.5",
    ),
    "guidance twice": (
        lambda: evaluate_features(
            model((1.0, 2.0)), EXTRACTOR, reference_of(REAL), FeatureRequest(guidance=(2, 2))
        ),
        "guidance: must be one or more different weights",
    ),
    "few samples": (
        lambda: evaluate_features(model(), EXTRACTOR, reference_of(REAL), FeatureRequest(count=1)),
        "count: must be at least 2, got 1",
    ),
    "few samples for splits": (
        lambda: evaluate_features(
            model(), EXTRACTOR, reference_of(REAL), FeatureRequest(count=9, metrics=("is",))
        ),
        "metrics: is cannot be computed, it needs at least 10 samples, got 9",
    ),
    "batch size": (
        lambda: evaluate_features(
            model(), EXTRACTOR, reference_of(REAL), FeatureRequest(count=20, batch_size=0)
        ),
        "batch_size: must be at least 1, got 0",
    ),
    "samples that are not finite": (
        lambda: evaluate_features(broken(), EXTRACTOR, reference_of(REAL), FeatureRequest(count=20)),
        "images: 20 of 20 have a pixel that is not finite",
    ),
    "latents without decoder": (
        lambda: evaluate_features(latents(), EXTRACTOR, reference_of(REAL)),
        "model: must generate images, this one generates latents; it needs its autoencoder",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    mistake, message = BAD[name]
    with pytest.raises(InputError) as caught:
        mistake()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
