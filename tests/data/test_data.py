"""Data specifications, the order of training data, tensors, digits and densities in the plane."""

import itertools
import math
import subprocess
import sys
import warnings
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor

from tvmatch.data import DataSpec, Density, DensityData, DigitsData, TensorDataset, digits, epoch_indices
from tvmatch.data.base import mirrored_at_random
from tvmatch.errors import InputError
from tvmatch.seeds import RowDraws, generator


def numbered_images(count: int) -> Tensor:
    """Different images (count, 1, 2, 3) none of which equals its mirror image."""
    return torch.rand(count, 1, 2, 3, generator=generator(0, "images"))


# --- DataSpec ---


def colour_spec(class_names: tuple[str, ...] | None = None) -> DataSpec:
    return DataSpec("image", (3, 4, 5), class_names, mean=(0.1, 0.5, 0.9), std=(0.2, 0.5, 2.0))


def test_normalisation_is_per_channel_and_inverts() -> None:
    spec = colour_spec()
    data = torch.rand(6, 3, 4, 5, dtype=torch.float64, generator=generator(0, "data"))
    network = spec.normalize(data)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        torch.testing.assert_close(network[:, channel], (data[:, channel] - mean) / std)
    torch.testing.assert_close(spec.denormalize(network), data)


def test_labels_are_names_numbers_or_digits() -> None:
    spec = colour_spec(("cat", "dog", "0"))
    # A name goes before a number: the string "0" is the class called so, the integer 0 is the first.
    assert spec.label_indices(["dog", "cat", 2, 0, "0", "1"]).tolist() == [1, 0, 2, 0, 2, 1]
    assert spec.label_indices(np.array([2, 1])).tolist() == [2, 1]  # type: ignore[arg-type]
    assert spec.label_indices([]).dtype == torch.int64


@pytest.mark.parametrize("label", ["bird", 3, -1, "3", "-1", 1.5, "1.5", "²", "--1"])
def test_wrong_labels_are_named(label: int | str) -> None:
    with pytest.raises(InputError, match=str(label).replace(".", r"\.")):
        colour_spec(("cat", "dog", "0")).label_indices([0, label])


def test_labels_without_classes() -> None:
    assert colour_spec().class_count == 0
    with pytest.raises(InputError, match="no classes"):
        colour_spec().label_indices([0])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (3, 4)},
        {"shape": (3, 0, 4)},
        {"mean": (0.5,)},
        {"std": (0.5, 0.5, 0.0)},
        {"std": (0.5, 0.5, math.nan)},
        {"mean": (0.5, 0.5, math.inf)},
        {"class_names": ("cat", "cat")},
        {"class_names": ()},
    ],
)
def test_impossible_specifications(change: dict[str, object]) -> None:
    fields = {"shape": (3, 4, 5), "class_names": None, "mean": (0.5,) * 3, "std": (0.5,) * 3} | change
    with pytest.raises(InputError):
        DataSpec("image", **fields)  # type: ignore[arg-type]


# --- the order of an epoch ---


@settings(deadline=None)
@given(length=st.integers(1, 40), size=st.integers(1, 100), seed=st.integers(0, 5))
def test_every_element_exactly_once_an_epoch(length: int, size: int, seed: int) -> None:
    epochs = 3
    steps = -(-epochs * length // size)
    order = torch.cat([epoch_indices(length, step, size, seed) for step in range(steps)])
    for epoch in order[: epochs * length].view(epochs, length):
        assert epoch.sort().values.tolist() == list(range(length))


@settings(deadline=None)
@given(length=st.integers(1, 40), size=st.integers(1, 15), step=st.integers(0, 30))
def test_the_order_belongs_to_the_sample_number(length: int, size: int, step: int) -> None:
    """One sample a step gives the same sequence as `size` samples a step, from any step on."""
    one_by_one = [epoch_indices(length, step * size + i, 1, 7) for i in range(size)]
    assert torch.equal(epoch_indices(length, step, size, 7), torch.cat(one_by_one))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [epoch_indices(100, 0, 300, seed).view(3, 100) for seed in (0, 1)]
    distinct = torch.cat(orders).unique(dim=0)
    assert len(distinct) == 6


@pytest.mark.parametrize(("length", "step", "size"), [(0, 0, 1), (5, -1, 1), (5, 0, 0)])
def test_impossible_steps(length: int, step: int, size: int) -> None:
    with pytest.raises(ValueError, match="need length"):
        epoch_indices(length, step, size, 0)


# --- tensors ---


def test_batches_are_the_elements_with_their_labels() -> None:
    images = numbered_images(10)
    labels = torch.arange(10) % 3
    dataset = TensorDataset(images, labels)
    assert dataset.spec == DataSpec("image", (1, 2, 3), ("0", "1", "2"), mean=(0.5,), std=(0.5,))
    batch = dataset.batch(step=1, size=4, seed=3)
    order = epoch_indices(10, 1, 4, 3)
    assert torch.equal(batch.values, images[order])
    assert batch.labels is not None
    assert torch.equal(batch.labels, labels[order])


def test_take_gives_distinct_elements_of_the_seed() -> None:
    dataset = TensorDataset(numbered_images(20), horizontal_flip=True)
    everything = dataset.take(20, seed=5).values
    # Never mirrored, though training images are.
    assert torch.equal(everything.flatten(1).unique(dim=0), numbered_images(20).flatten(1).unique(dim=0))
    assert torch.equal(dataset.take(7, seed=5).values, everything[:7])
    assert not torch.equal(dataset.take(20, seed=6).values, everything)
    assert dataset.take(1, seed=0).labels is None


@pytest.mark.parametrize("count", [0, 21])
def test_take_of_what_is_not_there(count: int) -> None:
    with pytest.raises(InputError, match=f"{count} elements were asked for, the data set has 20"):
        TensorDataset(numbered_images(20)).take(count, seed=0)


def test_half_of_the_images_are_mirrored_anew_each_step() -> None:
    images = numbered_images(2000)
    dataset = TensorDataset(images, horizontal_flip=True)
    mirrored = []
    for step in range(2):  # each a whole epoch
        original = images[epoch_indices(2000, step, 2000, 0)]
        values = dataset.batch(step, 2000, seed=0).values
        flipped = (values == original.flip(-1)).flatten(1).all(1)
        assert ((values == original).flatten(1).all(1) ^ flipped).all()
        mirrored.append(flipped)
        # Five standard deviations of a binomial of 2000 and 1/2: 112.
        assert abs(int(flipped.sum()) - 1000) < 112
    # Independent coins agree in half of the places.
    assert abs(int((mirrored[0] == mirrored[1]).sum()) - 1000) < 112


def test_bytes_and_doubles_become_float32() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    from_bytes = TensorDataset(pixels).take(1, 0).values
    from_doubles = TensorDataset(pixels.double() / 255).take(1, 0).values
    assert from_bytes.dtype == from_doubles.dtype == torch.float32
    assert torch.equal(from_bytes, from_doubles)


def test_points_have_any_range_and_keep_their_units() -> None:
    points = torch.tensor([[-5.0, 3.0], [7.0, 100.0]])
    dataset = TensorDataset(points, [1, 0], class_names=["a", "b"])
    assert dataset.spec == DataSpec("points", (2,), ("a", "b"), mean=(0.0, 0.0), std=(1.0, 1.0))
    scaled = TensorDataset(points, mean=[1, 2], std=[3, 4])
    assert (scaled.spec.mean, scaled.spec.std) == ((1, 2), (3, 4))
    values, labels, *_ = dataset.take(2, 0)
    assert labels is not None
    assert torch.equal(values[labels.argsort()], points.flip(0))


IMAGES = numbered_images(4)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (IMAGES.numpy(), {}, "values: must be a torch.Tensor, got ndarray"),
        (IMAGES[0], {}, r"values: .*shape \(1, 2, 3\)"),
        (IMAGES[:0], {}, "values: there are no elements"),
        (IMAGES.long(), {}, "values: .*int64"),
        (IMAGES[:, 0, 0].byte(), {}, "values: .*uint8"),
        (
            torch.where(torch.arange(4).view(-1, 1, 1, 1) == 2, torch.nan, IMAGES),
            {},
            "element 2 .* not finite",
        ),
        (torch.full((2, 2), 1e300, dtype=torch.float64), {}, "element 0 .* not finite"),
        (IMAGES * 255, {}, r"values: pixels must lie in \[0, 1\], they lie in \[.*, 2.*\]"),
        (IMAGES - 0.5, {}, r"values: pixels must lie in \[0, 1\]"),
        (IMAGES, {"labels": [0, 1, 2]}, r"labels: .*4 elements, got shape \(3,\)"),
        (IMAGES, {"labels": torch.zeros(4, 1, dtype=torch.long)}, r"labels: .*got shape \(4, 1\)"),
        (IMAGES, {"labels": [0.0, 1.0, 2.0, 1.0]}, "labels: must be integers"),
        (IMAGES, {"labels": [0, 1, -1, 1]}, "labels: -1 is negative"),
        (IMAGES, {"labels": [0, 1, 2, 1], "class_names": ["a", "b"]}, r"labels: 2 is outside 0 … 1"),
        (IMAGES, {"class_names": ["a", "b"]}, "class_names: there are names but no labels"),
        (IMAGES, {"labels": [0, 1, 0, 1], "class_names": "ab"}, "class_names: must be .*, got 'ab'"),
        (IMAGES, {"labels": [0, None, 1, 1]}, "labels: must be integers, one per element, got object"),
        (IMAGES, {"labels": [0, float("nan"), 1, 1]}, "labels: must be integers, .* got float64"),
        (IMAGES, {"labels": np.array([0, 1.5, 1, 1], object)}, "labels: must be integers, .* got object"),
        (IMAGES, {"labels": [[0], [1], [0, 1], []]}, r"labels: must be integers, one per element \(setting"),
        (
            IMAGES,
            {"labels": torch.ones(4).bfloat16()},
            r"labels: must be integers, one per element \(.*BFloat",
        ),
        (IMAGES, {"labels": ["0", "1", "0", "1"]}, "labels: must be integers, .* got <U1"),
        (IMAGES, {"labels": "0101"}, "labels: must be integers, .* got <U4"),
        (IMAGES, {"labels": {0: 1}}, "labels: must be integers, .* got object"),
        (IMAGES, {"labels": {0, 1, 2, 3}}, "labels: must be integers, .* got object"),
        (
            IMAGES,
            {"labels": [0] * 4, "class_names": {"b": 1, "a": 0}},
            "class_names: must be one name per class",
        ),
        (
            IMAGES,
            {"labels": [0] * 4, "class_names": {"a"}},
            r"class_names: must be one name per class, got \{'a'\}",
        ),
        (IMAGES, {"labels": [0] * 4, "class_names": 5}, "class_names: must be one name per class, got 5"),
        (IMAGES, {"labels": [0] * 4, "class_names": []}, "class_names: there are labels but no names"),
        (IMAGES, {"labels": 1}, r"labels: .*got shape \(\)"),
        (IMAGES, {"labels": torch.tensor(1)}, r"labels: .*got shape \(\)"),
        (IMAGES, {"labels": np.array([True, False] * 2)}, "labels: .* got bool"),
        (IMAGES, {"labels": np.zeros((4, 1), np.int64)}, r"labels: .*got shape \(4, 1\)"),
        (IMAGES, {"labels": []}, "labels: must be integers, .* got float64"),
        (IMAGES, {"labels": [0, 1, 2**70, 1]}, "labels: must be integers, .* got object"),
        (IMAGES, {"labels": [0, 1, 10**12, 1]}, "labels: 1000000000000 is outside 0 … 99999"),
        (IMAGES[:, 0, 0], {"horizontal_flip": True}, "horizontal_flip: only images"),
        (IMAGES, {"mean": [0.5, 0.5]}, "mean and std"),
    ],
)
def test_mistakes_in_tensors_are_told(values: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TensorDataset(values, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64, list, tuple])
def test_labels_of_any_whole_numbers(kind: Any) -> None:
    """Also from memory that may not be written to, of which PyTorch warns."""
    numbers = [2, 0, 1, 2]
    labels = kind(numbers) if kind in (list, tuple) else np.array(numbers, dtype=kind)
    if isinstance(labels, np.ndarray):
        labels.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        dataset = TensorDataset(IMAGES, labels)
    values, found, *_ = dataset.take(4, 0)
    assert dataset.spec.class_names == ("0", "1", "2")
    assert found is not None
    for value, label in zip(values, found, strict=True):
        row = next(k for k in range(4) if torch.equal(IMAGES[k], value))
        assert int(label) == numbers[row]


# --- digits ---


def rows_with_labels(*datasets: TensorDataset) -> list[tuple[float, ...]]:
    """Every image and its label as one sorted list: a multiset to compare."""
    rows = []
    for dataset in datasets:
        values, labels, *_ = dataset.take(len(dataset), seed=0)
        assert labels is not None
        rows += [
            (*image.flatten().tolist(), label) for image, label in zip(values, labels.tolist(), strict=True)
        ]
    return sorted(rows)


def test_digits_are_those_of_scikit_learn_in_two_parts_and_two_of_one_part() -> None:
    data = load_digits()
    whole = TensorDataset(torch.from_numpy(data.images / 16)[:, None], torch.from_numpy(data.target))
    assert rows_with_labels(digits("train"), digits("held_out")) == rows_with_labels(whole)
    assert rows_with_labels(digits("fit"), digits("validation")) == rows_with_labels(digits("train"))
    assert [len(digits(part)) for part in ("train", "held_out", "fit", "validation")] == [
        1437,
        360,
        1077,
        360,
    ]


@pytest.mark.parametrize("part", ["train", "held_out", "fit", "validation"])
def test_digits_parts_hold_every_class_in_proportion(part: str) -> None:
    dataset = digits(part)  # type: ignore[arg-type]
    _, labels, *_ = dataset.take(len(dataset), seed=0)
    assert labels is not None
    share = np.bincount(load_digits().target) * len(dataset) / 1797
    # Rounding to whole images moves a count by at most one, twice for a part of a part.
    assert np.abs(np.bincount(labels) - share).max() < 2
    assert dataset.spec == DataSpec("image", (1, 8, 8), tuple("0123456789"), mean=(0.305,), std=(0.376,))


def test_held_out_digits_are_not_to_be_trained_on() -> None:
    assert get_args(get_type_hints(DigitsData)["split"]) == ("train", "fit")
    assert len(DigitsData().load()) == 1437


def test_digits_are_normalised_by_their_training_part() -> None:
    dataset = digits("train")
    normalised = dataset.spec.normalize(dataset.take(len(dataset), seed=0).values)
    # The constants are rounded to three places, of a standard deviation of 0.376.
    assert abs(normalised.mean()) < 2e-3
    assert abs(normalised.std() - 1) < 2e-3


def test_unknown_digits_part() -> None:
    with pytest.raises(InputError, match=r"split: .*held_out.*'test'"):
        digits("test")


# --- densities ---

DENSITIES = ["checkerboard", "moons", "gaussians"]
COUNT = 40_000


def points_of(name: str) -> Tensor:
    return DensityData(name=name).load().draw(RowDraws(0, "test"), range(COUNT))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DENSITIES)
def test_network_units_of_a_density_have_mean_zero_and_variance_one(name: str) -> None:
    spec = DensityData(name=name).load().spec  # type: ignore[arg-type]
    network = spec.normalize(points_of(name).double())
    # Five standard errors of a mean, and of a variance whose kurtosis is at most 3.
    assert network.mean(0).abs().max() < 5 / math.sqrt(COUNT)
    assert (network.var(0) - 1).abs().max() < 5 * math.sqrt(2 / COUNT)


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_of_a_density_belong_to_their_arguments(name: str) -> None:
    density = DensityData(name=name).load()  # type: ignore[arg-type]
    first = density.batch(step=3, size=50, seed=1)
    assert first.labels is None
    assert (first.values.shape, first.values.dtype) == ((50, 2), torch.float32)
    assert torch.equal(density.batch(3, 50, 1).values, first.values)
    assert torch.equal(density.take(50, 1).values, density.take(50, 1).values)
    others = [density.batch(4, 50, 1), density.batch(3, 50, 2), density.take(50, 1), density.take(50, 2)]
    everything = torch.cat([first.values, *(other.values for other in others)])
    assert len(everything.unique(dim=0)) == 250  # no point twice


@pytest.mark.parametrize("name", DENSITIES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 599), max_size=8))
def test_points_belong_to_their_row(name: str, cuts: set[int]) -> None:
    density, draws = DensityData(name=name).load(), RowDraws(5, "step", 2)  # type: ignore[arg-type]
    whole = density.draw(draws, range(600))
    assert torch.equal(density.batch(2, 600, 5).values, whole)
    assert torch.equal(density.batch(2, 7, 5).values, whole[:7])
    parts = [density.draw(draws, range(*pair)) for pair in itertools.pairwise([0, *sorted(cuts), 600])]
    assert torch.equal(torch.cat(parts), whole)


def test_coins_belong_to_their_row() -> None:
    whole = mirrored_at_random(range(900), 3, 1)
    assert torch.equal(mirrored_at_random(range(300, 700), 3, 1), whole[300:700])


def test_checkerboard_is_uniform_on_its_eight_squares() -> None:
    points = points_of("checkerboard").double()
    squares = points.floor()
    assert points.abs().max() <= 2
    assert (squares.sum(1) % 2 == 0).all()
    _, counts = squares.unique(dim=0, return_counts=True)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 1e-4
    for inside in (points - squares).T:
        assert stats.kstest(inside, "uniform").pvalue > 1e-4


def test_moons_are_two_half_circles_with_round_noise() -> None:
    points = points_of("moons").double()
    radius = 4 / 3
    centre = radius * torch.tensor([-0.5, -0.25], dtype=torch.float64)  # of the upper moon
    upper = points - centre
    distance = (upper.norm(dim=1) - radius).abs().minimum(((points + centre).norm(dim=1) - radius).abs())
    # A point lies within its noise, of standard deviation 0.1, of its own arc: 4.5 of them once in 10⁵.
    assert (distance > 0.45).double().mean() < 1e-3
    # On the outer left only the upper moon is near (the lower one's end lies at 90° and half the radius),
    # and the distance from its circle is the noise itself.
    angle = torch.atan2(upper[:, 1], upper[:, 0])
    noise = upper.norm(dim=1)[(angle > 2 / 3 * math.pi) & (angle < 0.9 * math.pi)] - radius
    noise = noise[noise > -0.4]
    assert len(noise) > 4000
    # The curvature adds 0.1² / (2 · 4/3) = 0.004 to the mean; the standard errors are 0.0015 and 0.001.
    assert abs(noise.mean() - 0.004) < 0.0075
    assert abs(noise.std() - 0.1) < 0.005
    # The half turn about the origin exchanges the moons, hence both halves weigh the same.
    assert abs((points[:, 1] > 0).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(COUNT)


def test_gaussians_are_a_ring_of_eight() -> None:
    points = points_of("gaussians").double()
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    mode = torch.cdist(points, centres).argmin(1)
    assert stats.chisquare(torch.bincount(mode, minlength=8)).pvalue > 1e-4
    # Neighbouring centres are 11 standard deviations apart, so that no point is given to a wrong one.
    for residual in ((points - centres[mode]) / 0.1).T:
        assert stats.kstest(residual, "norm").pvalue > 1e-4


def test_unknown_density_and_no_points() -> None:
    with pytest.raises(InputError, match="'swiss_roll'; there are checkerboard, moons, gaussians"):
        Density("swiss_roll")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="count: must be at least 1, got 0"):
        Density("moons").take(0, seed=0)


def test_importing_the_data_room_imports_no_heavy_library() -> None:
    heavy = ["sklearn", "datasets", "PIL", "pyarrow", "pandas", "scipy"]
    code = f"import sys, tvmatch.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
