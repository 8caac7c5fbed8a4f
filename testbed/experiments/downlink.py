"""Two senders, one receiver: the bottleneck is the receiver's downlink.

The senders' own HTBs cannot share a link they do not own: weights hold only if the receiver shapes
what arrives (ingress redirected to an IFB device). Otherwise the domain is ordered but unshaped,
and has to say so.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, Lab, Scenario
from intentd.testbed.playing import Progress
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.results import Check, Results, Table, keep, machine_facts
from intentd.testbed.traffic.records import FlowRecord, read_records
from intentd.testbed.traffic.trace import TraceFlow, poisson

WORKLOAD: Final = "web-search"
CONTENTION: Final = "contention"
LOAD: Final = 0.8
DURATION_S: Final = 20.0
WEIGHTS: Final = (0.7, 0.3)
# Long flows: between two of them a class has nothing to send for a round trip or two.
SMALL_BYTES, LARGE_BYTES = 25_000_000, 30_000_000
WITHIN: Final = 0.05


def contention(seconds: float, rate_bps: float) -> list[TraceFlow]:
    """Both classes always have work: one from each sender, all asked for at once."""
    total = rate_bps / 8 * seconds
    flows = []
    for server, (size, weight) in enumerate(zip((SMALL_BYTES, LARGE_BYTES), WEIGHTS, strict=True)):
        flows += [TraceFlow(0.0, size, 0, server)] * math.ceil(total * weight / size)
    return flows


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    """Shares of two classes that are always busy, then a workload from both senders."""
    duration_s = options.duration_s or DURATION_S
    load = options.loads[0] if options.loads else LOAD
    name = options.workloads[0] if options.workloads else WORKLOAD
    source = scaled_workload(name, options.scale)
    seed = options.first_seed
    results = Results(
        "downlink",
        "Two senders, one receiver",
        "Two servers send to one client; the bottleneck is the switch's port to the client. The "
        "client's agent orders the flows and, where it can, shapes what arrives.",
        options=options.to_plain()
        | {"workload": name, "load": load, "duration_s": duration_s, "weights": WEIGHTS},
        machine=machine_facts(),
    )
    setup = replace(options.setup(), servers=2, downlink=True)
    two = DomainPolicy(
        DOMAIN,
        options.rate_bps,
        (
            ClassPolicy((SMALL_BYTES + LARGE_BYTES) / 2, WEIGHTS[0], dscp=3),
            ClassPolicy(math.inf, WEIGHTS[1], dscp=7),
        ),
        max_wait_s=600.0,
    )
    async with Lab(setup, directory, progress) as lab:
        busy = await lab.run(
            Scenario(
                "two busy classes",
                CONTENTION,
                0.99,
                seed,
                contention(duration_s / 2, options.rate_bps),
                two,
                simulate=False,
            )
        )
        keep(results, busy, directory)
        assert lab.suite is not None
        state = await lab.suite.tc_state(lab.suite.member("agent", lab.clients[0]))
        trace = poisson(
            source,
            load=load,
            rate_bps=options.rate_bps,
            duration_s=duration_s,
            seed=seed,
            servers=2,
        )
        for label in ("2d", "ps"):
            policy = policy_for(
                label, [source], domain=DOMAIN, rate_bps=options.rate_bps, load=load
            )
            run = await lab.run(
                Scenario(label, source.name, load, seed, trace, policy, simulate=False)
            )
            keep(results, run, directory)
    _conclude(results, read_records(directory / busy.records), state)
    return results


def _conclude(results: Results, records: list[FlowRecord], state: dict[str, Any]) -> None:
    shares = class_shares(records)
    shaped = state.get("state") == "shaped"
    results.tables.append(
        Table(
            "Share of the downlink while both classes were busy",
            ["class", "weight", "share"],
            [[index, WEIGHTS[index], share] for index, share in enumerate(shares)],
            f"The domain says: {state.get('state')} {state.get('reason', '')}".strip(),
        )
    )
    if shaped:
        worst = max(abs(share / weight - 1) for share, weight in zip(shares, WEIGHTS, strict=True))
        results.checks.append(
            Check("share of a busy class against its weight, relative", worst, "<=", WITHIN)
        )
    else:
        results.notes.append(
            "The receiver does not shape: the domain is ordered but unshaped, and says so: "
            f"{state.get('state')} {state.get('reason', '')}"
        )
    stalled = sum(run.stalled for run in results.runs if run.workload != CONTENTION)
    results.checks.append(Check("flows that never finished", stalled, "<=", 0))


def class_shares(records: list[FlowRecord]) -> list[float]:
    """Bytes of each class that arrived while both had work, as shares.

    A flow's bytes count evenly between its turn and its end.
    """
    ends = [
        max((r.finished_s for r in records if r.class_index == index), default=0.0)
        for index in range(len(WEIGHTS))
    ]
    until = min(ends)
    moved = [0.0] * len(WEIGHTS)
    for record in records:
        span = record.finished_s - record.granted_s
        inside = min(record.finished_s, until) - min(record.granted_s, until)
        if span > 0:
            moved[record.class_index] += record.size_bytes * inside / span
    total = math.fsum(moved)
    return [value / total if total else math.nan for value in moved]
