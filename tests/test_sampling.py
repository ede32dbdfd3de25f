"""Seeds, noise, grids of times, and the sampler on a flow that is known in closed form."""

import itertools
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from tvmatch.dual import Dual
from tvmatch.errors import InputError
from tvmatch.flow_map import FlowMap
from tvmatch.sampling import sample_noise, sample_trajectory, time_grid
from tvmatch.seeds import fold, generator

PATHS = st.lists(st.integers(0, 2**70) | st.text(min_size=1, max_size=4), max_size=4)


@given(first=st.tuples(st.integers(0, 2**70), PATHS), second=st.tuples(st.integers(0, 2**70), PATHS))
@settings(deadline=None, derandomize=True)
def test_streams_differ_where_their_names_do(
    first: tuple[int, list[int | str]], second: tuple[int, list[int | str]]
) -> None:
    same = first == second
    assert (fold(first[0], *first[1]) == fold(second[0], *second[1])) == same
    assert 0 <= fold(first[0], *first[1]) < 2**63


def test_zeros_and_lengths_are_part_of_a_streams_name() -> None:
    names: list[tuple[Any, ...]] = [(0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (1, 2), (1 + 2 * 2**32,)]
    names += [(0, 97), (0, "a"), (0, "a\0"), (0, "a", 0), (0, "ab"), (0, "a", "b"), (0, zlib.crc32(b"a"))]
    assert len({fold(*name) for name in names}) == len(names)


def test_streams_are_the_same_on_every_machine() -> None:
    """Numbers that checkpoints rely on: a change here changes every run that is resumed."""
    assert fold(0) == 8597659618385908031
    assert fold(0, "noise", 1200) == 2526107720946380844
    assert fold(np.int64(0), "noise", np.int64(1200)) == 2526107720946380844  # type: ignore[arg-type]


@pytest.mark.parametrize(("seed", "path"), [(-1, ()), (0, ("noise", -1))])
def test_negative_seeds_are_refused(seed: int, path: tuple[int | str, ...]) -> None:
    with pytest.raises(ValueError, match="-1"):
        fold(seed, *path)


def test_generators_repeat() -> None:
    draws = [torch.rand(4, generator=generator(3, "purpose", 7)) for _ in range(2)]
    assert torch.equal(*draws)


@given(
    order=st.permutations(range(12)),
    cuts=st.sets(st.integers(1, 11)),
    shape=st.sampled_from([(2,), (1, 3, 5), (3, 4, 4)]),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_noise_belongs_to_the_sample(order: list[int], cuts: set[int], shape: tuple[int, ...]) -> None:
    """Bit for bit the same row for an index, in any order and however it is cut into batches."""
    whole = sample_noise(5, range(12), shape)
    edges = [0, *sorted(cuts), 12]
    batches = [sample_noise(5, order[start:end], shape) for start, end in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(batches), whole[list(order)])


def test_noise_is_standard_normal() -> None:
    noise = sample_noise(0, range(500), (1, 8, 8))
    assert noise.dtype == torch.float32
    assert noise.shape == (500, 1, 8, 8)
    # A fixed seed; a right sampler would fail at this level for one seed in 10,000.
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, sample_noise(1, range(500), (1, 8, 8)))


def test_noise_does_not_depend_on_the_default_precision() -> None:
    expected = sample_noise(0, [0], (4,))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(sample_noise(0, [0], (4,)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@given(steps=st.integers(1, 300))
def test_uniform_grid(steps: int) -> None:
    grid = time_grid(steps)
    assert len(grid) == steps + 1
    assert grid[0] == 1.0
    assert grid[-1] == 0.0
    assert all(later < earlier for earlier, later in itertools.pairwise(grid))
    assert np.allclose(grid, np.linspace(1, 0, steps + 1), rtol=0, atol=1e-15)


def test_grid_of_ones_own() -> None:
    assert time_grid(times=[1, 0.3, 0]) == (1.0, 0.3, 0.0)
    assert time_grid(2, times=[1, 0.3, 0]) == (1.0, 0.3, 0.0)
    assert time_grid(times=torch.tensor([1.0, 0.5, 0.0]).tolist()) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps: int) -> None:
    with pytest.raises(InputError, match=f"steps.*{steps}"):
        time_grid(steps)


@pytest.mark.parametrize(
    "times",
    [
        [],
        [1.0],
        [1.0, 1.0, 0.0],
        [0.0, 1.0],
        [0.9, 0.0],
        [1.0, 0.1],
        [1.0, 0.2, 0.3, 0.0],
        [1.0, float("nan"), 0],
    ],
)
def test_wrong_times(times: list[float]) -> None:
    with pytest.raises(InputError, match="times"):
        time_grid(times=times)


def test_steps_and_times_that_disagree() -> None:
    with pytest.raises(InputError, match=r"times.*2 steps.*steps is 3"):
        time_grid(3, times=[1, 0.5, 0])


MEAN, STD = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)


class GaussianFlow:
    """F of the exact flow to independent coordinates N(m, σ²), shifted by the label's number.

    With ρ_t² = (1 − t)² σ² + t², ψ(x, t, s) = (1 − s) m + (ρ_s / ρ_t)(x − (1 − t) m), F = (ψ − x) / (s − t).
    It is divided by w if `scaled`, so that k(w) F is the same.
    """

    def __init__(self, scaled: bool = False) -> None:
        self.scaled = scaled
        self.calls: list[tuple[float, float]] = []

    def __call__(
        self,
        x: Tensor | Dual,
        t: Tensor | Dual,
        s: Tensor | Dual,
        labels: Tensor | None = None,
        guidance_weight: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(x, Tensor)
        assert isinstance(t, Tensor)
        assert isinstance(s, Tensor)
        self.calls.append((t[0].item(), s[0].item()))
        mean = MEAN if labels is None else MEAN + labels[:, None]
        t, s = t[:, None], s[:, None]
        start, end = (torch.hypot((1 - time) * STD, time) for time in (t, s))
        moved = (1 - s) * mean + end / start * (x - (1 - t) * mean)
        output = (moved - x) / (s - t)
        if self.scaled:
            assert guidance_weight is not None
            output = output / guidance_weight[:, None]
        return output


@pytest.mark.parametrize("times", [(1, 0), (1, 0.5, 0), (1, 0.9, 0.2, 0.1, 0), time_grid(17)])
def test_exact_flow_is_sampled_exactly(times: tuple[float, ...]) -> None:
    """A perfect flow map transports x1 to m + σ x1 in any number of steps."""
    noise = torch.randn(5, 2, dtype=torch.float64, generator=generator(0, "test"))
    labels = torch.tensor([0, 1, 2, 3, 4])
    for given_labels in (None, labels):
        network = GaussianFlow()
        states = sample_trajectory(FlowMap(network), noise, times, labels=given_labels)
        mean = MEAN if given_labels is None else MEAN + labels[:, None]
        assert states.shape == (len(times), 5, 2)
        assert torch.equal(states[0], noise)
        assert relative_error(states[-1], mean + STD * noise) < 1e-12  # float64 through 17 steps
        assert network.calls == list(itertools.pairwise(times))
        for time, state in zip(times, states, strict=True):
            deviation = ((1 - time) ** 2 * STD**2 + time**2).sqrt()
            expected = (1 - time) * mean + deviation * noise
            assert relative_error(state, expected) < 1e-12


def test_guidance_reaches_the_network() -> None:
    noise = torch.randn(4, 2, dtype=torch.float64, generator=generator(0, "test"))
    flow_map = FlowMap(GaussianFlow(scaled=True), scaled=True)
    states = sample_trajectory(flow_map, noise, (1, 0.5, 0), guidance_weight=2.5)
    assert relative_error(states[-1], MEAN + STD * noise) < 1e-12


def test_sampling_leaves_no_graph_and_keeps_the_noise() -> None:
    noise = torch.randn(4, 2, dtype=torch.float64)
    before = noise.clone().requires_grad_()
    states = sample_trajectory(FlowMap(GaussianFlow()), before, (1, 0))
    assert not states.requires_grad
    assert torch.equal(before, noise)


def test_an_empty_name_is_none() -> None:
    """It is more likely a mistake than a purpose."""
    with pytest.raises(ValueError, match="empty"):
        fold(0, "noise", "")
