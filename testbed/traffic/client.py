"""The client of the generator: asks for a turn, then for the bytes, and records both.

``python -m intentd.testbed.traffic.client PLAN.json``; the plan is a ClientPlan. It opens its
connections, prints ``ready``, reads ``go START`` (seconds of the monotonic clock) from standard
input, plays its part of the trace, prints ``progress DONE TOTAL`` once a second and at the end
``done`` with a JSON summary. Records go to records_path.

Connections are persistent: with fresh ones a median flow takes 3.3 times as long, 13 times when
SYN-ACKs queue behind a busy class (measured on the prototype of this testbed).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from intentd.core.errors import InputError
from intentd.testbed.traffic.congestion import set_congestion
from intentd.testbed.traffic.gate import Gate, make_gate
from intentd.testbed.traffic.records import FlowRecord, write_records
from intentd.testbed.traffic.timerfd import TimerFd
from intentd.testbed.traffic.trace import TraceFlow, read_trace
from intentd.testbed.traffic.turns import Ended, Turn
from intentd.testbed.traffic.wire import Request, encode_request

_BUFFER_BYTES: Final = 4 << 20
_CONNECT_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """What one client host plays.

    gate: see ``testbed.traffic.gate.make_gate``. servers: (host, port), numbered as in the trace.
    host: its own number in the trace; flows of other hosts are not its own. pool: connections
    opened to each server beforehand (more are opened when all are busy). mode: "open" plays the
    trace's arrival times; "closed" keeps ``concurrency`` flows going, each next one as soon as one
    ends. drain_s: how long flows may take after the last arrival before they count as stalled.
    """

    gate: dict[str, Any]
    servers: list[tuple[str, int]]
    trace_path: str
    records_path: str
    host: int = 0
    pool: int = 32
    max_pool: int = 1024
    congestion: str = "cubic"
    mode: str = "open"
    concurrency: int = 8
    drain_s: float = 60.0


class Flow:
    """A flow on its way: waiting, sending, done."""

    __slots__ = ("announced", "arrival", "first", "granted", "index", "left", "plan", "turn")

    def __init__(self, index: int, plan: TraceFlow, arrival: float) -> None:
        self.index = index
        self.plan = plan
        self.arrival = arrival
        self.granted = 0.0
        self.first = 0.0
        self.left = plan.size_bytes
        self.turn: Turn | None = None
        self.announced = False


class Connection:
    """A persistent connection to one server; carries one answer at a time."""

    def __init__(self, client: Client, server: int, sock: socket.socket) -> None:
        self.client = client
        self.server = server
        self.sock = sock
        self.flow: Flow | None = None
        self.class_index = -1  # of its last flow; -1: none yet
        client.loop.add_reader(sock.fileno(), self._readable)

    def ask(self, flow: Flow, turn: Turn) -> None:
        self.flow, self.class_index = flow, turn.class_index
        self.sock.send(
            encode_request(
                Request(
                    flow.index, flow.plan.size_bytes, turn.priority, turn.dscp, turn.class_index
                )
            )
        )

    def _readable(self) -> None:
        """MSG_TRUNC lets TCP drop the bytes instead of copying them here (tcp(7))."""
        try:
            got = self.sock.recv_into(self.client.buffer, _BUFFER_BYTES, socket.MSG_TRUNC)
        except BlockingIOError:
            return
        except OSError:
            got = 0
        flow = self.flow
        if got == 0 or flow is None:
            self.client.lost(self)
            return
        if not flow.first:
            flow.first = time.monotonic()
        flow.left -= got
        if flow.left <= 0:
            self.flow = None
            self.client.finished(flow, self)
        elif not flow.announced and flow.turn and flow.left <= flow.turn.early_fin_bytes:
            flow.announced = True
            self.client.gate.announce(flow.index)


class IdleConnections:
    """Idle connections to one server, taken by class, the most recently used first.

    A connection's congestion window fits the flows it carried: a large flow on one that only saw
    small ones would begin with slow start at every turn of its class.
    """

    def __init__(self) -> None:
        self._by_class: dict[int, dict[Connection, None]] = {}

    def put(self, connection: Connection) -> None:
        self._by_class.setdefault(connection.class_index, {})[connection] = None

    def take(self, class_index: int) -> Connection | None:
        """One of the class, else one never used, else any."""
        for index in (class_index, -1, *self._by_class):
            idle = self._by_class.get(index)
            if idle:
                return idle.popitem()[0]
        return None

    def discard(self, connection: Connection) -> None:
        self._by_class.get(connection.class_index, {}).pop(connection, None)

    def all(self) -> list[Connection]:
        return [connection for idle in self._by_class.values() for connection in idle]


class Client:
    """Plays the trace. One object a process."""

    def __init__(self, plan: ClientPlan, flows: list[tuple[int, TraceFlow]]) -> None:
        self.plan = plan
        self.loop = asyncio.get_running_loop()
        self.buffer = bytearray(_BUFFER_BYTES)
        self.records: list[FlowRecord] = []
        self.stalled: dict[int, Flow] = {}
        self.reconnected = 0
        self.opened = 0
        self._flows = flows
        self._next = 0
        self._start = 0.0
        self._timer = TimerFd()
        self._free = [IdleConnections() for _ in plan.servers]
        self._count = [0] * len(plan.servers)
        self._queued: list[deque[Flow]] = [deque() for _ in plan.servers]
        self._connecting: set[asyncio.Task[None]] = set()
        self._done = asyncio.Event()
        self.gate: Gate = make_gate(plan.gate, self.loop, self._granted)

    async def prepare(self) -> None:
        """Connect to the gate and open the pool. Raises OSError, TimeoutError."""
        await self.gate.start()
        for server in range(len(self.plan.servers)):
            for _ in range(self.plan.pool):
                self._free[server].put(await self._connect(server))

    async def _connect(self, server: int) -> Connection:
        host, port = self.plan.servers[server]
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._count[server] += 1
        try:
            sock.setblocking(False)
            set_congestion(sock, self.plan.congestion)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self.loop.sock_connect(sock, (host, port))
        except BaseException:
            self._count[server] -= 1
            sock.close()
            raise
        self.opened += 1
        return Connection(self, server, sock)

    async def play(self, start: float, progress: Callable[[int, int], None]) -> None:
        """From the first arrival to the last byte, or until drain_s after the last arrival."""
        self._start = start
        self.gate.zero(start)
        if not self._flows:
            return
        self.loop.add_reader(self._timer.fd, self._due)
        if self.plan.mode == "open":
            self._timer.arm(start + self._flows[0][1].arrival_s)
            last = start + self._flows[-1][1].arrival_s
        else:
            self._timer.arm(start)
            last = start
        while not self._done.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._done.wait()
            progress(len(self.records), len(self._flows))
            if self._next >= len(self._flows):
                last = max(last, start)
                if self.plan.mode == "closed" and self.records:
                    last = max(last, start + self.records[-1].finished_s)
                if time.monotonic() > last + self.plan.drain_s:
                    return

    def _due(self) -> None:
        self._timer.clear()
        if self.plan.mode == "closed":
            for _ in range(min(self.plan.concurrency, len(self._flows))):
                self._arrive()
            return
        now = time.monotonic()
        while self._next < len(self._flows):
            when = self._start + self._flows[self._next][1].arrival_s
            if when > now:
                self._timer.arm(when)
                return
            self._arrive()
            now = time.monotonic()

    def _arrive(self) -> None:
        index, planned = self._flows[self._next]
        self._next += 1
        flow = Flow(index, planned, time.monotonic())
        self.stalled[index] = flow
        self.gate.open(index, planned.size_bytes)

    def _granted(self, index: int, turn: Turn) -> None:
        flow = self.stalled.get(index)
        if flow is None:
            return
        if flow.turn is not None:
            flow.turn = turn  # it started by the board and was not alone
            return
        flow.granted = time.monotonic()
        flow.turn = turn
        self._send(flow)

    def _send(self, flow: Flow) -> None:
        server = flow.plan.server
        turn = flow.turn or Turn()
        while (connection := self._free[server].take(turn.class_index)) is not None:
            try:
                connection.ask(flow, turn)
            except OSError:
                self._drop(connection)
                continue
            if flow.left <= turn.early_fin_bytes and not flow.announced:
                flow.announced = True  # so little is left already
                self.gate.announce(flow.index)
            return
        self._queued[server].append(flow)
        if self._count[server] < self.plan.max_pool:
            task = self.loop.create_task(self._grow(server), name="grow pool")
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _grow(self, server: int) -> None:
        """One more connection, for whichever flow is first in the queue by then."""
        try:
            connection = await self._connect(server)
        except (OSError, TimeoutError) as error:
            print(f"connect to {self.plan.servers[server]}: {error}", file=sys.stderr)
            await asyncio.sleep(0.2)
            if self._queued[server]:
                self._send(self._queued[server].popleft())
            return
        self._idle(connection)

    def _idle(self, connection: Connection) -> None:
        queued = self._queued[connection.server]
        if not queued:
            self._free[connection.server].put(connection)
            return
        flow = queued.popleft()
        connection.ask(flow, flow.turn or Turn())

    def finished(self, flow: Flow, connection: Connection) -> None:
        now = time.monotonic()
        self.gate.finish(flow.index, Ended(flow.plan.size_bytes, flow.first, now))
        turn = flow.turn or Turn()
        del self.stalled[flow.index]
        self.records.append(
            FlowRecord(
                flow.index,
                self.plan.host,
                flow.plan.server,
                flow.plan.size_bytes,
                turn.class_index,
                flow.plan.arrival_s,
                flow.arrival - self._start,
                flow.granted - self._start,
                flow.first - self._start,
                now - self._start,
                turn.degraded,
            )
        )
        self._idle(connection)
        if self.plan.mode == "closed" and self._next < len(self._flows):
            self._arrive()
        if len(self.records) == len(self._flows):
            self._done.set()

    def lost(self, connection: Connection) -> None:
        """The server went away: the flow starts again on another connection."""
        flow = connection.flow
        self._drop(connection)
        if flow is not None:
            self.reconnected += 1
            flow.left, flow.first = flow.plan.size_bytes, 0.0
            self._send(flow)

    def _drop(self, connection: Connection) -> None:
        if connection.sock.fileno() < 0:
            return
        self.loop.remove_reader(connection.sock.fileno())
        connection.sock.close()
        self._count[connection.server] -= 1
        self._free[connection.server].discard(connection)

    async def close(self) -> None:
        for task in list(self._connecting):
            task.cancel()
        self.loop.remove_reader(self._timer.fd)
        self._timer.close()
        for free in self._free:
            for connection in free.all():
                self._drop(connection)
        for flow in self.stalled.values():
            self.gate.finish(flow.index)
        await self.gate.close()

    def summary(self) -> dict[str, Any]:
        return {
            "host": self.plan.host,
            "flows": len(self._flows),
            "finished": len(self.records),
            "stalled": sorted(self.stalled),
            "restarted": self.reconnected,
            "connections": self.opened,
            "cpu_s": round(sum(os.times()[:2]), 3),
            "gate": self.gate.counters(),
        }


async def _run(plan: ClientPlan) -> None:
    flows = [
        (index, flow)
        for index, flow in enumerate(read_trace(Path(plan.trace_path)))
        if flow.host == plan.host
    ]
    client = Client(plan, flows)
    try:
        await client.prepare()
        print("ready", flush=True)
        line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        words = line.split()
        if len(words) != 2 or words[0] != "go":
            raise InputError("stdin", line, "'go START'")
        await client.play(
            float(words[1]), lambda done, total: print(f"progress {done} {total}", flush=True)
        )
    finally:
        await client.close()
        write_records(Path(plan.records_path), client.records)
    print("done", json.dumps(client.summary()), flush=True)


def write_plan(plan: ClientPlan, path: Path) -> None:
    path.write_text(json.dumps(asdict(plan)))


def main() -> int:
    table = json.loads(Path(sys.argv[1]).read_text())
    table["servers"] = [(host, port) for host, port in table["servers"]]
    uvloop.run(_run(ClientPlan(**table)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
