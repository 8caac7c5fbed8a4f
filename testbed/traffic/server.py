"""The server of the generator: answers each request with as many bytes, marked as it asks.

``python -m intentd.testbed.traffic.server PLAN.json``; the plan is a ServerPlan. It prints
``ready PORT...`` and serves until its standard input ends, then writes the samples of the
bottleneck's counters and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from intentd.core.errors import WireError
from intentd.testbed.traffic.congestion import set_congestion
from intentd.testbed.traffic.counters import ClassCounters
from intentd.testbed.traffic.wire import REQUEST_BYTES, Request, decode_request

_FILE_BYTES: Final = 8 << 20
_SMALL: Final = memoryview(bytes(32_768))  # up to here a copy costs less than sendfile's set-up
_TURN_BYTES: Final = 1 << 20  # sent before other connections get their turn of the loop


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """addresses: (host, port) to listen on, port 0 for any free one.

    congestion: TCP congestion control, "" for the host's own. device: whose class counters are
    sampled every sample_s into samples_path ("" for none). mark: "priority" (SO_PRIORITY and
    DSCP; needs CAP_NET_ADMIN), "dscp" or "none".
    """

    addresses: list[tuple[str, int]] = field(default_factory=lambda: [("127.0.0.1", 0)])
    congestion: str = "cubic"
    device: str = ""
    sample_s: float = 0.02
    samples_path: str = ""
    mark: str = "dscp"


class Connection:
    """One persistent connection: waits for a request, or sends the rest of an answer."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._left = 0
        self._writing = False
        self._pending = b""
        self._marked = (0, 0)
        self._inet6 = sock.family == socket.AF_INET6
        server.loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._pending += data
        if self._left == 0:
            self._next()

    def _next(self) -> None:
        while self._left == 0 and len(self._pending) >= REQUEST_BYTES:
            head, self._pending = self._pending[:REQUEST_BYTES], self._pending[REQUEST_BYTES:]
            try:
                request = decode_request(head)
                self._mark(request)
            except WireError as error:
                print(f"connection closed: {error}", file=sys.stderr)
                self.close()
                return
            self._left = request.size_bytes
            self._send()

    def _mark(self, request: Request) -> None:
        """The DSCP first: setting it resets the priority (socket(7))."""
        wanted = (request.dscp, request.priority)
        if wanted == self._marked or self._server.plan.mark == "none":
            return
        if self._inet6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, request.dscp << 2)
        else:
            self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, request.dscp << 2)
        if request.priority and self._server.plan.mark == "priority":
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, request.priority)
            except OSError as error:
                raise WireError(f"SO_PRIORITY {request.priority:#x}: {error}") from None
        self._marked = wanted

    def _send(self) -> None:
        budget = _TURN_BYTES
        while self._left and budget > 0:
            try:
                if self._left <= len(_SMALL):
                    sent = self._sock.send(_SMALL[: self._left])
                else:
                    wanted = min(self._left, _FILE_BYTES, budget)
                    sent = os.sendfile(self._sock.fileno(), self._server.file, 0, wanted)
            except BlockingIOError:
                break
            except OSError:
                self.close()
                return
            self._left -= sent
            budget -= sent
            self._server.sent_bytes += sent
        if self._left and not self._writing:
            self._server.loop.add_writer(self._sock.fileno(), self._writable)
            self._writing = True
        elif not self._left and self._writing:
            self._server.loop.remove_writer(self._sock.fileno())
            self._writing = False

    def _writable(self) -> None:
        self._send()
        if self._left == 0 and self._sock.fileno() >= 0:
            self._next()

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._server.loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._server.loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._server.connections.discard(self)


class Server:
    """Listens, accepts, and samples the bottleneck."""

    def __init__(self, plan: ServerPlan, loop: asyncio.AbstractEventLoop) -> None:
        self.plan = plan
        self.loop = loop
        self.sent_bytes = 0
        self.connections: set[Connection] = set()
        self.file = os.memfd_create("intentd-testbed")
        os.truncate(self.file, _FILE_BYTES)
        self._listeners: list[socket.socket] = []
        self._counters = ClassCounters(plan.device) if plan.device else None
        self._samples: list[tuple[float, list[tuple[int, int, int, int]]]] = []
        self._timer: asyncio.TimerHandle | None = None

    def listen(self) -> list[int]:
        for host, port in self.plan.addresses:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            self._listeners.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            set_congestion(sock, self.plan.congestion)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((host, port))
            sock.listen(1024)
            sock.setblocking(False)
            self.loop.add_reader(sock.fileno(), self._accept, sock)
        if self._counters is not None:
            self._sample()
        return [sock.getsockname()[1] for sock in self._listeners]

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _ = listener.accept()
            sock.setblocking(False)
            self.connections.add(Connection(self, sock))

    def _sample(self) -> None:
        if self._counters is None:
            return
        # A policy change or a killed agent may take the classes away for a moment.
        with contextlib.suppress(OSError):
            self._samples.append(
                (
                    time.monotonic(),
                    [
                        (c.handle, c.parent, c.sent_bytes, c.backlog_bytes)
                        for c in self._counters.read()
                    ],
                )
            )
        self._timer = self.loop.call_later(self.plan.sample_s, self._sample)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for listener in self._listeners:
            self.loop.remove_reader(listener.fileno())
            listener.close()
        for connection in list(self.connections):
            connection.close()
        os.close(self.file)
        if self._counters is not None:
            self._counters.close()
        if self.plan.samples_path:
            Path(self.plan.samples_path).write_text(json.dumps(self._samples))


async def _serve(plan: ServerPlan) -> None:
    loop = asyncio.get_running_loop()
    server = Server(plan, loop)
    try:
        ports = server.listen()
        print("ready", *ports, flush=True)
        ended = asyncio.Event()
        loop.add_reader(sys.stdin.fileno(), lambda: ended.set() if not os.read(0, 4096) else None)
        await ended.wait()
        loop.remove_reader(sys.stdin.fileno())
    finally:
        server.close()


def write_plan(plan: ServerPlan, path: Path) -> None:
    path.write_text(json.dumps(asdict(plan)))


def main() -> int:
    table = json.loads(Path(sys.argv[1]).read_text())
    table["addresses"] = [(host, port) for host, port in table["addresses"]]
    uvloop.run(_serve(ServerPlan(**table)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
