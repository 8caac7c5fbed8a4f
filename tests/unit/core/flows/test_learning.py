"""The learner fed streams: change detection, windows, hysteresis."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intentd.core.flows.change import BIN_COUNT, chi_square_bound, find_change, size_bins
from intentd.core.flows.learning import BOOTSTRAP, Estimate, Learner, LearnSettings
from intentd.core.flows.sampling import sample_sizes
from intentd.core.flows.workloads import workload

TRUE_CLASSES = {"data-mining": 6, "web-search": 3, "cache": 2, "hadoop": 4, "uniform": 1}
PAIRS = list(itertools.permutations(TRUE_CLASSES, 2))


def draw(name: str, count: int, seed: int) -> np.ndarray:
    return sample_sizes(workload(name).cdf, count, np.random.default_rng(seed))


def feed(learner: Learner, sizes: np.ndarray, start_s: float = 0.0) -> list[str]:
    """In batches of 100, deciding after each; returns the reasons of the decisions."""
    reasons = []
    for first in range(0, len(sizes), 100):
        learner.observe(sizes[first : first + 100], now=start_s + first / 1000)
        decision = learner.decide()
        if decision is not None:
            reasons.append(decision.reason)
    return reasons


@pytest.mark.parametrize(
    ("freedom", "tail", "value"),
    [(5, 0.01, 15.086), (10, 0.001, 29.588), (15, 1e-4, 44.263), (20, 0.05, 31.410)],
)
def test_chi_square_bound_is_near_the_tables(freedom: int, tail: float, value: float) -> None:
    assert chi_square_bound(freedom, tail) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_change_is_seen_within_500_flows_and_cut_where_it_happened(
    before: str, after: str
) -> None:
    learner = Learner()
    learner.observe(draw(before, 1500, 1), now=0.0)
    assert learner.changes == 0
    sizes = draw(after, 500, 2)
    for seen in range(0, 500, 20):
        change = learner.observe(sizes[seen : seen + 20], now=1.0)
        if change is not None:
            assert change.flows <= seen + 20 + 4, "flows of the old workload were kept"
            assert change.flows >= seen + 20 - 60, "flows of the new workload were lost"
            return
    pytest.fail("not detected")


@pytest.mark.parametrize("name", TRUE_CLASSES)
def test_no_alarm_and_few_policies_without_a_change(name: str) -> None:
    learner = Learner()
    reasons = feed(learner, draw(name, 15_000, 3))
    assert learner.changes == 0
    assert reasons[0] == "bootstrap"
    assert len(reasons) <= 12
    assert learner.in_force.classes == TRUE_CLASSES[name]


def test_a_rare_new_tail_is_a_change() -> None:
    base = draw("cache", 5000, 4)
    with_tail = draw("cache", 2000, 5)
    with_tail[::30] = 3e9
    learner = Learner()
    learner.observe(base, now=0.0)
    learner.observe(with_tail, now=1.0)
    assert learner.changes == 1


def test_one_class_until_enough_flows_and_the_old_ones_until_enough_of_a_new_workload() -> None:
    learner = Learner()
    assert feed(learner, draw("web-search", 100, 6)) == []
    assert learner.in_force == BOOTSTRAP
    assert feed(learner, draw("web-search", 4000, 7))[0] == "bootstrap"
    old = learner.in_force
    assert feed(learner, draw("uniform", 200, 8)) == []
    assert learner.stale
    assert learner.in_force == old
    assert feed(learner, draw("uniform", 300, 9)) == ["change"]
    assert learner.in_force.classes == 1


def test_a_difference_on_a_settled_sample_must_last() -> None:
    learner = Learner(LearnSettings(window_flows=2000, persist_flows=300, least_divergence=9.0))
    feed(learner, draw("web-search", 4000, 10))
    sizes = draw("uniform", 2000, 11)
    issued = [bool(feed(learner, sizes[i : i + 100])) for i in range(0, 1000, 100)]
    first = issued.index(True)
    assert learner.changes == 0
    assert first >= 3


def test_restored_estimate_stands_until_as_much_was_seen() -> None:
    learner = Learner()
    learner.restore(Estimate((1e5, 1e7, math.inf), (0.5, 0.3, 0.2), 2000))
    assert feed(learner, draw("web-search", 1900, 12)) == []
    assert learner.in_force.flows == 2000
    assert feed(learner, draw("web-search", 300, 13)) == ["growth"]


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 50), st.integers(0, 9)), max_size=6
    ),
    window=st.integers(10, 200),
    keep=st.integers(0, 40),
)
def test_window_is_the_newest_flows_whatever_the_batches(
    batches: list[tuple[int, int, int]], window: int, keep: int
) -> None:
    """Against a list of (time, size) that forgets in the plainest way."""
    learner = Learner(
        LearnSettings(window_flows=window, keep_flows=keep, max_age_s=60.0, least_divergence=99.0)
    )
    model: list[tuple[float, float]] = []
    now = 0.0
    for count, step, seed in batches:
        now += step
        sizes = np.random.default_rng(seed).integers(1, 10**9, count).astype(float)
        learner.observe(sizes, now=now)
        model += [(now, size) for size in sizes.tolist()]
        model = model[-window:]
        while len(model) > keep and now - model[0][0] > 60.0:
            model.pop(0)
        assert learner.sample().tolist() == [size for _, size in model]
        counts = np.bincount(size_bins(learner.sample()), minlength=BIN_COUNT)
        assert learner._total.tolist() == counts.tolist()
        if model:
            shares = learner.rates((1e3, 1e6, math.inf))
            assert math.fsum(shares) == pytest.approx(1.0)
            assert min(shares) > 0
            assert math.fsum(learner.byte_shares((1e3, 1e6, math.inf))) == pytest.approx(1.0)


def test_find_change_needs_twice_the_smallest_window() -> None:
    bins = size_bins(np.concatenate([np.full(40, 10.0), np.full(80, 1e6)]))
    total = np.bincount(bins, minlength=BIN_COUNT).astype(float)
    assert find_change(total, bins, false_alarm=1e-7, least_divergence=0.03) is None
