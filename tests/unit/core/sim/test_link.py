"""The fluid link and the flow simulator against a reference that recomputes every rate."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intentd.core.errors import InputError, StateError
from intentd.core.flows.gate import FlowGate
from intentd.core.flows.policies import POLICIES, make_domain_policy
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.sampling import FlowTrace
from intentd.core.sim.flows import simulate, simulate_domains, simulate_srpt
from intentd.core.sim.link import FluidLink, SrptLink

INF = math.inf
RATE_BPS = 8e3  # 1,000 bytes a second


def naive_rates(policy: DomainPolicy, sending: dict[int, int]) -> dict[int, float]:
    """Bytes a second of each sending flow: weights among busy classes, equal inside."""
    if not sending:
        return {}
    best = min(policy.classes[k].priority for k in sending.values())
    busy = {k for k in sending.values() if policy.classes[k].priority == best}
    total = sum(policy.classes[k].weight for k in busy)
    members = {k: sum(1 for c in sending.values() if c == k) for k in busy}
    return {
        flow: policy.rate_bps / 8 * policy.classes[k].weight / total / members[k]
        for flow, k in sending.items()
        if k in busy
    }


def naive(arrivals: list[float], sizes: list[int], policy: DomainPolicy) -> list[float]:
    """Completion times, every remaining byte decremented at every event."""
    gate = FlowGate(policy)
    left: dict[int, float] = {}
    sending: dict[int, int] = {}
    ends = [0.0] * len(arrivals)
    now, upcoming, done = 0.0, 0, 0
    while done < len(arrivals):
        rates = naive_rates(policy, sending)
        finishes = {flow: now + left[flow] / rate for flow, rate in rates.items()}
        first = min(finishes, key=finishes.__getitem__, default=None)
        finish = finishes[first] if first is not None else INF
        arrival = arrivals[upcoming] if upcoming < len(arrivals) else INF
        then = min(finish, arrival)
        for flow, rate in rates.items():
            left[flow] -= rate * (then - now)
        now = then
        if finish <= arrival:
            assert first is not None
            ends[first] = now
            del sending[first]
            done += 1
            released = gate.finish(first, now=now)
        else:
            left[upcoming] = float(sizes[upcoming])
            released = gate.arrive(upcoming, sizes[upcoming], now=now)
            upcoming += 1
        for release in released:
            sending[release.flow] = release.class_index
    return [end - arrival for end, arrival in zip(ends, arrivals, strict=True)]


def random_trace(seed: int, count: int) -> tuple[list[float], list[int]]:
    rng = random.Random(seed)
    sizes = [int(10 ** rng.uniform(0, 4)) for _ in range(count)]
    mean = sum(sizes) / count
    now, arrivals = 0.0, []
    for _ in range(count):
        now += rng.expovariate(1000 * 0.8 / mean)
        arrivals.append(now)
    return arrivals, sizes


def as_trace(arrivals: list[float], sizes: list[int]) -> FlowTrace:
    return FlowTrace(np.array(arrivals), np.array(sizes, dtype=float))


def policy_for(name: str, sizes: list[int]) -> DomainPolicy:
    return make_domain_policy(
        name,
        domain="d",
        rate_bps=RATE_BPS,
        sizes=sizes,
        load=0.8,
        thresholds_bytes=[50, 1000, INF],
        max_wait_s=1e9,
    )


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_policy_agrees_with_the_naive_reference(name: str, seed: int) -> None:
    arrivals, sizes = random_trace(seed, 120)
    policy = policy_for(name, sizes)
    ours = simulate(as_trace(arrivals, sizes), policy).fct_s
    assert ours == pytest.approx(naive(arrivals, sizes, policy), rel=1e-6, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    priorities=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    levels=st.lists(st.integers(0, 3), min_size=3, max_size=3),
)
def test_weights_priorities_and_levels_together(
    seed: int, priorities: list[int], levels: list[int]
) -> None:
    arrivals, sizes = random_trace(seed, 80)
    classes = tuple(
        ClassPolicy(limit, weight, mpl=mpl, priority=priority)
        for limit, weight, mpl, priority in zip(
            (50, 1000, INF), (0.7, 0.2, 0.1), levels, priorities, strict=True
        )
    )
    policy = DomainPolicy("d", RATE_BPS, classes, max_wait_s=1e9)
    ours = simulate(as_trace(arrivals, sizes), policy).fct_s
    assert ours == pytest.approx(naive(arrivals, sizes, policy), rel=1e-6, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_policy_loses_or_makes_work(seed: int) -> None:
    """All are work-conserving: flows of one busy period are done when FIFO's period is."""
    arrivals, sizes = random_trace(seed, 200)
    trace = as_trace(arrivals, sizes)
    period_end, period_of, end = [], [], 0.0
    for arrival, size in zip(arrivals, sizes, strict=True):
        if arrival > end or not period_end:
            period_end.append(arrival)
            end = arrival
        end += size / 1000
        period_end[-1] = end
        period_of.append(len(period_end) - 1)
    results = [simulate(trace, policy_for(name, sizes)).fct_s for name in POLICIES]
    results.append(simulate_srpt(trace, RATE_BPS).fct_s)
    for fct in results:
        ends = np.asarray(arrivals) + fct
        latest = [0.0] * len(period_end)
        for flow, period in enumerate(period_of):
            latest[period] = max(latest[period], float(ends[flow]))
        assert latest == pytest.approx(period_end, rel=1e-9)
        assert (fct >= np.asarray(sizes) / 1000 - 1e-6).all()


def naive_srpt(arrivals: list[float], sizes: list[int]) -> list[float]:
    left: dict[int, float] = {}
    ends = [0.0] * len(arrivals)
    now, upcoming = 0.0, 0
    while left or upcoming < len(arrivals):
        arrival = arrivals[upcoming] if upcoming < len(arrivals) else INF
        first = min(left, key=left.__getitem__, default=None)
        finish = now + left[first] / 1000 if first is not None else INF
        then = min(arrival, finish)
        if first is not None:
            left[first] -= (then - now) * 1000
        now = then
        if finish <= arrival:
            assert first is not None
            ends[first] = now
            del left[first]
        else:
            left[upcoming] = float(sizes[upcoming])
            upcoming += 1
    return [end - arrival for end, arrival in zip(ends, arrivals, strict=True)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_srpt_agrees_with_the_naive_reference_and_has_the_least_mean(seed: int) -> None:
    arrivals, sizes = random_trace(seed, 150)
    trace = as_trace(arrivals, sizes)
    srpt = simulate_srpt(trace, RATE_BPS).fct_s
    assert srpt == pytest.approx(naive_srpt(arrivals, sizes), rel=1e-6, abs=1e-6)
    for name in ("2d", "ps", "np-sjf"):
        assert srpt.mean() <= simulate(trace, policy_for(name, sizes)).fct_s.mean() + 1e-9


def test_example_by_hand() -> None:
    # Two classes, weights 3:1, 1,000 B/s. Flow 0 (class 1) alone until 1 s has 1,000 B left; then
    # flow 1 (class 0, 750 B) gets 750 B/s and ends at 2 s; flow 0 got 250 B and has 750 left.
    policy = DomainPolicy("d", RATE_BPS, (ClassPolicy(800, 0.75), ClassPolicy(INF, 0.25)))
    trace = as_trace([0.0, 1.0], [2000, 750])
    assert simulate(trace, policy).fct_s == pytest.approx([2.75, 1.0])


def test_max_wait_releases_and_counts() -> None:
    policy = DomainPolicy("d", RATE_BPS, (ClassPolicy(INF, 1.0),), max_wait_s=1.0)
    result = simulate(as_trace([0.0, 0.5], [10_000, 100]), policy)
    assert result.degraded == {"timeout": 1}
    assert result.wait_s == pytest.approx([0.0, 1.0])
    assert result.fct_s == pytest.approx([10.1, 1.2])


def test_zero_bytes_and_simultaneous_arrivals() -> None:
    for name in POLICIES:
        result = simulate(
            as_trace([0.0] * 6, [0, 0, 5, 5, 2000, 0]), policy_for(name, [5, 60, 2000])
        )
        assert result.end_s == pytest.approx(2.01)


def test_domains_are_independent() -> None:
    one, two = random_trace(1, 50), random_trace(2, 50)
    traces = {"a": as_trace(*one), "b": as_trace(*two)}
    policies = {"a": policy_for("2d", one[1]), "b": policy_for("ps", two[1])}
    both = simulate_domains(traces, policies)
    for name in traces:
        assert (both[name].fct_s == simulate(traces[name], policies[name]).fct_s).all()
    with pytest.raises(KeyError):
        simulate_domains(traces, {"a": policies["a"]})


def test_progress_is_told() -> None:
    arrivals, sizes = random_trace(1, 20_000)
    seen: list[int] = []
    simulate(as_trace(arrivals, sizes), policy_for("fifo", sizes), progress=seen.append)
    simulate_srpt(as_trace(arrivals, sizes), RATE_BPS, progress=seen.append)
    assert seen == [10_000, 20_000] * 2


def test_link_removal_and_weight_change() -> None:
    policy = DomainPolicy("d", RATE_BPS, (ClassPolicy(100, 0.5), ClassPolicy(INF, 0.5)))
    link = FluidLink(policy)
    link.start(1, 0, 1000, now=0.0)
    link.start(2, 1, 1000, now=0.0)
    link.start(3, 1, 500, now=0.0)
    assert link.active() == [1, 2]
    assert link.remaining(1, now=1.0) == pytest.approx(500)
    assert link.remove(3, now=1.0) == pytest.approx(250)
    link.set_weights([0.9, 0.1], now=1.0)
    assert link.remaining(2, now=1.5) == pytest.approx(700)
    when, flow = link.finish()
    assert (when, flow) == (pytest.approx(1 + 500 / 900), 1)
    when, flow = link.finish()
    assert (when, flow) == (pytest.approx(2.25), 2)
    assert link.next_finish() == INF
    with pytest.raises(StateError):
        link.finish()
    with pytest.raises(StateError):
        SrptLink(1e9).finish()


def test_flow_twice_on_a_link_is_refused() -> None:
    link = FluidLink(DomainPolicy("d", RATE_BPS, (ClassPolicy(INF, 1.0),)))
    link.start(1, 0, 10, now=0.0)
    with pytest.raises(StateError):
        link.start(1, 0, 10, now=0.0)


@pytest.mark.parametrize(
    ("arrivals", "sizes"),
    [([1.0, 0.5], [1, 1]), ([0.0], [-1]), ([math.nan], [1]), ([0.0, 1.0], [1])],
)
def test_bad_traces_are_refused(arrivals: list[float], sizes: list[int]) -> None:
    with pytest.raises(InputError, match="trace"):
        as_trace(arrivals, sizes)
