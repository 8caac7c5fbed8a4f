"""The host's agent as the gate of a client: the application protocol of docs/wire.md, by callback.

The client library waits inside ``open``; the generator keeps thousands of flows waiting on one
connection and wants none of the cost of a task each, so it speaks the protocol itself.
Like the library it fails open: without an answer a flow starts at once, marked degraded.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter, deque
from typing import Any, Final

from intentd.agent.client import Board, received_board
from intentd.testbed.traffic.turns import Ended, OnTurn, Turn

_MAGIC: Final = 0x4941
_VERSION: Final = 1
_HELLO, _WELCOME, _OPEN, _GRANT, _QUEUED, _ANNOUNCE, _DONE = 1, 2, 3, 4, 5, 6, 7
_CANCEL, _ERROR = 8, 11
_NO_CLASS: Final = 0xFFFF
_STARTED: Final = 4
_REASONS: Final = (
    "", "timeout", "lease", "fallback", "early_fin", "policy", "no_domain", "raced",
)  # fmt: skip

_HEADER: Final = struct.Struct("!HBBI")
_HELLO_PACKET: Final = struct.Struct("!HBBI64s")
_OPEN_PACKET: Final = struct.Struct("!HBBIHHB3xq16s64s")
_GRANT_PACKET: Final = struct.Struct("!HBBIQHBBHHIIQ")
_QUEUED_PACKET: Final = struct.Struct("!HBBIQHHII")
_ANNOUNCE_PACKET: Final = struct.Struct("!HBBIQ")
_DONE_PACKET: Final = struct.Struct("!HBBIQQQ")

_ANSWER_TIMEOUT_S: Final = 1.0
_WAIT_GRACE_S: Final = 1.0
_CHECK_S: Final = 0.1
_RETRY_S: Final = 0.1
_CONNECT_TIMEOUT_S: Final = 10.0
_BATCH: Final = 64  # packets read before the loop sees to other connections


class AgentGate:
    """One connection to the agent's socket; any number of flows on it.

    A flow is unanswered, queued, running, or none of ours (the agent died or never knew it).
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_turn: OnTurn,
        *,
        path: str,
        domain: str,
        required: bool = True,
    ) -> None:
        """required: ``start`` fails if no agent answers; else flows then start ungated."""
        self._loop = loop
        self._on_turn = on_turn
        self._path = path
        self._domain = domain.encode()
        self._required = required
        self._sock: socket.socket | None = None
        self._board: Board | None = None
        self._greeted = False
        self._deadline: dict[int, float] = {}  # unanswered and queued flows: give up then
        self._running: set[int] = set()
        self._outbox: deque[bytes] = deque()
        self._later: deque[bytes] = deque()  # OPENs of flows that have started by the board
        self._timer: asyncio.TimerHandle | None = None
        self._retry_at = 0.0
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Raises TimeoutError if the agent must be there and is not."""
        until = time.monotonic() + _CONNECT_TIMEOUT_S
        while not self._connect():
            if not self._required:
                break
            if time.monotonic() > until:
                raise TimeoutError(f"no agent at {self._path}")
            await asyncio.sleep(_RETRY_S)
        self._check()

    def zero(self, start: float) -> None:
        """The agent keeps its own time."""

    def _connect(self) -> bool:
        self._retry_at = time.monotonic() + _RETRY_S
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.setblocking(False)
            sock.connect(self._path)
            sock.send(_HELLO_PACKET.pack(_MAGIC, _VERSION, _HELLO, 0, b"intentd-testbed"))
        except OSError:
            sock.close()
            return False
        self._sock = sock
        self._greeted, self._board = False, None
        self._counts["connected"] += 1
        self._loop.add_reader(sock.fileno(), self._readable)
        return True

    def open(self, flow: int, size_bytes: int) -> None:
        if self._sock is None and (time.monotonic() < self._retry_at or not self._connect()):
            self._fail_open(flow, "absent")
            return
        offer = None
        if self._board is not None and self._board.unsettled:
            self._readable()  # the answer may be there
        if self._board is not None:
            offer = self._board.start(flow, size_bytes, self._domain, has_peer=False)
        flags = 0 if offer is None else _STARTED
        packet = _OPEN_PACKET.pack(
            _MAGIC, _VERSION, _OPEN, flow, flags, _NO_CLASS, 0, size_bytes, b"", self._domain
        )
        if offer is None:
            self._deadline[flow] = time.monotonic() + _ANSWER_TIMEOUT_S
            self._send(packet)
            return
        self._counts["by_board"] += 1
        self._running.add(flow)
        self._later.append(packet)  # before the turn: a flow so small announces its end in it
        self._loop.call_soon(self._send_later)
        index, dscp, priority, early, _ = offer
        self._on_turn(flow, Turn(index, "", dscp, priority, early))

    def _send_later(self) -> None:
        """The request has left: now the agent may take the processor."""
        while self._later:
            self._put(self._later.popleft())

    def announce(self, flow: int) -> None:
        if flow in self._running:
            packet = _ANNOUNCE_PACKET.pack(_MAGIC, _VERSION, _ANNOUNCE, flow, 0)
            if self._later:
                self._later.append(packet)  # after its OPEN, when the request has left
            else:
                self._put(packet)

    def finish(self, flow: int, ended: Ended | None = None) -> None:
        if flow in self._running:
            self._running.discard(flow)
            size, first, last = (0, 0, 0) if ended is None else _stamps(ended)
            self._send(_DONE_PACKET.pack(_MAGIC, _VERSION, _DONE, flow, size, first, last))
        elif self._deadline.pop(flow, None) is not None:
            self._send(_HEADER.pack(_MAGIC, _VERSION, _CANCEL, flow))

    def _send(self, packet: bytes) -> None:
        self._send_later()  # an OPEN goes before what follows it
        self._put(packet)

    def _put(self, packet: bytes) -> None:
        if self._sock is None:
            return
        if not self._outbox:
            try:
                self._sock.send(packet)
                return
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            except OSError:
                self._lost()
                return
        self._outbox.append(packet)

    def _writable(self) -> None:
        while self._outbox and self._sock is not None:
            try:
                self._sock.send(self._outbox[0])
            except BlockingIOError:
                return
            except OSError:
                self._lost()
                return
            self._outbox.popleft()
        if self._sock is not None:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(_BATCH):
            if self._sock is None:
                return
            try:
                if self._greeted:
                    packet = self._sock.recv(512)
                else:
                    packet, fds, _, _ = socket.recv_fds(self._sock, 512, 1)
                    self._greeted, self._board = True, received_board(packet, fds)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._lost()
                return
            self._understand(packet)

    def _understand(self, packet: bytes) -> None:
        _, _, kind, flow = _HEADER.unpack_from(packet)
        if kind == _GRANT:
            values = _GRANT_PACKET.unpack(packet)
            index, dscp, reason, priority, early = (values[i] for i in (5, 6, 7, 10, 11))
            if self._board is not None:
                self._board.settled(flow)
            if self._deadline.pop(flow, None) is not None:
                self._running.add(flow)
            elif flow not in self._running or not reason:
                return  # given up, or started by the board and in order
            degraded = _REASONS[reason] if reason < len(_REASONS) else "policy"
            self._on_turn(flow, Turn(index, degraded, dscp, priority, early))
        elif kind == _QUEUED:
            wait_ms = _QUEUED_PACKET.unpack(packet)[8]
            if flow in self._deadline:
                self._deadline[flow] = time.monotonic() + wait_ms / 1e3 + _WAIT_GRACE_S
        elif kind == _ERROR:
            if self._board is not None:
                self._board.settled(flow)
            self._counts[packet[12:].decode(errors="replace")[:80]] += 1
            if self._deadline.pop(flow, None) is not None:
                self._fail_open(flow, "refused")

    def _check(self) -> None:
        """Flows whose answer is overdue start; a lost agent is tried again."""
        now = time.monotonic()
        for flow in [flow for flow, at in self._deadline.items() if at < now]:
            del self._deadline[flow]
            self._send(_HEADER.pack(_MAGIC, _VERSION, _CANCEL, flow))
            self._fail_open(flow, "slow")
        if self._sock is None and now >= self._retry_at:
            self._connect()
        self._timer = self._loop.call_later(_CHECK_S, self._check)

    def _lost(self) -> None:
        """The agent went away: what waits starts now, what runs goes on."""
        self._disconnect()
        self._counts["lost"] += 1
        waiting = list(self._deadline)
        self._deadline.clear()
        self._running.clear()
        for flow in waiting:
            self._fail_open(flow, "closed")

    def _fail_open(self, flow: int, reason: str) -> None:
        self._on_turn(flow, Turn(0, reason))

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            if self._outbox:
                self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
        self._sock, self._board = None, None
        self._outbox.clear()
        self._later.clear()

    def counters(self) -> dict[str, Any]:
        return {"kind": "agent", **self._counts}

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(OSError):
            self._disconnect()


def _stamps(ended: Ended) -> tuple[int, int, int]:
    """Bytes, and nanoseconds of the first and the last."""
    return ended.size_bytes, int(ended.first_s * 1e9), int(ended.last_s * 1e9)
