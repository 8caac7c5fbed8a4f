import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.flows.boost import (
    boost_s,
    gamma_of_cdf,
    gamma_of_sample,
    queue_key,
    solve_gamma,
)
from intentd.core.flows.policy import ClassPolicy
from intentd.core.flows.workloads import WORKLOADS, SizeCdf


def test_boost_agrees_with_its_formula() -> None:
    assert boost_s(1.0, 1.0) == pytest.approx(-math.log(1 - math.exp(-1.0)))
    assert boost_s(0.5, 3.0) == pytest.approx(-math.log(1 - math.exp(-1.5)) / 3)


@given(st.floats(0, 1e9), st.floats(1e-12, 1e12))
def test_boost_is_finite_and_never_negative(size_s: float, gamma: float) -> None:
    assert 0.0 <= boost_s(size_s, gamma) < math.inf


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-3, 1e3))
def test_shorter_flows_are_boosted_at_least_as_much(a: float, b: float, gamma: float) -> None:
    short, long = sorted((a, b))
    assert boost_s(short, gamma) >= boost_s(long, gamma)


def test_digits_survive_at_both_ends() -> None:
    assert boost_s(1e-8, 1e-8) == pytest.approx(-math.log(1e-16) * 1e8)
    assert boost_s(50.0, 1.0) == pytest.approx(math.exp(-50.0), rel=1e-9)


def test_exponential_sizes_have_a_closed_form() -> None:
    mu, rate, capacity = 4.0, 1.5, 0.6

    def excess(gamma: float) -> float:
        return gamma / (mu - gamma) if gamma < mu else math.inf

    gamma = solve_gamma(
        excess, rate_per_s=rate, mean_s=1 / mu, largest_s=600 / mu, capacity=capacity
    )
    assert gamma == pytest.approx(mu - rate / capacity)


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_gamma_solves_its_equation(sizes: list[float], load: float) -> None:
    mean = math.fsum(sizes) / len(sizes)
    rate = load / mean
    gamma = gamma_of_sample(sizes, rate_per_s=rate, capacity=1.0)
    assert gamma is not None
    left = rate * math.fsum(math.expm1(gamma * size) for size in sizes) / len(sizes)
    assert left == pytest.approx(gamma, rel=1e-6)


def test_no_root_where_the_class_does_not_fit_or_is_empty() -> None:
    assert gamma_of_sample([1.0], rate_per_s=1.0, capacity=1.0) is None
    assert gamma_of_sample([1.0], rate_per_s=2.0, capacity=1.0) is None
    assert gamma_of_sample([1.0], rate_per_s=0.0, capacity=1.0) is None
    assert gamma_of_sample([], rate_per_s=1.0, capacity=1.0) is None
    assert gamma_of_sample([0.0], rate_per_s=1.0, capacity=1.0) is None


def test_nearly_full_class_has_a_tiny_gamma_not_a_wrong_one() -> None:
    # For x = g S small, rate (g m + g^2 m2 / 2) = g gives g = 2 (1/rate - m) / m2.
    gamma = gamma_of_sample([1.0], rate_per_s=1.0 - 1e-6, capacity=1.0)
    assert gamma == pytest.approx(2e-6, rel=1e-3)


@pytest.mark.parametrize("name", ["data-mining", "web-search", "cache", "uniform"])
def test_cdf_and_its_quantiles_agree(name: str) -> None:
    cdf: SizeCdf = WORKLOADS[name].cdf
    mean_s = cdf.mean_bytes * 8 / 1e9
    exact = gamma_of_cdf(
        cdf, above_bytes=-1, up_to_bytes=math.inf, rate_bps=1e9, rate_per_s=0.7 / mean_s, capacity=1
    )
    count = 40_000
    grid = [cdf.quantile((i + 0.5) / count) * 8e-9 for i in range(count)]
    sampled = gamma_of_sample(grid, rate_per_s=0.7 / mean_s, capacity=1.0)
    assert sampled == pytest.approx(exact, rel=1e-3)


def test_class_of_a_cdf_without_flows_has_none() -> None:
    cdf = WORKLOADS["uniform"].cdf
    gamma = gamma_of_cdf(
        cdf, above_bytes=-1, up_to_bytes=1e6, rate_bps=1e9, rate_per_s=1.0, capacity=1.0
    )
    assert gamma is None


def test_the_key_of_each_order() -> None:
    def key(order: str, gamma: float = 0.0) -> float:
        cls = ClassPolicy(math.inf, 1.0, order=order, boost_gamma_per_s=gamma)
        return queue_key(cls, rate_bps=8e6, arrived=10.0, size_bytes=500_000)

    assert key("fifo") == 10.0
    assert key("sjf") == 500_000.0
    assert key("boost", 3.0) == 10.0 - boost_s(0.5, 3.0)
