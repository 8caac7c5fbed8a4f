"""Links between members that can be delayed, frozen and cut: TCP and datagrams, in this process.

The kernel at hand may have no netem. A relay listens in one namespace and connects from it, so what
passes it meets a real network twice; what it does to a link is exact and ends when it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.testbed.netns import Namespace

# A link that nobody reads from is not read from either.
HIGH_WATER_BYTES: Final = 1 << 18


@dataclass(eq=False)
class TcpLink:
    """name: who to whom. target: (address, port), or the path of a Unix socket.

    States: open; delayed (delay_s > 0); frozen (nothing moves, new connections are taken and
    wait); cut (connections are reset and new ones closed at once).
    """

    name: str
    space: Namespace
    address: str
    port: int
    target: tuple[str, int] | str
    delay_s: float = 0.0
    cut: bool = False
    passed_bytes: int = 0
    _thawed: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._thawed.set()
        listener = self.space.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.address, self.port))
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listener, backlog=256)

    def freeze(self) -> None:
        self._thawed.clear()

    def break_off(self) -> None:
        """Reset what is open."""
        for writer in list(self._writers):
            with contextlib.suppress(OSError):
                _reset(writer)

    def heal(self) -> None:
        self.delay_s, self.cut = 0.0, False
        self._thawed.set()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.break_off()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = {writer}
        self._writers.add(writer)
        try:
            if self.cut:
                return
            await self._thawed.wait()
            there, away = await self._dial()
            ends.add(away)
            self._writers.add(away)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, away), name=f"{self.name} to")
                both.create_task(self._pump(there, writer), name=f"{self.name} from")
        except* (OSError, RuntimeError):  # uvloop says so of a transport closed meanwhile
            pass
        finally:
            self._tasks.discard(task)
            for end in ends:
                self._writers.discard(end)
                with contextlib.suppress(OSError):
                    _reset(end) if self.cut else end.close()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.target, str):
            return await asyncio.open_unix_connection(self.target)
        sock = self.space.socket()
        try:
            sock.setblocking(False)
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().sock_connect(sock, self.target)
            return await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(HIGH_WATER_BYTES):
            await self._thawed.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            self.passed_bytes += len(data)
            writer.write(data)
            await writer.drain()
        if not writer.transport.is_closing():
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@dataclass(eq=False)
class UdpLink(asyncio.DatagramProtocol):
    """Repeats each datagram to all targets; loses, doubles and reorders when it is told to."""

    name: str
    space: Namespace
    address: str
    port: int
    targets: list[tuple[str, int]]
    rng: random.Random
    loss: float = 0.0
    repeat: float = 0.0
    late_s: float = 0.0
    passed: int = 0
    lost: int = 0
    _transport: Any = None

    async def start(self) -> None:
        sock = self.space.socket(kind=socket.SOCK_DGRAM)
        sock.bind((self.address, self.port))
        sock.setblocking(False)
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        for target in self.targets:
            if self.rng.random() < self.loss:
                self.lost += 1
                continue
            copies = 2 if self.rng.random() < self.repeat else 1
            for _ in range(copies):
                self.passed += 1
                if self.late_s:
                    later_s = self.rng.random() * self.late_s
                    asyncio.get_running_loop().call_later(later_s, self._send, data, target)
                else:
                    self._send(data, target)

    def _send(self, data: bytes, target: tuple[str, int]) -> None:
        if not self._transport.is_closing():
            self._transport.sendto(data, target)

    def error_received(self, exc: Exception) -> None:
        """A host that is down answers so; the datagram is lost."""
        self.lost += 1

    def heal(self) -> None:
        self.loss = self.repeat = self.late_s = 0.0

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
