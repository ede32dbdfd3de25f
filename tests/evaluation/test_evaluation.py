"""Distances against closed forms and other solvers; evaluations on samples whose scores are known."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NothingLarger, randomize_, small_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tvmatch.cli import results
from tvmatch.config import Config
from tvmatch.data.config import ImagesData
from tvmatch.data.densities import Density
from tvmatch.data.digits import digits
from tvmatch.data.tensors import TensorDataset
from tvmatch.errors import InputError
from tvmatch.evaluation import (
    GaussianStatistics,
    evaluate_digits,
    evaluate_images,
    evaluate_points,
    fit_gaussian,
    frechet_distance,
    metrics_table,
    wasserstein2,
    write_metrics,
)
from tvmatch.evaluation import samples as generation
from tvmatch.evaluation.metrics import wasserstein
from tvmatch.seeds import fold, generator
from tvmatch.trained_model import TrainedModel

# float64 eigenvalues and singular values of a few dozen features: 1e-16 times the traces and a small factor.
ROUNDING = 1e-11


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed, "evaluation tests"))


def gaussian(mean: Sequence[float], covariance: Tensor) -> GaussianStatistics:
    return GaussianStatistics(torch.tensor(mean, dtype=torch.float64), covariance.double())


class TestFrechet:
    def test_statistics_are_the_mean_and_the_unbiased_covariance(self) -> None:
        features = normal(0, 50, 7).float()
        statistics = fit_gaussian(features)
        np.testing.assert_allclose(statistics.mean, features.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy().T), atol=1e-14)

    @pytest.mark.parametrize("variances", [(1.0, 4.0), (0.0, 4.0), (1.0, 0.0), (0.0, 0.0), (1e-12, 1.0)])
    def test_commuting_covariances(self, variances: tuple[float, float]) -> None:
        # Diagonal covariances: |μ_a − μ_b|² + Σ (σ_a − σ_b)².
        a = gaussian([0.0, 1.0], torch.diag(torch.tensor([2.0, 3.0])))
        b = gaussian([2.0, 0.0], torch.diag(torch.tensor(variances, dtype=torch.float64)))
        expected = 5.0 + (2**0.5 - variances[0] ** 0.5) ** 2 + (3**0.5 - variances[1] ** 0.5) ** 2
        assert frechet_distance(a, b) == pytest.approx(expected, rel=ROUNDING)

    def test_covariances_without_common_directions(self) -> None:
        # Nothing can be transported between orthogonal lines: only the two traces remain.
        a = gaussian([0.0, 0.0], torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        b = gaussian([0.0, 0.0], torch.tensor([[0.0, 0.0], [0.0, 5.0]]))
        assert frechet_distance(a, b) == pytest.approx(7.0, rel=ROUNDING)

    @pytest.mark.parametrize("size", [1, 2, 12, 40])
    def test_noncommuting_covariances_against_the_matrix_square_root(self, size: int) -> None:
        a = fit_gaussian(normal(1, 3 * size + 2, size) @ normal(2, size, size))
        b = fit_gaussian(normal(3, 3 * size + 2, size) @ normal(4, size, size) + 0.5)
        root = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
        expected = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace())
        expected -= 2 * float(np.real(np.trace(root)))
        # sqrtm of a non-symmetric product is itself good to about 1e-10 here.
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)

    def test_fewer_vectors_than_features_against_singular_values_of_the_vectors(self) -> None:
        # With X, Y the centred vectors: Tr (S_a^½ S_b S_a^½)^½ is the nuclear norm of X Yᵀ.
        x, y = normal(5, 20, 64), 0.7 * normal(6, 30, 64) + 1
        centred_x, centred_y = (x - x.mean(0)) / 19**0.5, (y - y.mean(0)) / 29**0.5
        expected = float(
            (x.mean(0) - y.mean(0)).square().sum()
            + centred_x.square().sum()
            + centred_y.square().sum()
            - 2 * torch.linalg.matrix_norm(centred_x @ centred_y.T, "nuc")
        )
        a, b = fit_gaussian(x), fit_gaussian(y)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=ROUNDING)
        # And from the singular covariances alone, 45 and 35 of their eigenvalues being rounded zeros.
        a, b = GaussianStatistics(a.mean, a.covariance), GaussianStatistics(b.mean, b.covariance)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=ROUNDING)

    @pytest.mark.parametrize(("n", "m", "size"), [(3, 5, 30), (30, 4, 29), (40, 9, 9), (9, 31, 8), (2, 2, 2)])
    def test_factors_and_matrices_give_one_distance(self, n: int, m: int, size: int) -> None:
        """Fewer vectors than features, as many, more, and one set of each."""
        a, b = fit_gaussian(normal(7, n, size)), fit_gaussian(normal(8, m, size) @ normal(9, size, size))
        matrices = [GaussianStatistics(x.mean, x.covariance) for x in (a, b)]
        distance = frechet_distance(*matrices)
        assert frechet_distance(a, b) == pytest.approx(distance, rel=1e-9)  # of roots of rounded eigenvalues
        for x, matrix in zip((a, b), matrices, strict=True):
            torch.testing.assert_close(x.trace, matrix.covariance.trace(), rtol=ROUNDING, atol=0)
            torch.testing.assert_close(x.root @ x.root.T, matrix.covariance, rtol=ROUNDING, atol=ROUNDING)

    def test_few_vectors_of_many_features(self) -> None:
        """Pixels of 128 × 128 images: their covariance would be 19 GB."""
        vectors = normal(10, 22, 3 * 128 * 128).float()
        with NothingLarger(22 * 3 * 128 * 128):
            a, b = fit_gaussian(vectors[:10]), fit_gaussian(vectors[10:])
            distance = frechet_distance(a, b)
        # The centred vectors are nearly orthogonal, with squares of about d.
        size = vectors.shape[1]
        assert 2 * size * 0.9 < distance < 2.3 * size
        assert frechet_distance(a, a) == pytest.approx(0, abs=ROUNDING * size)

    def test_a_gaussian_without_a_covariance(self) -> None:
        with pytest.raises(ValueError, match="a covariance or a factor"):
            GaussianStatistics(torch.zeros(2))

    def test_constant_pixels_change_nothing(self) -> None:
        train, aside = digits("train").take(360, 0).values.flatten(1), digits("held_out").take(360, 0).values
        aside = aside.flatten(1)
        varying = (train.std(0) > 0) | (aside.std(0) > 0)
        assert not varying.all()  # the corners of the digits are always black
        whole = frechet_distance(fit_gaussian(train), fit_gaussian(aside))
        part = frechet_distance(fit_gaussian(train[:, varying]), fit_gaussian(aside[:, varying]))
        assert whole == pytest.approx(part, rel=1e-9)

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32), size=st.integers(1, 8), count=st.integers(2, 12))
    def test_invariances(self, seed: int, size: int, count: int) -> None:
        x, y, z = normal(seed, 3, count, size)
        shift, rotation = normal(seed + 1, size), torch.linalg.qr(normal(seed + 2, size, size)).Q
        a, b, c = fit_gaussian(x), fit_gaussian(y), fit_gaussian(z)
        scale = float((a.covariance + b.covariance).trace() + a.mean.square().sum() + b.mean.square().sum())
        close = {"rel": ROUNDING, "abs": ROUNDING * scale}
        distance = frechet_distance(a, b)
        assert distance >= 0
        assert frechet_distance(b, a) == pytest.approx(distance, **close)
        assert frechet_distance(a, fit_gaussian(x)) == pytest.approx(0, abs=ROUNDING * scale)
        assert frechet_distance(a, fit_gaussian(x + shift)) == pytest.approx(float(shift @ shift), **close)
        moved = frechet_distance(fit_gaussian(x @ rotation + shift), fit_gaussian(y @ rotation + shift))
        assert moved == pytest.approx(distance, **close)
        assert frechet_distance(fit_gaussian(3 * x), fit_gaussian(3 * y)) == pytest.approx(
            9 * distance, rel=ROUNDING, abs=9 * ROUNDING * scale
        )
        # It is a squared metric, so its root obeys the triangle inequality.
        detour = frechet_distance(a, c) ** 0.5 + frechet_distance(c, b) ** 0.5
        assert distance**0.5 <= detour + (ROUNDING * scale) ** 0.5

    def test_bad_features(self) -> None:
        with pytest.raises(InputError, match=r"features: must have shape .* got \(1, 4\)"):
            fit_gaussian(torch.zeros(1, 4))
        with pytest.raises(InputError, match="features: must have shape"):
            fit_gaussian(torch.zeros(5, 1, 2))
        broken = torch.zeros(5, 3)
        broken[1, 2], broken[3, 0] = torch.nan, torch.inf
        with pytest.raises(InputError, match="2 of 5 vectors have a non-finite entry"):
            fit_gaussian(broken)
        with pytest.raises(InputError, match="3 and 4 features"):
            frechet_distance(fit_gaussian(normal(0, 5, 3)), fit_gaussian(normal(0, 5, 4)))


class TestWasserstein:
    @pytest.mark.parametrize(("count_a", "count_b"), [(1, 1), (1, 6), (30, 30), (10, 15)])
    def test_on_a_line_sorted_points_are_matched(self, count_a: int, count_b: int) -> None:
        a, b = normal(0, count_a, 1), 2 * normal(1, count_b, 1) + 1
        common = int(np.lcm(count_a, count_b))  # repeat the points until both sets are of one size
        sorted_a = a.repeat_interleave(common // count_a).sort().values
        sorted_b = b.flatten().repeat_interleave(common // count_b).sort().values
        expected = float((sorted_a - sorted_b).square().mean().sqrt())
        assert wasserstein2(a, b) == pytest.approx(expected, rel=ROUNDING)

    def test_two_thousand_points_against_the_assignment_problem(self) -> None:
        density = Density("checkerboard")
        a, b = density.take(2000, 0).values, density.take(2000, 1).values
        cost = (a.double()[:, None] - b.double()).square().sum(-1).numpy()
        rows, columns = linear_sum_assignment(cost)
        assert wasserstein2(a, b) == pytest.approx(cost[rows, columns].mean() ** 0.5, rel=ROUNDING)

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 2**32), size=st.integers(1, 4), count=st.integers(1, 20), more=st.integers(0, 5)
    )
    def test_invariances(self, seed: int, size: int, count: int, more: int) -> None:
        a, b, shift = normal(seed, count, size), normal(seed + 1, count + more, size), normal(seed + 2, size)
        distance = wasserstein2(a, b)
        order = torch.randperm(count, generator=generator(seed))
        assert wasserstein2(a, a[order]) == 0
        assert wasserstein2(b, a[order]) == pytest.approx(distance, rel=ROUNDING)
        # |a + c − b|² = |a − b|² + 2 c·(a − b) + |c|², and the middle term's mean is the same for every plan.
        squared = distance**2 + float(2 * shift @ (a.mean(0) - b.mean(0)) + shift @ shift)
        assert wasserstein2(a + shift, b) ** 2 == pytest.approx(squared, rel=1e-9, abs=1e-12)

    def test_small_distances_far_from_the_origin(self) -> None:
        # The coordinates of `b` round to 1e-10 here; |a|² + |b|² − 2 a·b would lose everything below 1e-2.
        a = 1e6 + normal(0, 40, 2)
        assert wasserstein2(a, a + torch.tensor([3e-4, 4e-4])) == pytest.approx(5e-4, rel=1e-6)

    def test_an_unfinished_solution_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wasserstein, "_MAX_ITERATIONS", 10)
        with pytest.raises(RuntimeError, match="not solved"):
            wasserstein2(normal(0, 100, 2), normal(1, 100, 2))

    def test_bad_points(self) -> None:
        good = torch.zeros(3, 2)
        with pytest.raises(InputError, match="points a: must have shape"):
            wasserstein2(torch.zeros(0, 2), good)
        with pytest.raises(InputError, match="points b: must have shape"):
            wasserstein2(good, torch.zeros(3))
        with pytest.raises(InputError, match="points b: has a non-finite"):
            wasserstein2(good, torch.full((3, 2), torch.inf))
        with pytest.raises(InputError, match="points a: have 2 coordinates, points b have 3"):
            wasserstein2(good, torch.zeros(3, 3))


class RealDigits:
    """A "generator" that returns real digits of the classes asked for, and remembers its calls."""

    def __init__(self, split: str, shuffled: bool = False) -> None:
        dataset = digits(split)  # type: ignore[arg-type]
        self.images, self.labels, *_ = dataset.take(len(dataset), 1)
        self.shuffled = shuffled
        self.calls: list[tuple[tuple[int, ...], int, int]] = []

    def __call__(
        self, labels: Sequence[int] | None = None, *, count: int | None = None, steps: int = 1, seed: int = 0
    ) -> Tensor:
        assert labels is not None
        assert count is None
        self.calls.append((tuple(labels), steps, seed))
        order = torch.randperm(len(self.images), generator=generator(seed))
        if self.shuffled:
            return self.images[order][: len(labels)]
        wanted, chosen = torch.tensor(labels), torch.empty(len(labels), dtype=torch.int64)
        for label in range(10):
            places = (wanted == label).nonzero().flatten()
            chosen[places] = order[self.labels[order] == label][: len(places)]
        return self.images[chosen]


class TestDigits:
    @pytest.mark.parametrize("split", ["held_out", "validation"])
    def test_the_real_digits_themselves(self, split: str) -> None:
        result = evaluate_digits(RealDigits(split), reference_split=split, steps=(1,), draws=2)  # type: ignore[arg-type]
        assert list(result) == ["real_frechet", "classifier_accuracy", "nfe"]
        row = result["nfe"]["1"]
        assert list(row) == ["label_accuracy", "frechet", "frechet_ratio", "images_per_second"]
        assert result["classifier_accuracy"] >= 0.97
        assert row["label_accuracy"] == pytest.approx(result["classifier_accuracy"], abs=1e-12)
        assert row["frechet"] == pytest.approx(0, abs=1e-10)
        assert row["frechet_ratio"] == row["frechet"] / result["real_frechet"]

    def test_shuffled_labels_are_right_one_time_in_ten(self) -> None:
        result = evaluate_digits(RealDigits("held_out", shuffled=True), steps=(1,), draws=10)
        # 3,600 samples, standard deviation 0.005.
        assert result["nfe"]["1"]["label_accuracy"] == pytest.approx(0.1, abs=0.025)
        assert result["nfe"]["1"]["frechet"] == pytest.approx(0, abs=1e-10)

    def test_training_digits_are_as_far_as_real_ones(self) -> None:
        row = evaluate_digits(RealDigits("train"), steps=(1,))["nfe"]["1"]
        # The sampler has the classes in exact proportion, `real_frechet` at random: a little farther.
        assert 0.8 < row["frechet_ratio"] < 1.05

    def test_worse_samples_score_worse(self) -> None:
        real = RealDigits("train")
        means = torch.stack([real.images[real.labels == label].mean(0) for label in range(10)])

        def class_means(labels: Sequence[int] | None = None, **_: object) -> Tensor:
            assert labels is not None
            return means[list(labels)]

        def noisy(labels: Sequence[int] | None = None, *, seed: int = 0, **_: object) -> Tensor:
            images = real(labels, seed=seed)
            return (images + 0.2 * torch.randn(images.shape, generator=generator(seed))).clamp(0, 1)

        # One image a class is always right and has no variety.
        row = evaluate_digits(class_means, steps=(1,), draws=1)["nfe"]["1"]
        assert row["label_accuracy"] == 1
        assert row["frechet_ratio"] > 5
        assert evaluate_digits(noisy, steps=(1,), draws=1)["nfe"]["1"]["frechet_ratio"] > 1.5

    def test_draws_have_their_own_seeds_and_the_reference_labels(self) -> None:
        sampler, progress = RealDigits("train"), []
        result = evaluate_digits(
            sampler,
            steps=(1, 4),
            draws=2,
            seed=7,
            on_progress=lambda done, total: progress.append((done, total)),
        )
        assert list(result["nfe"]) == ["1", "4"]
        assert [steps for _, steps, _ in sampler.calls] == [1, 1, 4, 4]
        seeds = [seed for _, _, seed in sampler.calls]
        assert seeds[:2] == seeds[2:]
        assert seeds[0] != seeds[1]
        held_out = digits("held_out").take(360, 0).labels
        assert held_out is not None
        assert all(sorted(labels) == sorted(held_out.tolist()) for labels, _, _ in sampler.calls)
        assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]

        again = evaluate_digits(RealDigits("train"), steps=(1,), draws=2, seed=7)
        assert again["nfe"]["1"]["frechet"] == result["nfe"]["1"]["frechet"]
        assert again["real_frechet"] == result["real_frechet"]
        fewer = evaluate_digits(RealDigits("train"), steps=(1,), draws=1, seed=7)
        assert fewer["real_frechet"] != result["real_frechet"]
        other = evaluate_digits(RealDigits("train"), steps=(1,), draws=2, seed=8)
        assert other["nfe"]["1"]["frechet"] != result["nfe"]["1"]["frechet"]

    @pytest.mark.parametrize(
        ("split", "needed"), [("held_out", ["held_out", "train"]), ("validation", ["fit", "validation"])]
    )
    def test_which_digits_are_looked_at(
        self, split: str, needed: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def recording(split: str) -> TensorDataset:
            asked.append(split)
            return digits(split)  # type: ignore[arg-type]

        monkeypatch.setattr("tvmatch.evaluation.digits.digits", recording)
        evaluate_digits(RealDigits("fit"), reference_split=split, steps=(1,), draws=1)  # type: ignore[arg-type]
        assert sorted(asked) == needed

    def test_speed_counts_the_sampling_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks = iter([0.0, 2.0, 100.0, 101.0])
        monkeypatch.setattr(generation, "perf_counter", lambda: next(ticks))
        row = evaluate_digits(RealDigits("train"), steps=(1,), draws=2)["nfe"]["1"]
        assert row["images_per_second"] == 720 / 3

    def test_bad_arguments(self) -> None:
        sampler = RealDigits("train")
        with pytest.raises(InputError, match="steps: must be one or more numbers ≥ 1, got \\[0\\]"):
            evaluate_digits(sampler, steps=(0,))
        with pytest.raises(InputError, match="steps: "):
            evaluate_digits(sampler, steps=())
        with pytest.raises(InputError, match="draws: must be at least 1, got 0"):
            evaluate_digits(sampler, draws=0)
        with pytest.raises(InputError, match=r"reference_split: .* got 'test'"):
            evaluate_digits(sampler, reference_split="test")  # type: ignore[arg-type]
        assert not sampler.calls
        with pytest.raises(InputError, match=r"sample: must return shape .* got \(360, 2\)"):
            evaluate_digits(lambda labels=None, **_: torch.zeros(360, 2), draws=1)
        with pytest.raises(InputError, match="360 of 360 vectors have a non-finite entry"):
            evaluate_digits(lambda labels=None, **_: torch.full((360, 1, 8, 8), torch.nan), draws=1)


class TestPoints:
    def test_fresh_data_are_as_far_as_fresh_data(self) -> None:
        density = Density("gaussians")

        def fresh(
            labels: object = None, *, count: int | None = None, steps: int = 1, seed: int = 0
        ) -> Tensor:
            assert labels is None
            assert count is not None
            return density.take(count, seed).values

        result = evaluate_points(fresh, density, steps=(1, 2), count=250, draws=16)
        assert list(result) == ["real_wasserstein2", "real_wasserstein2_error", "nfe"]
        assert list(result["nfe"]) == ["1", "2"]
        row = result["nfe"]["1"]
        assert list(row) == ["wasserstein2", "wasserstein2_error", "points_per_second"]
        difference = row["wasserstein2"] - result["real_wasserstein2"]
        # Two means of 16 independent draws of one quantity: four standard errors of their difference.
        assert (
            abs(difference)
            < 4 * (row["wasserstein2_error"] ** 2 + result["real_wasserstein2_error"] ** 2) ** 0.5
        )

    def test_draws_are_averaged(self) -> None:
        """Samples all at one place: the distance of a draw is known, and so are the mean and its error."""
        values = normal(0, 12, 2).float()
        dataset = TensorDataset(values)
        asked: list[int] = []

        def origin(labels: object = None, *, count: int | None = None, seed: int = 0, **_: object) -> Tensor:
            asked.append(seed)
            return torch.zeros(count or 0, 2)

        result = evaluate_points(origin, dataset, count=3, draws=4, steps=(1,))
        squares = [
            dataset.take(6, fold(0, "real", draw)).values[:3].double().square().sum(1).mean()
            for draw in range(4)
        ]
        distances = torch.stack(squares).sqrt()
        row = result["nfe"]["1"]
        assert row["wasserstein2"] == pytest.approx(float(distances.mean()), rel=1e-12)
        assert row["wasserstein2_error"] == pytest.approx(float(distances.std() / 2), rel=1e-12)
        assert len(set(asked)) == 4  # each draw has noise of its own
        one = evaluate_points(origin, dataset, count=3, draws=1, steps=(1,))
        assert "real_wasserstein2_error" not in one

    def test_collapsed_samples(self) -> None:
        # All mass at the origin: W₂² is the mean squared norm of the data, 1.5² + 2 · 0.1² = 2.27.
        result = evaluate_points(
            lambda labels=None, *, count=None, **_: torch.zeros(count or 0, 2),
            Density("gaussians"),
            draws=1,
            steps=(1,),
        )
        # 2,000 squared radii, each with standard deviation 0.3: 0.3 % of their mean, half that of its root.
        assert result["nfe"]["1"]["wasserstein2"] == pytest.approx(2.27**0.5, rel=0.01)
        assert result["real_wasserstein2"] < 0.3

    def test_labels_of_the_reference_are_asked_for(self) -> None:
        values = normal(0, 40, 2).float()
        dataset = TensorDataset(values, torch.arange(40))  # every point its own class

        def by_label(labels: Sequence[int] | None = None, **_: object) -> Tensor:
            assert labels is not None
            return values[list(labels)]

        result = evaluate_points(by_label, dataset, count=20, steps=(1,))
        assert result["nfe"]["1"]["wasserstein2"] == 0
        assert result["real_wasserstein2"] > 0
        with pytest.raises(InputError, match="count"):
            evaluate_points(by_label, dataset, count=21)

    def test_bad_arguments(self) -> None:
        with pytest.raises(InputError, match="dataset: must hold points"):
            evaluate_points(RealDigits("train"), digits("train"))
        with pytest.raises(InputError, match="count: must be at least 1"):
            evaluate_points(RealDigits("train"), Density("moons"), count=0)
        with pytest.raises(InputError, match="draws: must be at least 1"):
            evaluate_points(RealDigits("train"), Density("moons"), draws=0)


class TestImages:
    def test_the_reference_itself_and_a_shifted_one(self) -> None:
        images = torch.rand(60, 3, 4, 2, generator=generator(0))
        labels = torch.arange(60)  # every image its own class: a sampler can then give it back
        dataset = TensorDataset(images, labels)
        asked: list[list[int]] = []

        def sampler(labels: Sequence[int] | None = None, *, steps: int = 1, **_: object) -> Tensor:
            assert labels is not None
            asked.append(list(labels))
            return images[list(labels)] + (0.1 if steps == 2 else 0.0)

        result = evaluate_images(sampler, dataset, count=30, steps=(1, 2))
        assert list(result) == ["real_frechet", "nfe"]
        assert list(result["nfe"]["1"]) == ["frechet", "frechet_ratio", "images_per_second"]
        assert result["nfe"]["1"]["frechet"] == pytest.approx(0, abs=1e-10)
        # A shift of 24 pixels by 0.1; the pixels are float32, so good to 1e-7.
        assert result["nfe"]["2"]["frechet"] == pytest.approx(0.24, rel=1e-5)
        assert result["nfe"]["2"]["frechet_ratio"] == pytest.approx(0.24 / result["real_frechet"], rel=1e-5)

        # The other real set is all the rest, so it shares no image with the reference.
        rest = sorted(set(range(60)) - set(asked[0]))
        assert len(rest) == 30
        expected = frechet_distance(
            fit_gaussian(images[rest].flatten(1)), fit_gaussian(images[asked[0]].flatten(1))
        )
        assert result["real_frechet"] == pytest.approx(expected, rel=1e-9)

    def test_few_large_images(self) -> None:
        """What `evaluate --samples 10` and the end of a training compute, of 128 × 128 colour images."""
        dataset = TensorDataset(torch.randint(0, 256, (30, 3, 128, 128), dtype=torch.uint8))
        data = ImagesData("photos", resolution=128)
        network = randomize_(small_dit((3, 128, 128), 0, patch_size=32))
        model = TrainedModel(network, dataset.spec, scaled=False, guidance=1.0)
        with NothingLarger(30 * 3 * 128 * 128):
            metrics = results.measure(model, Config(data=data), dataset, (1,), 10, 0)
        assert metrics["real_frechet"] > 0
        assert metrics["nfe"]["1"]["frechet_ratio"] > 1

    def test_without_labels_a_number_of_samples_is_asked_for(self) -> None:
        dataset = TensorDataset(torch.rand(20, 1, 2, 2, generator=generator(1)))

        def sampler(labels: object = None, *, count: int | None = None, seed: int = 0, **_: object) -> Tensor:
            assert labels is None
            assert count == 10
            return torch.rand(10, 1, 2, 2, generator=generator(seed))

        assert evaluate_images(sampler, dataset, count=10, steps=(1,))["nfe"]["1"]["frechet_ratio"] > 0

    def test_bad_arguments(self) -> None:
        sampler = RealDigits("train")
        with pytest.raises(InputError, match="dataset: must hold images"):
            evaluate_images(sampler, Density("moons"), count=10)
        with pytest.raises(InputError, match="count: must be at least 2, got 1"):
            evaluate_images(sampler, digits("train"), count=1)
        with pytest.raises(InputError, match="count"):
            evaluate_images(sampler, digits("train"), count=1000)
        with pytest.raises(InputError, match="dataset: the 8 images taken are all alike"):
            evaluate_images(sampler, TensorDataset(torch.zeros(9, 1, 8, 8)), count=4)


METRICS = {
    "nfe": {
        "1": {
            "label_accuracy": 0.98125,
            "frechet": 0.51239,
            "frechet_ratio": 1.2504,
            "images_per_second": 5321.7,
        },
        "4": {"label_accuracy": 1.0, "frechet": 0.4, "frechet_ratio": 1.0, "images_per_second": 999.4},
    },
    "real_frechet": 0.40978,
    "parameters": 1234567,
    "steps": 1500,
    "dataset": "digits",
    "train_seconds": 71.25,
}


class TestReport:
    def test_metrics_are_written_in_order_and_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "run" / "metrics.json"
        write_metrics(path, METRICS)
        read = json.loads(path.read_text())
        assert read == METRICS
        assert list(read) == ["dataset", "steps", "parameters", "train_seconds", "real_frechet", "nfe"]
        assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]

    def test_a_failed_write_keeps_the_former_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "metrics.json"
        write_metrics(path, {"nfe": {}})
        before = path.read_bytes()
        with pytest.raises(ValueError, match="JSON"):
            write_metrics(path, {"real_frechet": float("nan"), "nfe": {}})

        def full_disk(self: Path, *_: object, **__: object) -> int:
            with self.open("w") as file:
                file.write("{")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_metrics(path, METRICS)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]

    def test_table(self) -> None:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(metrics_table(METRICS))
        lines = console.export_text().splitlines()
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
        assert cells == [["1", "0.981", "0.5124", "1.250", "5,322"], ["4", "1.000", "0.4", "1.000", "999.4"]]
        header = next(line for line in lines if "steps" in line and "│" not in line)
        assert [word.strip() for word in header.split("┃")[1:-1]] == [
            "steps",
            "label accuracy",
            "frechet",
            "frechet ratio",
            "images / s",
        ]
        caption = " ".join(
            " ".join(lines[lines.index(next(x for x in lines if x.startswith("└"))) + 1 :]).split()
        )
        assert "real frechet 0.4098" in caption
        assert "parameters 1,234,567" in caption

    def test_table_of_other_metrics(self) -> None:
        table = metrics_table({"real_wasserstein2": 0.1, "nfe": {"2": {"wasserstein2": 0.2}}})
        assert [column.header for column in table.columns] == ["steps", "wasserstein2"]
        assert table.caption == "real wasserstein2 0.1"


def test_an_eigendecomposition_that_gives_up_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK's divide and conquer fails on some covariance of 2,048 features of which 12 are not zero."""
    vectors = torch.randn(8, 20, generator=generator(0, "vectors"), dtype=torch.float64)
    vectors[:, 5:] = 0
    covariance, other = vectors.T.cov(), torch.eye(20, dtype=torch.float64)
    expected = frechet_distance(
        GaussianStatistics(vectors.mean(0), covariance), GaussianStatistics(torch.zeros(20), other)
    )

    def fails(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    again = frechet_distance(
        GaussianStatistics(vectors.mean(0), covariance), GaussianStatistics(torch.zeros(20), other)
    )
    assert again == pytest.approx(expected, rel=1e-12)  # two float64 algorithms of 20 × 20 numbers
