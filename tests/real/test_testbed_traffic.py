"""The generator as real processes on the loopback: every flow is asked for, gated and recorded."""

from __future__ import annotations

import itertools
import math
import select
import time
from pathlib import Path

import pytest

from intentd.core.flows.policy import ClassPolicy, DomainPolicy, domain_to_plain
from intentd.testbed.playing import Host, PlayPlan, play
from intentd.testbed.traffic.timerfd import TimerFd
from intentd.testbed.traffic.trace import TraceFlow

pytestmark = pytest.mark.real

POLICY = DomainPolicy(
    "loop", 1e9, (ClassPolicy(10_000, 0.5, dscp=3), ClassPolicy(math.inf, 0.5, dscp=7))
)
GATE = {"kind": "local", "policy": domain_to_plain(POLICY), "priorities": []}


def trace(hosts: int = 1) -> list[TraceFlow]:
    return [
        TraceFlow(0.002 * index, 5_000 if index % 3 else 300_000, index % hosts)
        for index in range(120)
    ]


@pytest.mark.parametrize("ipv6", [False, True])
async def test_open_loop_completes_in_class_order(tmp_path: Path, ipv6: bool) -> None:
    said: list[str] = []
    host = Host("here")
    played = await play(
        PlayPlan(trace(), [host], [host], [GATE], mark="dscp", ipv6=ipv6), tmp_path, said.append
    )
    assert played.stalled == []
    assert sorted(record.index for record in played.records) == list(range(120))
    assert {record.class_index for record in played.records} == {0, 1}
    for record in played.records:
        assert record.due_s <= record.arrival_s <= record.granted_s < record.finished_s
    for index in (0, 1):
        grants = sorted(
            (r for r in played.records if r.class_index == index), key=lambda r: r.index
        )
        assert [r.granted_s for r in grants] == sorted(r.granted_s for r in grants)
        for before, after in itertools.pairwise(grants):
            assert after.granted_s >= before.finished_s - 1e-3  # one at a time
    assert said[-1] == "120/120 flows"


async def test_closed_loop_with_two_hosts(tmp_path: Path) -> None:
    host = Host("here")
    plan = PlayPlan(
        trace(2), [host, host], [host], [GATE, GATE], mark="dscp", mode="closed", concurrency=3
    )
    played = await play(plan, tmp_path, lambda _: None)
    assert len(played.records) == 120
    assert [summary["finished"] for summary in played.summaries] == [60, 60]


def test_timer_keeps_time_below_a_millisecond_and_takes_the_past() -> None:
    timer = TimerFd()
    try:
        timer.arm(time.monotonic() - 1.0)
        _wait(timer.fd)
        timer.clear()
        due = time.monotonic() + 0.0031
        timer.arm(due)
        _wait(timer.fd)
        assert time.monotonic() >= due
    finally:
        timer.close()


def _wait(fd: int) -> None:
    assert select.select([fd], [], [], 10)[0] == [fd]
