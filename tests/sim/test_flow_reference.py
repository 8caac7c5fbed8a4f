"""The flow simulator against queueing theory and against reference ratios, on fixed seeds.

The whole study, with its tolerances, is `python -m benchmarks.simulator`.
"""

import math

import numpy as np
import pytest

from intentd.core.flows.classes import policy_from_sample
from intentd.core.flows.policies import make_domain_policy
from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.sampling import poisson_trace, sample_sizes
from intentd.core.flows.workloads import WORKLOADS
from intentd.core.sim.flows import NO_MAX_WAIT_S, fct_metrics, simulate, simulate_srpt

RATE_BPS = 1e10


def published(name: str, workload: str, load: float = 0.8) -> DomainPolicy:
    item = WORKLOADS[workload]
    return make_domain_policy(
        name,
        domain="d",
        rate_bps=RATE_BPS,
        sizes=item.cdf,
        load=load,
        thresholds_bytes=item.published_thresholds_bytes,
        workload=workload,
        max_wait_s=NO_MAX_WAIT_S,
    )


@pytest.mark.parametrize("load", [0.4, 0.6])
def test_means_of_the_single_server_queue(load: float) -> None:
    """M/G/1: Pollaczek-Khinchine for FIFO, E[S]/(1-rho) for PS, by size too."""
    cdf = WORKLOADS["uniform"].cdf
    trace = poisson_trace(cdf, load=load, rate_bps=RATE_BPS, flows=30_000, seed=5)
    seconds = 8.0 / RATE_BPS
    mean = cdf.mean_bytes * seconds
    wait = load / mean * cdf.second_moment * seconds**2 / (2 * (1 - load))
    fifo = simulate(trace, published("fifo", "uniform"))
    assert fifo.fct_s.mean() == pytest.approx(mean + wait, rel=0.05)
    assert fifo.wait_s.mean() == pytest.approx(wait, rel=0.08)
    ps = simulate(trace, published("ps", "uniform")).fct_s
    assert ps.mean() == pytest.approx(mean / (1 - load), rel=0.05)
    large = trace.sizes_bytes > 12e6  # PS: the slowdown is the same for all sizes
    slowdown = ps / (trace.sizes_bytes * seconds)
    assert slowdown[large].mean() == pytest.approx(1 / (1 - load), rel=0.05)


def test_mean_wait_of_shortest_job_first() -> None:
    """Non-preemptive SJF (Phipps): W(x) = lambda E[S^2] / (2 (1 - rho(x))^2)."""
    cdf, load = WORKLOADS["uniform"].cdf, 0.7
    trace = poisson_trace(cdf, load=load, rate_bps=RATE_BPS, flows=30_000, seed=6)
    seconds = 8.0 / RATE_BPS
    per_s = load / (cdf.mean_bytes * seconds)
    waits = []
    for i in range(400):
        size = cdf.quantile((i + 0.5) / 400)
        below = per_s * cdf.partial_moment(1, -1, size) * seconds
        waits.append(per_s * cdf.second_moment * seconds**2 / 2 / (1 - below) ** 2)
    result = simulate(trace, published("np-sjf", "uniform"))
    assert result.wait_s.mean() == pytest.approx(math.fsum(waits) / 400, rel=0.08)


REFERENCE = {
    "web-search": {
        "ps": {"mean_s": 1.58, "p50_s": 3.5, "p90_s": 2.58, "p99_s": 1.27},
        "srpt": {"mean_s": 0.72, "p50_s": 0.72, "p90_s": 0.86},
        "np-sjf": {"mean_s": 1.47, "p90_s": 2.24, "p99_s": 0.62},
    },
    "uniform": {
        "ps": {"mean_s": 1.58, "p50_s": 1.47, "p90_s": 1.68, "p99_s": 1.83, "p995_s": 1.86},
        "srpt": {"mean_s": 0.85, "p50_s": 0.57, "p90_s": 0.78, "p99_s": 1.97},
        "np-sjf": {"mean_s": 0.86, "p50_s": 0.64, "p90_s": 0.74, "p99_s": 1.90},
    },
}


@pytest.mark.parametrize("workload", sorted(REFERENCE))
def test_ratios_to_2d_are_the_reference_ones(workload: str) -> None:
    sums: dict[str, dict[str, float]] = {}
    for seed in (1, 2):
        trace = poisson_trace(
            WORKLOADS[workload].cdf, load=0.8, rate_bps=RATE_BPS, flows=30_000, seed=seed
        )
        for name in ("2d", *REFERENCE[workload]):
            if name == "srpt":
                fct = simulate_srpt(trace, RATE_BPS).fct_s
            else:
                fct = simulate(trace, published(name, workload)).fct_s
            for metric, value in fct_metrics(fct).items():
                table = sums.setdefault(name, {})
                table[metric] = table.get(metric, 0.0) + value
    for name, cells in REFERENCE[workload].items():
        for metric, expected in cells.items():
            ratio = sums[name][metric] / sums["2d"][metric]
            assert ratio == pytest.approx(expected, rel=0.12), (name, metric)


@pytest.mark.parametrize("workload", ["web-search", "cache"])
def test_boost_is_no_worse_than_fifo_in_the_class(workload: str) -> None:
    item = WORKLOADS[workload]
    sample = sample_sizes(item.cdf, 10_000, np.random.default_rng(99))
    sums = {"2d": dict.fromkeys(("mean_s", "p90_s", "p99_s"), 0.0)}
    sums["2d-boost"] = dict(sums["2d"])
    for seed in (31, 32):
        trace = poisson_trace(item.cdf, load=0.8, rate_bps=RATE_BPS, flows=30_000, seed=seed)
        for name, table in sums.items():
            policy = policy_from_sample(
                name,
                sample,
                domain="d",
                rate_bps=RATE_BPS,
                load=0.8,
                max_wait_s=NO_MAX_WAIT_S,
            )
            metrics = fct_metrics(simulate(trace, policy).fct_s)
            for metric in table:
                table[metric] += metrics[metric]
    for metric, value in sums["2d"].items():
        assert sums["2d-boost"][metric] <= 1.01 * value
    assert sums["2d-boost"]["mean_s"] < sums["2d"]["mean_s"]
