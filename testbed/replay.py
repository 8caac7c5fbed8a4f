"""The recorded arrivals once more, in the simulator, under the same policy."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.sampling import FlowTrace
from intentd.core.sim.flows import simulate
from intentd.testbed.traffic.trace import TraceFlow


def replay(
    flows: Sequence[TraceFlow], policy: DomainPolicy, goodput_bps: float, servers: int = 1
) -> list[float]:
    """Completion time of each flow in the simulator, seconds, in the order given.

    goodput_bps: payload the bottleneck carries; the simulated link knows no headers. Each of
    several servers has a bottleneck of its own. flows: by arrival.
    """
    simulated = replace(policy, rate_bps=goodput_bps)
    completions = [0.0] * len(flows)
    for server in range(servers):
        own = [index for index, flow in enumerate(flows) if flow.server == server]
        if not own:
            continue
        trace = FlowTrace(
            np.array([flows[index].arrival_s for index in own], dtype=float),
            np.array([flows[index].size_bytes for index in own], dtype=float),
        )
        for index, fct in zip(own, simulate(trace, simulated).fct_s.tolist(), strict=True):
            completions[index] = fct
    return completions


def write_completions(path: Path, completions_s: Sequence[float]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["fct_s"])
        writer.writerows([f"{value:.9f}"] for value in completions_s)


def read_completions(path: Path) -> list[float]:
    """What write_completions wrote; nothing if the run was not simulated."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        return [float(row[0]) for row in rows]
