import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intentd.core.flows.policies import make_domain_policy
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.sampling import FlowTrace, poisson_trace
from intentd.core.flows.virtual_ps import VirtualPs
from intentd.core.flows.workloads import WORKLOADS
from intentd.core.sim.flows import NO_MAX_WAIT_S, fct_metrics, simulate

TWO = DomainPolicy("d", 8e3, (ClassPolicy(100, 0.5), ClassPolicy(math.inf, 0.5)))


def test_counts_follow_the_virtual_schedule() -> None:
    ps = VirtualPs(TWO)
    ps.arrive(1000, now=0.0)
    ps.arrive(100, now=0.5)  # 500 B of the first are left; both get 500 B/s
    assert (ps.counts(), ps.weights()) == ([1, 1], [0.5, 0.5])
    assert ps.next_departure() == pytest.approx(0.7)
    ps.advance(0.7)
    assert ps.counts() == [0, 1]
    assert ps.weights()[1] == 1.0
    assert ps.next_departure() == pytest.approx(1.1)
    ps.advance(5.0)
    assert ps.counts() == [0, 0]
    assert ps.next_departure() == math.inf


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_departures_are_those_of_a_ps_link(seed: int) -> None:
    rng = random.Random(seed)
    arrivals = np.cumsum([rng.expovariate(2.0) for _ in range(150)])
    sizes = np.array([float(rng.choice([20, 90, 400, 2000])) for _ in range(150)])
    real = simulate(FlowTrace(arrivals, sizes), make_domain_policy("ps", domain="d", rate_bps=8e3))
    expected = sorted(arrivals + real.fct_s)
    ps = VirtualPs(TWO)
    ends = []
    for arrival, size in [*zip(arrivals, sizes, strict=True), (math.inf, 0.0)]:
        while ps.next_departure() <= arrival and ps.next_departure() < math.inf:
            ends.append(ps.next_departure())
            before = sum(ps.counts())
            ps.advance(ends[-1])
            ends += [ends[-1]] * (before - sum(ps.counts()) - 1)
        if arrival < math.inf:
            ps.arrive(float(size), now=float(arrival))
    assert ends == pytest.approx(expected, rel=1e-9)


def test_classes_end_with_the_virtual_schedule() -> None:
    """Followed at every event, a class is done when it is in PS (section 2.3.5)."""
    item = WORKLOADS["cache"]
    trace = poisson_trace(item.cdf, load=0.8, rate_bps=1e9, flows=2_000, seed=3)
    limits = item.published_thresholds_bytes
    policy = make_domain_policy(
        "2d",
        domain="d",
        rate_bps=1e9,
        sizes=item.cdf,
        thresholds_bytes=limits,
        max_wait_s=NO_MAX_WAIT_S,
    )
    ps = make_domain_policy("ps", domain="d", rate_bps=1e9)
    ours = trace.arrivals_s + simulate(trace, policy, virtual_ps_weights=True).fct_s
    real = trace.arrivals_s + simulate(trace, ps).fct_s
    for low, high in zip((-1.0, *limits), limits, strict=False):
        members = (trace.sizes_bytes > low) & (trace.sizes_bytes <= high)
        # not exact: where rounding left a class some bytes, it goes on at the weight's floor
        assert ours[members].max() == pytest.approx(real[members].max(), rel=1e-6)


def test_time_average_as_weight_is_the_trap_it_is_said_to_be() -> None:
    """Byte shares (what N_k/N averages to) starve data mining's small flows."""
    item = WORKLOADS["data-mining"]
    trace = poisson_trace(item.cdf, load=0.8, rate_bps=1e10, flows=20_000, seed=1)
    limits = item.published_thresholds_bytes
    bytes_of = [
        item.cdf.partial_moment(1, low, high) / item.cdf.mean_bytes
        for low, high in zip((-1.0, *limits), limits, strict=False)
    ]
    medians = []
    for weights in (None, bytes_of):
        policy = make_domain_policy(
            "2d",
            domain="d",
            rate_bps=1e10,
            sizes=item.cdf,
            thresholds_bytes=limits,
            weights=weights,
            max_wait_s=NO_MAX_WAIT_S,
        )
        medians.append(fct_metrics(simulate(trace, policy).fct_s)["p50_s"])
    assert medians[1] / medians[0] > 1_000
