"""Where a client's flows get their turn: the host's agent, or a gate in the client itself.

The agent is what is measured; the gate in the process is the same FlowGate without sockets and
processes around it, which tells what those cost.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from intentd.core.errors import InputError
from intentd.core.flows.gate import FlowGate, Release
from intentd.core.flows.policy import domain_from_plain
from intentd.testbed.traffic.agent_gate import AgentGate
from intentd.testbed.traffic.turns import Ended, OnTurn, Turn


class Gate(Protocol):
    """One domain's gate as a client sees it; calls never block."""

    async def start(self) -> None: ...

    def zero(self, start: float) -> None:
        """The run starts at this time of the monotonic clock."""

    def open(self, flow: int, size_bytes: int) -> None: ...

    def announce(self, flow: int) -> None: ...

    def finish(self, flow: int, ended: Ended | None = None) -> None:
        """The flow is over; without ended it did not complete."""

    def counters(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


class LocalGate:
    """FlowGate in the client's own process."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_turn: OnTurn,
        *,
        policy: dict[str, Any],
        priorities: list[int],
    ) -> None:
        self._loop = loop
        self._on_turn = on_turn
        self._policy = domain_from_plain(policy)
        self._priorities = priorities
        self._gate = FlowGate(self._policy)
        self._granted: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None

    async def start(self) -> None:
        """Nothing to connect to."""

    def zero(self, start: float) -> None:
        """Times of the gate are the clock's own."""

    def open(self, flow: int, size_bytes: int) -> None:
        self._release(self._gate.arrive(flow, size_bytes, now=time.monotonic()))

    def announce(self, flow: int) -> None:
        self._release(self._gate.announce(flow, now=time.monotonic()))

    def finish(self, flow: int, ended: Ended | None = None) -> None:
        now = time.monotonic()
        if flow in self._granted:
            self._granted.discard(flow)
            self._release(self._gate.finish(flow, now=now))
        else:
            self._release(self._gate.cancel(flow, now=now))

    def _release(self, releases: list[Release]) -> None:
        for release in releases:
            cls = release.class_index
            self._granted.add(release.flow)
            priority = self._priorities[cls] if cls < len(self._priorities) else 0
            dscp, early = self._policy.classes[cls].dscp, self._policy.early_fin_bytes
            self._on_turn(release.flow, Turn(cls, release.degraded, dscp, priority, early))
        at = self._gate.next_timer()
        if at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = (
            None
            if at is None
            else self._loop.call_later(max(0.0, at - time.monotonic()), self._expire)
        )

    def _expire(self) -> None:
        self._timer = self._timer_at = None
        self._release(self._gate.expire(now=time.monotonic()))

    def counters(self) -> dict[str, Any]:
        return {"kind": "local"}

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def make_gate(table: dict[str, Any], loop: asyncio.AbstractEventLoop, on_turn: OnTurn) -> Gate:
    """``{"kind": "local", "policy": plain, "priorities": [...]}`` or
    ``{"kind": "agent", "path": socket, "domain": name, "required": true}``.

    Raises InputError.
    """
    fields = dict(table)
    kind = fields.pop("kind", None)
    if kind == "local":
        return LocalGate(loop, on_turn, **fields)
    if kind == "agent":
        return AgentGate(loop, on_turn, **fields)
    raise InputError("gate.kind", kind, "local or agent")
