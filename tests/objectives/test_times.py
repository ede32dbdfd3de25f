"""Time distributions against their CDFs (Kolmogorov–Smirnov), and what must hold for every configuration.

Every random test has fixed seeds. A right sampler fails a test at level 1e-4 once in 10,000 seeds, while
at 20,000 samples a CDF that is off by 0.02 anywhere has p of about 1e-6 (2 exp(−2 · 20000 · 0.02²) = 2e-7).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import expit, log_ndtr, logit, ndtr

from tvmatch.errors import InputError
from tvmatch.objectives.times import Times, TimesConfig, sample_times
from tvmatch.seeds import RowDraws

COUNT = 20_000
LEVEL = 1e-4
# Other values than the defaults, so that no default can stand in for a parameter.
OTHER: dict[str, Any] = {"gap": (0.3, 0.7), "t": (-0.2, 1.4), "s": (0.5, 0.6)}
DISTRIBUTIONS = ("gap*", "gap", "truncated", "clamped")
PARAMETERS = (pytest.param({}, id="default"), pytest.param(OTHER, id="other"))

Pair = tuple[float, float]
Array = np.ndarray[Any, Any]


def draw(config: TimesConfig, seed: int = 0, count: int = COUNT) -> tuple[Array, Array, Array]:
    """t, s, s' as float64 arrays."""
    t, s, s_prime = (
        times.double().numpy() for times in sample_times(config, RowDraws(seed, "times"), range(count))
    )
    return t, s, s_prime


def logit_normal(pair: Pair) -> Callable[[Array], Array]:
    """CDF at x in (0, 1): Φ((logit x − mean) / std)."""
    return lambda x: ndtr((logit(np.clip(x, 0, 1)) - pair[0]) / pair[1])


def mixture_over(pair: Pair, conditional: Callable[[Array, Array], Array]) -> Callable[[Array], Array]:
    """x ↦ E[conditional(x, R)] with R logit-normal(pair), by Simpson's rule over 8 standard deviations.

    At 4001 nodes and 2001 values of x, interpolated linearly, the error is below 1e-4: far less than the
    0.01 that the test can resolve.
    """
    z = np.linspace(-8, 8, 4001)
    weights, outer = stats.norm.pdf(z), expit(pair[0] + pair[1] * z)
    nodes = np.linspace(0, 1, 2001)
    values = np.array([integrate.simpson(weights * conditional(x, outer), x=z) for x in nodes])
    return lambda x: np.interp(x, nodes, values)


def s_distribution(config: TimesConfig) -> Callable[[Array], Array]:
    """CDF of s before t = s is decided; it does not depend on that."""
    base = logit_normal(config.s)
    if config.distribution == "clamped":
        other = logit_normal(config.t)
        return lambda x: 1 - (1 - base(x)) * (1 - other(x))
    if config.distribution == "truncated":
        return mixture_over(config.t, lambda x, t: np.minimum(base(x) / base(t), 1))
    return mixture_over(config.gap, lambda x, g: np.minimum(base(x) / base(1 - g), 1))


def t_distribution(config: TimesConfig) -> Callable[[Array], Array]:
    """CDF of t = s + g for the gap distributions, else a logit-normal."""
    if config.distribution in ("truncated", "clamped"):
        return logit_normal(config.t)
    base = logit_normal(config.s)
    return mixture_over(config.gap, lambda x, g: np.where(g < x, base(x - g) / base(1 - g), 0))


def agrees(samples: Array, distribution: Callable[[Array], Array] | str) -> None:
    assert stats.kstest(samples, distribution).pvalue > LEVEL


def independent(a: Array, b: Array) -> None:
    """No rank correlation, neither of the values nor of their distances from the median."""
    assert stats.spearmanr(a, b).pvalue > LEVEL
    assert stats.spearmanr(np.abs(a - np.median(a)), np.abs(b - np.median(b))).pvalue > LEVEL


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_marginal_distributions_of_t_and_s(distribution: Any, parameters: dict[str, Any]) -> None:
    config = TimesConfig(distribution=distribution, **parameters)
    t, s, _ = draw(config)
    agrees(s, s_distribution(config))
    agrees(t, t_distribution(config))


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("distribution", ["gap", "gap*"])
def test_gap_is_logit_normal_and_s_truncated_by_it(distribution: Any, parameters: dict[str, Any]) -> None:
    config = TimesConfig(distribution=distribution, **parameters)
    t, s, _ = draw(config)
    gap = t - s
    agrees(gap, logit_normal(config.gap))
    # Probability integral transform: given g, F(s) / F(1 − g) is uniform, so it is independent of g.
    uniform = logit_normal(config.s)(s) / logit_normal(config.s)(1 - gap)
    agrees(uniform, "uniform")
    independent(uniform, gap)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_truncated_given_t(parameters: dict[str, Any]) -> None:
    config = TimesConfig(distribution="truncated", **parameters)
    t, s, _ = draw(config)
    uniform = logit_normal(config.s)(s) / logit_normal(config.s)(t)
    agrees(uniform, "uniform")
    independent(uniform, t)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_clamped_given_t(parameters: dict[str, Any]) -> None:
    config = TimesConfig(distribution="clamped", **parameters)
    t, s, _ = draw(config)
    clamped = s == t
    # P(s = t) is the probability that one normal exceeds another.
    probability = ndtr((config.s[0] - config.t[0]) / math.hypot(config.s[1], config.t[1]))
    assert stats.binomtest(int(clamped.sum()), COUNT, probability).pvalue > LEVEL
    below = ~clamped
    uniform = logit_normal(config.s)(s[below]) / logit_normal(config.s)(t[below])
    agrees(uniform, "uniform")
    independent(uniform, t[below])


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_independent_s_prime(distribution: Any, parameters: dict[str, Any]) -> None:
    """Untruncated for gap*, the distribution's own s otherwise; independent of (t, s) always."""
    config = TimesConfig(distribution=distribution, **parameters)
    t, s, s_prime = draw(config)
    agrees(s_prime, logit_normal(config.s) if distribution == "gap*" else s_distribution(config))
    independent(s_prime, s)
    independent(s_prime, t)


def test_the_test_tells_a_truncated_s_from_an_untruncated_one() -> None:
    """The tests above have the power they claim: swapping the two distributions of s is seen."""
    config = TimesConfig()
    _, s, s_prime = draw(config)
    assert stats.kstest(s, logit_normal(config.s)).pvalue < 1e-9
    assert stats.kstest(s_prime, s_distribution(config)).pvalue < 1e-9


@pytest.mark.parametrize("distribution", ["gap", "truncated", "clamped"])
def test_tied_s_prime_is_s(distribution: Any) -> None:
    times = sample_times(TimesConfig(distribution=distribution, s_prime="tied"), RowDraws(1), range(COUNT))
    assert torch.equal(times.s_prime, times.s)


@pytest.mark.parametrize(
    ("distribution", "s_prime"),
    [
        *((distribution, "independent") for distribution in DISTRIBUTIONS),
        *((distribution, "tied") for distribution in DISTRIBUTIONS if distribution != "gap*"),
    ],
)
def test_equal_probability_moves_t_alone(distribution: Any, s_prime: Any) -> None:
    without = sample_times(TimesConfig(distribution, s_prime=s_prime), RowDraws(2), range(COUNT))
    some = sample_times(
        TimesConfig(distribution, s_prime=s_prime, equal_probability=0.3), RowDraws(2), range(COUNT)
    )
    always = sample_times(
        TimesConfig(distribution, s_prime=s_prime, equal_probability=1.0), RowDraws(2), range(COUNT)
    )
    for times in (some, always):
        assert torch.equal(times.s, without.s)
        assert torch.equal(times.s_prime, without.s_prime)
    assert torch.equal(always.t, always.s)
    moved = some.t != without.t
    assert torch.equal(some.t[moved], some.s[moved])
    movable = without.t > without.s
    share = stats.binomtest(int(moved.sum()), int(movable.sum()), 0.3)
    assert share.pvalue > LEVEL
    assert stats.spearmanr(moved[movable].numpy(), without.s[movable].numpy()).pvalue > LEVEL


def test_far_in_the_tail_the_truncation_is_still_exact() -> None:
    """Where Φ(b) underflows (b ≈ −60), log U = log Φ(z) − log Φ(b) is uniform as everywhere else."""
    config = TimesConfig("truncated", t=(-10.0, 0.5), s=(50.0, 1.0))
    assert ndtr((config.t[0] - config.s[0]) / config.s[1]) == 0
    t, s, _ = draw(config)
    bound, z = logit(t) - config.s[0], logit(s) - config.s[0]
    # float32 times blur b by 6e-8 · |b| · |b| = 2e-4 of a unit of log U: much less than the test resolves.
    agrees(np.exp(log_ndtr(z) - log_ndtr(bound)), "uniform")


pairs = st.tuples(
    st.floats(-1e4, 1e4) | st.floats(-3, 3), st.floats(1e-300, 1e300) | st.floats(1e-3, 10) | st.just(5e-324)
)


@settings(max_examples=300, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    gap=pairs,
    t=pairs,
    s=pairs,
    equal_probability=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_order_and_range_hold_for_every_configuration(
    distribution: Any, gap: Pair, t: Pair, s: Pair, equal_probability: float, seed: int
) -> None:
    config = TimesConfig(distribution, gap, t, s, equal_probability=equal_probability)
    check_order(sample_times(config, RowDraws(seed), range(256)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [-60.0, -16.0, 0.0, 16.0, 60.0])
def test_order_and_range_hold_where_float32_rounds(distribution: Any, mean: float) -> None:
    """s, t or both within rounding of 0 or 1, for many samples."""
    for other in (-16.0, 0.0, 16.0):
        config = TimesConfig(distribution, gap=(mean, 1.0), t=(mean, 3.0), s=(other, 3.0))
        check_order(sample_times(config, RowDraws(3), range(COUNT)))


def check_order(times: Times) -> None:
    for value in times:
        assert value.dtype == torch.float32
        assert bool(((value >= 0) & (value <= 1)).all())  # False for NaN
    assert bool((times.s <= times.t).all())


def test_draws_belong_to_the_seed() -> None:
    config = TimesConfig()
    first, again, other = (sample_times(config, RowDraws(seed), range(100)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(value.shape == (100,) for value in first)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    first=st.sampled_from([0, 3, 250, 2**40]),
    cuts=st.sets(st.integers(1, 599), max_size=8),
    threads=st.sampled_from([1, 3]),
)
def test_times_belong_to_their_row(distribution: Any, first: int, cuts: set[int], threads: int) -> None:
    """Bit for bit, though logarithms and logistic functions round by a number's place in a tensor."""
    config = TimesConfig(distribution, equal_probability=0.3, **OTHER)
    draws = RowDraws(0, "step", 4)
    whole = sample_times(config, draws, range(first, first + 600))
    edges = [0, *sorted(cuts), 600]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [
            sample_times(config, draws, range(first + start, first + stop))
            for start, stop in itertools.pairwise(edges)
        ]
    finally:
        torch.set_num_threads(before)
    for of_parts, of_whole in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(of_parts), of_whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"distribution": "gaps"}, "times.distribution: .*'gaps'"),
        ({"s_prime": "same"}, "times.s_prime: .*'same'"),
        ({"gap": (-0.8, 0.0)}, r"times.gap: .*\(-0.8, 0.0\)"),
        ({"t": (1.0, -1.0)}, r"times.t: .*\(1.0, -1.0\)"),
        ({"s": (math.nan, 1.0)}, r"times.s: .*\(nan, 1.0\)"),
        ({"s": (0.0, math.inf)}, r"times.s: .*\(0.0, inf\)"),
        ({"equal_probability": 1.5}, "times.equal_probability: .*1.5"),
        ({"equal_probability": math.nan}, "times.equal_probability: .*nan"),
        ({"distribution": "gap*", "s_prime": "tied"}, r"times.s_prime: .*gap\*"),
    ],
)
def test_wrong_configurations(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TimesConfig(**options)
