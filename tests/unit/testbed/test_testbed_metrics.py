"""Figures from records: percentiles, intervals, the share of the link in use while flows wait."""

from __future__ import annotations

import math

import pytest

from intentd.testbed.metrics import (
    busy_while_waiting,
    completion_metrics,
    floor_s,
    handover_s,
    mean_interval,
    ratios,
    waiting_spans,
)
from intentd.testbed.traffic.records import FlowRecord

ROOT = 0xFFFFFFFF


def record(arrival: float, granted: float, finished: float, size: int = 1000) -> FlowRecord:
    return FlowRecord(0, 0, 0, size, 0, arrival, arrival, granted, granted, finished)


def test_completion_metrics() -> None:
    found = completion_metrics(float(value) for value in range(1, 1002))
    assert found["mean"] == pytest.approx(501)
    assert found["p50"] == pytest.approx(501)
    assert found["p995"] == pytest.approx(996)
    assert completion_metrics([]) == {}


def test_ratios_leave_out_what_only_one_side_has() -> None:
    assert ratios({"mean": 4.0, "p50": 1.0}, {"mean": 2.0}) == {"mean": 2.0}


def test_interval_is_students() -> None:
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_interval([1.0])[1])


def test_waiting_spans_merge() -> None:
    spans = waiting_spans([record(0, 1, 2), record(0.5, 3, 4), record(5, 5, 6), record(7, 8, 9)])
    assert spans == [(0, 3), (7, 8)]


def test_busy_share_counts_only_intervals_in_which_someone_waits() -> None:
    rate_bps = 8000.0  # 1000 bytes a second
    sent = [0, 900, 1900, 1900, 2900]
    samples = [
        (10.0 + t, [(0x10001, ROOT, total, 0), (0x1000A, 0x10001, total, 0)])
        for t, total in enumerate(sent)
    ]
    found = busy_while_waiting(samples, 10.0, [record(0.0, 2.5, 3.0)], rate_bps)
    assert found["observed_s"] == pytest.approx(2.0)
    assert found["busy_share"] == pytest.approx(0.95)
    nobody = busy_while_waiting(samples, 10.0, [record(0.0, 0.0, 3.0)], rate_bps)
    assert math.isnan(nobody["busy_share"])


def test_floor_takes_small_flows_that_meet_nobody() -> None:
    lonely = [record(0, 0, 0.25), record(1, 1, 1.75)]
    crowded = [record(2, 2, 3, size=10**6), record(2.5, 2.5, 2.6)]
    assert floor_s(lonely + crowded) == pytest.approx(0.5)
    assert math.isnan(floor_s(crowded))


def test_handover_is_the_gap_of_a_class_that_had_work() -> None:
    waited = record(0.0, 2.25, 3.0)  # behind the first
    idle = record(5.0, 5.0, 6.0)  # nothing waited
    announced = record(5.5, 5.9, 7.0)  # began before the one before ended
    found = handover_s([record(0.0, 0.0, 2.0), waited, idle, announced])
    assert found == [pytest.approx(0.25), pytest.approx(-0.1)]
