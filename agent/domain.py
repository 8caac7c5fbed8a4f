"""What the gate shell holds: link domains, and the flows that are open or ended lately."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from intentd.agent import app_protocol as wire
from intentd.agent.app_socket import Application
from intentd.agent.measure import Meter, quantiles
from intentd.core.flows.gate import Release
from intentd.core.flows.policy import ClassPolicy, DomainPolicy

WAITING: Final = "waiting"
SENDING: Final = "sending"
_UNMARKED: Final = (0, 0)
_UINT32_MAX: Final = 2**32 - 1

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Gate(Protocol):
    """What the shell drives: FlowGate's calls; DomainGate has them and the turn protocol's.

    handed_over: starts in order beside another's announced last bytes. demoted: marks withdrawn.
    """

    @property
    def handed_over(self) -> int: ...
    @property
    def demoted(self) -> int: ...
    def arrive(
        self,
        flow: int,
        size_bytes: int,
        *,
        now: float,
        class_index: int | None = None,
        started: bool = False,
    ) -> list[Release]: ...
    def finish(self, flow: int, *, now: float) -> list[Release]: ...
    def cancel(self, flow: int, *, now: float) -> list[Release]: ...
    def announce(self, flow: int, *, now: float) -> list[Release]: ...
    def expect(self, class_index: int, *, now: float) -> None: ...
    def forgo(self, class_index: int, *, now: float) -> list[Release]: ...
    def expire(self, *, now: float) -> list[Release]: ...
    def next_timer(self) -> float | None: ...
    def set_policy(self, policy: DomainPolicy, *, now: float) -> list[Release]: ...
    def class_index_of(self, flow: int) -> int | None: ...
    def queue_lengths(self) -> list[int]: ...
    def active(self) -> list[int]: ...
    def admits(self) -> list[int]: ...


class FlowRecord:
    """One flow, from OPEN to its end, and a while longer for `explain`."""

    __slots__ = (
        "ahead",
        "application",
        "arrived",
        "class_index",
        "degraded",
        "domain",
        "ended",
        "flow",
        "hint",
        "mark",
        "name",
        "number",
        "outcome",
        "peer",
        "pid",
        "policy",
        "previous_end_ns",
        "queues",
        "released",
        "request",
        "sent_bytes",
        "size",
        "started_ns",
        "uid",
    )

    def __init__(
        self, flow: int, application: Application, message: wire.Open, domain: Domain | None
    ) -> None:
        self.flow = flow
        self.application: Application | None = application
        self.name, self.pid, self.uid = application.name, application.pid, application.uid
        self.request = message.request
        self.domain = domain
        self.size = message.size_bytes
        self.peer = message.peer
        self.hint = message.class_hint
        self.policy = domain.policy if domain is not None else None
        self.number = domain.number if domain is not None else (0, 0)
        self.class_index = 0
        self.arrived = 0.0
        self.released = -1.0
        self.ended = -1.0
        self.degraded = ""
        self.outcome = WAITING
        self.queues: tuple[int, ...] = ()
        self.ahead = 0
        self.sent_bytes = 0
        self.started_ns = 0
        self.previous_end_ns = 0
        self.mark: tuple[int, int] | None = None  # SO_PRIORITY and DSCP of the passed socket


class Domain:
    """One link domain of this host: its gate, policy, meter, and how its flows are marked."""

    def __init__(self, name: str, policy: DomainPolicy, gate: Gate) -> None:
        self.name = name
        self.policy = policy
        self.gate = gate
        self.number: tuple[int, int] = (0, 0)
        self.meter = Meter()
        self.shaped = False
        self.priorities: tuple[int, ...] = ()  # SO_PRIORITY per class; empty: not marked
        self.marks: list[tuple[int, int]] = []  # SO_PRIORITY and DSCP per class
        self.early_fin_bytes = 0
        self.timer: float | None = None
        self.grant_flags = 0
        self.adopt(policy, (0, 0))

    def adopt(self, policy: DomainPolicy, number: tuple[int, int]) -> None:
        """Remember the policy the gate now follows, and what a GRANT says of it."""
        cut = [cls.threshold_bytes for cls in policy.classes]
        if cut != [cls.threshold_bytes for cls in self.policy.classes]:
            self.meter.forget_classes()
        self.policy, self.number = policy, number
        self.early_fin_bytes = min(policy.early_fin_bytes, _UINT32_MAX)
        self.rate_bps = int(policy.rate_bps)
        self.max_wait_ms = min(int(policy.max_wait_s * 1000) + 1, _UINT32_MAX)
        self._set_marks()

    def mark_with(self, priorities: tuple[int, ...], shaped: bool) -> None:
        self.priorities, self.shaped = priorities, shaped
        self.grant_flags = wire.GRANT_SHAPED if shaped else 0
        self._set_marks()

    def mark_of(self, class_index: int) -> tuple[int, int]:
        """SO_PRIORITY and DSCP of a class; zeros for a class that the policy no longer has."""
        return self.marks[class_index] if class_index < len(self.marks) else _UNMARKED

    def describe(self) -> dict[str, Any]:
        """Its classes with queues, FCT and wait, for status and `flows`."""
        meter, policy = self.meter, self.policy
        queue, active = self.gate.queue_lengths(), self.gate.active()
        return {
            "policy": {"name": policy.name, "era": self.number[0], "number": self.number[1]},
            "rate_bps": policy.rate_bps,
            "shaped": self.shaped,
            "classes": [
                {
                    "index": index,
                    "threshold_bytes": finite_threshold(cls),
                    "weight": cls.weight,
                    "mpl": cls.mpl,
                    "order": cls.order,
                    "sequencing": cls.sequencing,
                    "waiting": queue[index],
                    "active": active[index],
                    **meter.summary(index),
                }
                for index, cls in enumerate(policy.classes)
            ],
            "arrivals": meter.arrivals,
            "arrived_bytes": meter.arrived_bytes,
            "finished": meter.finished,
            "cancelled": meter.cancelled,
            "degraded": dict(meter.degraded),
            "handed_over": self.gate.handed_over,
            "demoted": self.gate.demoted,
            "handover_s": quantiles(meter.handover),
        }

    def _set_marks(self) -> None:
        known = len(self.priorities)
        self.marks = [
            (self.priorities[index] if index < known else 0, cls.dscp)
            for index, cls in enumerate(self.policy.classes)
        ]


def finite_threshold(cls: ClassPolicy) -> float | None:
    """As JSON can have it: None for the last class."""
    return None if cls.threshold_bytes == float("inf") else cls.threshold_bytes


@dataclass(frozen=True, slots=True)
class Route:
    """Flows to peers in network belong to domain."""

    network: Network
    domain: str


def parse_network(text: str) -> Network:
    """An address or network as text. Raises ValueError."""
    return ipaddress.ip_network(text)
