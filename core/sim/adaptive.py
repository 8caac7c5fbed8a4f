"""Flow scheduling whose policy is learned while the trace runs: the Learner drives the real gate.

Dissertation, section 2.6.3. Every interval_s of simulated time the sizes that arrived since are
observed, as a controller does with reports, and a policy that is worth issuing is enforced at the
gate and on the link. Flows that send keep what they have sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from intentd.core.flows.assemble import DomainSettings, LoadMeter, assemble
from intentd.core.flows.gate import FlowGate, Release
from intentd.core.flows.learning import Learner
from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.sampling import FlowTrace
from intentd.core.sim.flows import SimResult
from intentd.core.sim.link import FluidLink


@dataclass(slots=True)
class AdaptiveRun:
    """result: as of a run with a fixed policy. classes: (flows arrived, classes) at each policy."""

    result: SimResult
    classes: list[tuple[int, int]] = field(default_factory=list)
    changes: list[int] = field(default_factory=list)


def simulate_adaptive(
    trace: FlowTrace, settings: DomainSettings, learner: Learner, *, interval_s: float = 3.0
) -> AdaptiveRun:
    """A trace through one domain that starts with one class and learns the others."""
    total = len(trace.arrivals_s)
    arrivals: list[float] = trace.arrivals_s.tolist()
    sizes: list[int] = [int(size) for size in trace.sizes_bytes.tolist()]
    policy = assemble(settings, learner, load=None)
    gate = FlowGate(policy, max_flows=total + 1)
    link = FluidLink(policy)
    meter = LoadMeter()
    meter.add(0.0, now=0.0)
    sending: set[int] = set()
    starts, ends = [0.0] * total, [0.0] * total
    degraded: dict[str, int] = {}
    run = AdaptiveRun(SimResult(np.zeros(0), np.zeros(0), degraded, 0.0))
    upcoming = done = observed = 0
    now, tick = 0.0, interval_s

    def begin(released: list[Release]) -> None:
        for release in released:
            starts[release.flow] = now
            sending.add(release.flow)
            link.start(release.flow, release.class_index, sizes[release.flow], now=now)
            if release.degraded:
                degraded[release.degraded] = degraded.get(release.degraded, 0) + 1

    while done < total:
        finish = link.next_finish()
        arrival = arrivals[upcoming] if upcoming < total else math.inf
        timer = gate.next_timer()
        event = min(finish, arrival, math.inf if timer is None else timer)
        if tick < event and upcoming < total:
            now = tick
            tick += interval_s
            fresh = trace.sizes_bytes[observed:upcoming]
            observed = upcoming
            meter.add(float(fresh.sum()), now=now)
            if learner.observe(fresh, now=now) is not None:
                run.changes.append(upcoming)
            learner.decide()
            rate = meter.rate_bps(now=now)
            load = None if rate is None else rate / settings.rate_bps
            better = assemble(settings, learner, load=load, in_force=policy)
            if better != policy:
                policy = better
                run.classes.append((upcoming, len(policy.classes)))
                released = gate.set_policy(policy, now=now)
                link = _moved(link, gate, policy, sending, now)
                begin(released)
        elif timer is not None and timer < min(finish, arrival):
            now = timer
            begin(gate.expire(now=now))
        elif finish <= arrival:
            now, flow = link.finish()
            ends[flow] = now
            sending.discard(flow)
            done += 1
            begin(gate.finish(flow, now=now))
        else:
            now = arrival
            begin(gate.arrive(upcoming, sizes[upcoming], now=now))
            upcoming += 1
    run.result = SimResult(
        np.asarray(ends) - trace.arrivals_s, np.asarray(starts) - trace.arrivals_s, degraded, now
    )
    return run


def _moved(
    link: FluidLink, gate: FlowGate, policy: DomainPolicy, sending: set[int], now: float
) -> FluidLink:
    """The flows on the link under the new classes, each with the bytes it still has to send."""
    fresh = FluidLink(policy)
    for flow in sorted(sending):
        index = gate.class_index_of(flow)
        fresh.start(flow, index or 0, link.remaining(flow, now=now), now=now)
    return fresh
