"""A trace: which flow of what size arrives when, where, and from which server it asks its bytes.

Open-loop traces are drawn here (Poisson arrivals, dissertation, section 2.6.1) from one seed; what
the clients then really did is saved in the same form, and the simulator replays that.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from intentd.core.errors import InputError

# A full TCP segment with time stamps carries 1448 bytes of payload in 1514 bytes on the link, which
# is what HTB counts: load is meant of the payload the link can carry.
PAYLOAD_SHARE: Final = 1448 / 1514
MAX_FLOWS: Final = 5_000_000
_FIELDS: Final = ("arrival_s", "size_bytes", "host", "server")


@dataclass(frozen=True, slots=True)
class TraceFlow:
    """arrival_s: seconds from the start of the run. host: client host that asks. server: that
    answers."""

    arrival_s: float
    size_bytes: int
    host: int = 0
    server: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """Where sizes come from. quantile: inverse of the size distribution, on (0, 1).

    mean_bytes: of the unscaled distribution. scale: factor on every size, so that enough flows
    fit into a run at the rate of the link.
    """

    name: str
    quantile: Callable[[float], float]
    mean_bytes: float
    scale: float = 1.0

    @property
    def scaled_mean_bytes(self) -> float:
        return self.mean_bytes * self.scale

    def draw(self, rng: random.Random) -> int:
        """One size, at least a byte."""
        return max(1, round(self.quantile(rng.random()) * self.scale))


def goodput_bps(rate_bps: float) -> float:
    """Payload a link of rate_bps carries when it is full of full segments."""
    return rate_bps * PAYLOAD_SHARE


def arrival_rate(load: float, rate_bps: float, mean_bytes: float) -> float:
    """Flows a second that make up the load. Raises InputError."""
    if not 0 < load < 1:
        raise InputError("load", load, "a share of the link in (0, 1)")
    return load * goodput_bps(rate_bps) / (8 * mean_bytes)


def poisson(
    workload: Workload,
    *,
    load: float,
    rate_bps: float,
    duration_s: float,
    seed: int,
    hosts: int = 1,
    servers: int = 1,
    start_s: float = 0.0,
    min_flows: int = 0,
) -> list[TraceFlow]:
    """Poisson arrivals at the load over duration_s, longer if min_flows ask for it.

    Hosts and servers are drawn evenly and independently, which keeps each host's arrivals Poisson.
    Raises InputError.
    """
    per_s = arrival_rate(load, rate_bps, workload.scaled_mean_bytes)
    if duration_s * per_s > MAX_FLOWS:
        raise InputError("duration", duration_s, f"at most {MAX_FLOWS} flows")
    rng = random.Random(f"{workload.name}/{seed}")
    flows: list[TraceFlow] = []
    now = start_s
    while True:
        now += rng.expovariate(per_s)
        if now - start_s > duration_s and len(flows) >= min_flows:
            return flows
        flows.append(
            TraceFlow(now, workload.draw(rng), rng.randrange(hosts), rng.randrange(servers))
        )


def merge(parts: Iterable[Sequence[TraceFlow]]) -> list[TraceFlow]:
    """Several traces as one, by arrival: mixed workloads."""
    return sorted((flow for part in parts for flow in part), key=lambda flow: flow.arrival_s)


def shift(flows: Sequence[TraceFlow], by_s: float) -> list[TraceFlow]:
    return [replace(flow, arrival_s=flow.arrival_s + by_s) for flow in flows]


def offered_load(flows: Sequence[TraceFlow], rate_bps: float) -> float:
    """Share of the link's payload that the trace really asks for until its last arrival."""
    if not flows or flows[-1].arrival_s <= 0:
        return 0.0
    total = sum(flow.size_bytes for flow in flows)
    return 8 * total / (flows[-1].arrival_s * goodput_bps(rate_bps))


def write_trace(path: Path, flows: Iterable[TraceFlow]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_FIELDS)
        for flow in flows:
            writer.writerow([f"{flow.arrival_s:.9f}", flow.size_bytes, flow.host, flow.server])


def read_trace(path: Path) -> list[TraceFlow]:
    """Raises InputError naming the line."""
    flows: list[TraceFlow] = []
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None or tuple(header) != _FIELDS:
            raise InputError(f"{path}:1", header, ",".join(_FIELDS))
        for number, row in enumerate(reader, start=2):
            try:
                arrival, size, host, server = row
                flow = TraceFlow(float(arrival), int(size), int(host), int(server))
            except ValueError:
                raise InputError(f"{path}:{number}", row, ",".join(_FIELDS)) from None
            if flow.size_bytes < 1 or flow.arrival_s < 0 or min(flow.host, flow.server) < 0:
                raise InputError(f"{path}:{number}", row, "size >= 1, the others >= 0")
            flows.append(flow)
    return flows
