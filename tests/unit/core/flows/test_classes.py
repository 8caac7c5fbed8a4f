import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.flows.classes import (
    class_c2,
    class_gammas,
    class_thresholds,
    drop_empty_classes,
    fit_classes,
    job_shares,
    policy_from_sample,
    sorted_sample,
)
from intentd.core.flows.policies import POLICIES, make_domain_policy
from intentd.core.flows.sampling import poisson_trace, quantiles, sample_sizes
from intentd.core.flows.workloads import WORKLOADS


def as_printed(sizes: list[int]) -> list[float]:
    """Algorithm 1 line by line, in exact integers; inf only where the listing appends it."""
    sizes = sorted(sizes)
    thresholds: list[float] = []
    start, n = 0, len(sizes)
    while start < n:
        for i in range(start + 1, n + 1):
            segment = sizes[start:i]
            total, squares = sum(segment), sum(x * x for x in segment)
            if total and len(segment) * squares >= 2 * total * total:
                thresholds.append(float(sizes[i - 1]))
                start = i
                break
            if i == n:
                thresholds.append(math.inf)
                return thresholds
    return thresholds


SIZES = st.lists(
    st.one_of(st.integers(0, 30), st.sampled_from([100, 1000, 10_000, 100_000])),
    min_size=1,
    max_size=120,
)


@given(SIZES)
def test_vectorised_is_the_printed_algorithm(sizes: list[int]) -> None:
    printed = as_printed(sizes)
    ours = list(class_thresholds(sorted_sample(sizes)))
    if printed[-1] != math.inf:  # ended exactly where a class closed
        printed[-1] = math.inf
    elif len(printed) > 1 and printed[-2] == max(sizes):  # only the atom of the threshold is left
        printed[-2:] = [math.inf]
    assert ours == printed


@given(SIZES)
def test_classes_partition_the_sample(sizes: list[int]) -> None:
    fit = fit_classes(sizes)
    limits = fit.thresholds_bytes
    assert limits[-1] == math.inf
    assert all(a < b for a, b in pairwise(limits))
    assert math.fsum(fit.weights) == pytest.approx(1.0)
    assert all(weight > 0 for weight in fit.weights)
    low = -1.0
    for limit, weight, c2 in zip(limits, fit.weights, fit.c2, strict=True):
        part = [size for size in sizes if low < size <= limit]
        assert weight == pytest.approx(len(part) / len(sizes))
        mean = sum(part) / len(part)
        assert c2 == pytest.approx(float(np.var(part)) / mean**2 if mean else 0.0)
        low = limit


def test_sample_that_ends_where_a_class_closes() -> None:
    assert as_printed([1, 1, 100]) == [100.0]  # the listing: no infinity
    assert class_thresholds(sorted_sample([1, 1, 100])) == (math.inf,)


def test_atom_of_the_last_threshold_makes_no_empty_class() -> None:
    assert as_printed([1, 1, 100, 100]) == [100.0, math.inf]
    fit = fit_classes([1, 1, 100, 100])
    assert (fit.thresholds_bytes, fit.weights) == ((math.inf,), (1.0,))


def test_equal_sizes_and_zeros_are_one_class() -> None:
    assert class_thresholds(sorted_sample([5] * 1000)) == (math.inf,)
    assert class_thresholds(sorted_sample([0] * 1000)) == (math.inf,)
    assert class_thresholds(sorted_sample([7])) == (math.inf,)
    assert class_c2(sorted_sample([0, 0]), (math.inf,)) == (0.0,)


def test_blocks_do_not_change_the_result() -> None:
    # 30,000 values: the first segment spans several blocks, the next starts inside one.
    sizes = [10] * 20_000 + [300] * 5_000 + [9_000] * 5_000 + [9_001]
    assert list(class_thresholds(sorted_sample(sizes))) == as_printed_fast(sizes)


def as_printed_fast(sizes: list[int]) -> list[float]:
    thresholds: list[float] = []
    count = total = squares = 0
    for size in sorted(sizes):
        count, total, squares = count + 1, total + size, squares + size * size
        if count * squares >= 2 * total * total:
            thresholds.append(float(size))
            count = total = squares = 0
    return [*thresholds, math.inf] if count else [*thresholds[:-1], math.inf]


def test_extreme_spread_stays_within_the_class_limit() -> None:
    sizes = [2.0**exponent for exponent in range(63) for _ in range(9)]
    fit = fit_classes(sizes)
    assert len(fit.thresholds_bytes) < 64
    make_domain_policy(
        "2d", domain="d", rate_bps=1e9, thresholds_bytes=fit.thresholds_bytes, weights=fit.weights
    )


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("data-mining", (5698, 64296, 1887902, 20692074, 511176249)),
        ("web-search", (275569, 19768499)),
        ("cache", (5890280,)),
        ("hadoop", (6768, 66937, 11753234)),
        ("uniform", ()),
    ],
)
def test_a_million_sizes_give_the_limits(name: str, limits: tuple[float, ...]) -> None:
    sizes = sample_sizes(WORKLOADS[name].cdf, 1_000_000, np.random.default_rng(11))
    fit = fit_classes(sizes)
    assert fit.thresholds_bytes[:-1] == pytest.approx(limits, rel=0.1)
    assert fit.thresholds_bytes[-1] == math.inf


@pytest.mark.parametrize(
    ("name", "count"),
    [("data-mining", 6), ("web-search", 3), ("cache", 2), ("hadoop", 4), ("uniform", 1)],
)
def test_ten_thousand_sizes_give_the_class_count(name: str, count: int) -> None:
    cdf = WORKLOADS[name].cdf
    right = sum(
        len(class_thresholds(sorted_sample(sample_sizes(cdf, 10_000, np.random.default_rng(seed)))))
        == count
        for seed in range(500)
    )
    assert right >= 495


@pytest.mark.parametrize("sizes", [[], [-1.0], [math.nan, 1.0], [math.inf]])
def test_bad_samples_are_refused(sizes: list[float]) -> None:
    with pytest.raises(InputError, match="sizes_bytes"):
        fit_classes(sizes)


@pytest.mark.parametrize("limits", [(), (5.0,), (5.0, 5.0, math.inf), (9.0, 5.0, math.inf)])
def test_bad_thresholds_are_refused(limits: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="thresholds_bytes"):
        fit_classes([1.0], limits)


def test_published_preset_on_a_sample_without_large_flows_drops_empty_classes() -> None:
    preset = WORKLOADS["data-mining"].published_thresholds_bytes
    fit = fit_classes([100.0, 200.0, 6000.0], preset)
    assert fit.weights == pytest.approx((2 / 3, 1 / 3, 0, 0, 0, 0))
    kept = drop_empty_classes(fit)
    assert kept.thresholds_bytes == (3400.0, math.inf)
    assert kept.weights == pytest.approx((2 / 3, 1 / 3))
    assert job_shares(sorted_sample([1, 2, 3]), (2.0, math.inf)) == pytest.approx((2 / 3, 1 / 3))


def test_gammas_of_a_sample_agree_with_those_of_its_cdf() -> None:
    item = WORKLOADS["web-search"]
    limits = item.published_thresholds_bytes
    sample = sorted_sample(sample_sizes(item.cdf, 400_000, np.random.default_rng(5)))
    ours = class_gammas(sample, limits, load=0.8, rate_bps=1e9)
    policy = make_domain_policy(
        "2d-boost",
        domain="d",
        rate_bps=1e9,
        sizes=item.cdf,
        load=0.8,
        thresholds_bytes=limits,
    )
    assert ours == pytest.approx([cls.boost_gamma_per_s for cls in policy.classes], rel=0.02)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_from_a_sample(name: str) -> None:
    sample = sample_sizes(WORKLOADS["cache"].cdf, 5_000, np.random.default_rng(1))
    policy = policy_from_sample(name, sample, domain="d", rate_bps=1e9, load=0.8)
    assert policy.name == name


def test_sampling_is_the_quantile_function() -> None:
    for item in WORKLOADS.values():
        u = np.linspace(0, 1, 777)
        expected = [item.cdf.quantile(float(x)) for x in u]
        assert quantiles(item.cdf, u) == pytest.approx(expected, rel=1e-12)


def test_poisson_trace_offers_the_load_and_repeats_from_its_seed() -> None:
    cdf = WORKLOADS["uniform"].cdf
    trace = poisson_trace(cdf, load=0.7, rate_bps=1e9, flows=50_000, seed=4)
    offered = trace.sizes_bytes.sum() * 8 / 1e9 / trace.arrivals_s[-1]
    assert offered == pytest.approx(0.7, rel=0.02)
    again = poisson_trace(cdf, load=0.7, rate_bps=1e9, flows=50_000, seed=4)
    assert (again.arrivals_s == trace.arrivals_s).all()


@pytest.mark.parametrize(
    ("load", "rate", "flows"), [(0.0, 1e9, 5), (math.nan, 1e9, 5), (0.5, 0.0, 5), (0.5, 1e9, 0)]
)
def test_bad_traces_are_refused(load: float, rate: float, flows: int) -> None:
    with pytest.raises(InputError):
        poisson_trace(WORKLOADS["cache"].cdf, load=load, rate_bps=rate, flows=flows, seed=1)
