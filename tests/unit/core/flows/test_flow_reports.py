"""Reports of agents: checked, and merged so that every flow counts once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intentd.core.errors import InputError
from intentd.core.flows.reports import MAX_MERGED, DomainReport, domain_reports, new_flows
from intentd.core.stats import LogHistogram


def histogram(sizes: list[float]) -> LogHistogram:
    found = LogHistogram()
    for size in sizes:
        found.add(size)
    return found


def report(sizes: list[float], sample: list[tuple[float, float]]) -> DomainReport:
    return DomainReport(histogram(sizes), tuple(sample))


SIZES = st.lists(st.integers(1, 10**9).map(float), max_size=60)


@settings(max_examples=40, deadline=None)
@given(before=SIZES, new=SIZES, lost=SIZES, kept=st.integers(0, 60), seed=st.integers(0, 99))
def test_every_flow_counts_once_in_order(
    before: list[float], new: list[float], lost: list[float], kept: int, seed: int
) -> None:
    """lost: flows of a report that never came. The sample holds only the newest."""
    rows = [(0.01 * index, size) for index, size in enumerate(reversed(new))][:kept]
    flows = new_flows(
        histogram(before), report(before + lost + new, rows), now=100.0, rng=random.Random(seed)
    )
    assert len(flows) == len(lost) + len(new)
    assert [time for time, _ in flows] == sorted(time for time, _ in flows)
    sampled = [size for _, size in reversed(rows)]
    assert [size for _, size in flows][len(flows) - len(sampled) :] == sampled
    found = histogram([size for _, size in flows])
    wanted = histogram(lost + new)
    assert found.quantile(0.5) == pytest.approx(wanted.quantile(0.5), rel=0.1)


def test_equal_times_keep_their_order() -> None:
    flows = new_flows(
        LogHistogram(), report([9, 1, 5], [(0, 5), (0, 1), (0, 9)]), now=1.0, rng=random.Random(1)
    )
    assert [size for _, size in flows] == [9, 1, 5]


def test_first_report_of_an_agent_counts_its_sample_only() -> None:
    flows = new_flows(None, report([1.0] * 500, [(0.5, 1.0)]), now=1.0, rng=random.Random(1))
    assert flows == [(0.5, 1.0)]


def test_counters_that_start_again_count_from_zero() -> None:
    before = histogram([5.0] * 100)
    flows = new_flows(before, report([7.0] * 3, [(0, 7.0)]), now=1.0, rng=random.Random(1))
    assert len(flows) == 3


def test_a_flood_is_thinned_evenly() -> None:
    grown = LogHistogram()
    grown._buckets = {100: 900_000, 300: 100_000}
    grown.count, grown.max = 1_000_000, 2.0**20
    flows = new_flows(LogHistogram(), DomainReport(grown), now=1.0, rng=random.Random(2))
    assert len(flows) == MAX_MERGED
    assert sum(size > 1e4 for _, size in flows) == pytest.approx(MAX_MERGED / 10, rel=0.1)


GOOD: dict[str, Any] = {
    "histogram": histogram([1.0, 2.0]).to_plain(),
    "sample": [[0.1, 2], [0.2, 1]],
    "arrivals": 2,
    "arrived_bytes": 3,
    "finished": 1,
    "fct": {"0": histogram([0.1]).to_plain()},
    "wait": {},
    "queue": [1, 0],
    "active": (1, 0),
    "degraded": {"timeout": 1},
    "handover_s": None,
    "tc": {"state": "shaped", "reason": ""},
    "measured_by_a_newer_agent": 1,
}


def test_a_good_report_is_taken() -> None:
    found = domain_reports({"eth0": GOOD})["eth0"]
    assert found.sample == ((0.1, 2.0), (0.2, 1.0))
    assert found.queue == (1, 0)
    assert found.shaping == "shaped"
    assert found.fct[0].count == 1


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("histogram", None, "flows.eth0.histogram"),
        ("sample", [[1, -5]], "flows.eth0.sample[0][1]"),
        ("sample", [[1]], "flows.eth0.sample[0]"),
        ("sample", "text", "flows.eth0.sample"),
        ("arrivals", -1, "flows.eth0.arrivals"),
        ("arrived_bytes", float("inf"), "flows.eth0.arrived_bytes"),
        ("fct", {"64": {}}, "flows.eth0.fct.64"),
        ("fct", {"-1": {}}, "flows.eth0.fct.-1"),
        ("queue", [0] * 65, "flows.eth0.queue"),
        ("tc", 3, "flows.eth0.tc"),
        ("degraded", {"x": "y"}, "flows.eth0.degraded.x"),
    ],
)
def test_bad_values_are_refused_with_their_path(field: str, value: object, path: str) -> None:
    with pytest.raises(InputError) as caught:
        domain_reports({"eth0": GOOD | {field: value}})
    assert caught.value.field == path


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(field=st.sampled_from(sorted(GOOD)), value=PLAIN)
def test_no_value_of_any_field_is_more_than_an_input_error(field: str, value: object) -> None:
    try:
        found = domain_reports({"eth0": GOOD | {field: value}})
    except InputError:
        return
    new_flows(LogHistogram(), found["eth0"], now=1.0, rng=random.Random(1))
