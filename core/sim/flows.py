"""Flow scheduling on a modelled link: a trace through the real gate, completion times out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from intentd.core.flows.gate import FlowGate, Release
from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.sampling import FlowTrace
from intentd.core.flows.virtual_ps import VirtualPs
from intentd.core.sim.link import FluidLink, SrptLink

Array = NDArray[np.float64]
NO_MAX_WAIT_S = 1e12  # of policies in studies: order holds however long it takes
METRICS = ("mean_s", "p50_s", "p90_s", "p95_s", "p99_s", "p995_s", "p999_s")
_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.995, 0.999)
_PROGRESS_EVERY = 10_000

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SimResult:
    """fct_s, wait_s: per flow of the trace, completion time and time at the gate.

    degraded: starts by reason. end_s: when the last flow completed.
    """

    fct_s: Array
    wait_s: Array
    degraded: dict[str, int]
    end_s: float


def simulate(
    trace: FlowTrace,
    policy: DomainPolicy,
    *,
    virtual_ps_weights: bool = False,
    progress: Progress | None = None,
) -> SimResult:
    """Every flow of a trace through one link domain: the daemon's FlowGate, then a fluid link.

    virtual_ps_weights: instead of the policy's weights, those of equation 2.1 at every event.
    progress: called with the number of flows finished, now and then.
    """
    arrivals: list[float] = trace.arrivals_s.tolist()
    sizes: list[int] = [int(size) for size in trace.sizes_bytes.tolist()]
    total = len(arrivals)
    gate = FlowGate(policy, max_flows=total + 1)
    link = FluidLink(policy)
    virtual = VirtualPs(policy) if virtual_ps_weights else None
    ends = [0.0] * total
    starts = [0.0] * total
    degraded: dict[str, int] = {}
    upcoming = done = 0
    now = 0.0

    def begin(released: list[Release]) -> None:
        for release in released:
            flow = release.flow
            starts[flow] = now
            link.start(flow, release.class_index, sizes[flow], now=now)
            if release.degraded:
                degraded[release.degraded] = degraded.get(release.degraded, 0) + 1

    while done < total:
        finish = link.next_finish()
        arrival = arrivals[upcoming] if upcoming < total else math.inf
        timer = gate.next_timer()
        event = finish if finish <= arrival else arrival
        if timer is not None and timer < event:
            now = timer
            begin(gate.expire(now=now))
            continue
        if virtual is not None:
            departure = virtual.next_departure()
            if departure < event:
                now = departure
                virtual.advance(now)
                link.set_weights(virtual.weights(), now=now)
                continue
        if finish <= arrival:
            now, flow = link.finish()
            ends[flow] = now
            done += 1
            begin(gate.finish(flow, now=now))
            if progress is not None and done % _PROGRESS_EVERY == 0:
                progress(done)
        else:
            now = arrival
            begin(gate.arrive(upcoming, sizes[upcoming], now=now))
            if virtual is not None:
                virtual.arrive(sizes[upcoming], now=now)
                link.set_weights(virtual.weights(), now=now)
            upcoming += 1
    return SimResult(
        np.asarray(ends) - trace.arrivals_s,
        np.asarray(starts) - trace.arrivals_s,
        degraded,
        now,
    )


def simulate_srpt(
    trace: FlowTrace, rate_bps: float, *, progress: Progress | None = None
) -> SimResult:
    """The same trace under preemptive SRPT, which no gate can do: a bound to compare with."""
    arrivals: list[float] = trace.arrivals_s.tolist()
    sizes: list[float] = trace.sizes_bytes.tolist()
    total = len(arrivals)
    link = SrptLink(rate_bps)
    ends = [0.0] * total
    upcoming = done = 0
    now = 0.0
    while done < total:
        arrival = arrivals[upcoming] if upcoming < total else math.inf
        if link.next_finish() <= arrival:
            now, flow = link.finish()
            ends[flow] = now
            done += 1
            if progress is not None and done % _PROGRESS_EVERY == 0:
                progress(done)
        else:
            link.start(upcoming, 0, sizes[upcoming], now=arrival)
            upcoming += 1
    fct = np.asarray(ends) - trace.arrivals_s
    return SimResult(fct, np.zeros(total), {}, now)


def simulate_domains(
    traces: Mapping[str, FlowTrace], policies: Mapping[str, DomainPolicy]
) -> dict[str, SimResult]:
    """Several link domains side by side; a flow crosses one, so they do not touch each other.

    Raises KeyError for a trace whose domain has no policy.
    """
    return {domain: simulate(trace, policies[domain]) for domain, trace in traces.items()}


def fct_metrics(fct_s: Array) -> dict[str, float]:
    """Mean and percentiles under the names the commands print."""
    values = [float(fct_s.mean()), *(float(v) for v in np.quantile(fct_s, _QUANTILES))]
    return dict(zip(METRICS, values, strict=True))
