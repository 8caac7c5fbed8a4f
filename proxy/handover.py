"""Connections that outlive the process: an HTTP server whose idle connections can be handed on.

A connection between two requests has no state but its socket. At a restart each one is handed to
the service manager as soon as it is idle, and the next process reads on where this one stopped:
what the client has sent meanwhile waits in the kernel.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, Final

from aiohttp import StreamReader, web

from intentd.daemons.kit.held import Held

POLL_S: Final = 0.01
HALF_OPEN_S: Final = 1.0


class Connection(web.RequestHandler):
    """Knows whether it is between two requests. Clients that send a request before they have the
    last one's answer (pipelining) are served, but not handed on in the middle of it."""

    __slots__ = ("_begun", "_body")

    def __init__(self, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._begun = False  # a part of a request's head has come
        self._body: StreamReader | None = None  # of the request that came last

    def data_received(self, data: bytes) -> None:
        before, whole = self._request_count, self._whole()
        super().data_received(data)
        if self._request_count != before:
            self._begun = False
            self._body = self._messages[-1][1] if self._messages else None
        elif data and whole:
            self._begun = True

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        # A body knows its connection: kept here, both would wait for the garbage collector, and
        # the heap would grow to whatever lies between two of its rare full rounds.
        self._body = None

    def _whole(self) -> bool:
        return self._body is None or self._body.is_eof()

    def hush(self) -> None:
        """Take no further request: what comes next waits in the kernel."""
        transport = self.transport
        if transport is not None and not self._begun and self._whole() and transport.is_reading():
            transport.pause_reading()

    def idle(self) -> bool:
        """Nothing of a request has come, and nothing of an answer has still to leave."""
        transport = self.transport
        return (
            transport is not None
            and not transport.is_closing()
            and not transport.is_reading()
            and self._waiter is not None
            and not self._waiter.done()
            and not self._messages
            and not transport.get_write_buffer_size()
        )

    def busy(self) -> bool:
        """A request is worked on, or its answer has still to leave."""
        transport = self.transport
        return transport is not None and (
            self._waiter is None or bool(self._messages) or transport.get_write_buffer_size() > 0
        )

    def detach(self) -> int:
        """A duplicate of the socket's descriptor; ``let_go`` closes ours."""
        assert self.transport is not None, "the connection is closed"
        return os.dup(self.transport.get_extra_info("socket").fileno())

    def let_go(self) -> None:
        """Close this process's side; the connection itself stays."""
        if self.transport is not None:
            self.transport.abort()


class Server(web.Server):
    """A low-level server that hands its connections on, and takes those of its predecessor."""

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)

    async def hand_over(self, held: Held, name: str) -> int:
        """Give every connection to the manager once it is idle; how many it took.

        Those that have begun a request's head and do not go on are not waited for.
        """
        handed = 0
        half_open_since = asyncio.get_running_loop().time()
        while True:
            for connection in self._handed_on():
                connection.hush()
            idle = [one for one in self._handed_on() if one.idle()]
            if idle:
                fds = [one.detach() for one in idle]
                try:
                    kept = await asyncio.to_thread(held.keep, name, fds)
                    handed += len(fds) if kept and await asyncio.to_thread(held.settle) else 0
                finally:
                    for fd in fds:
                        os.close(fd)
                    for one in idle:
                        one.let_go()
            if not self.connections:
                return handed
            now = asyncio.get_running_loop().time()
            if any(one.busy() for one in self._handed_on()):
                half_open_since = now
            elif now - half_open_since > HALF_OPEN_S:
                return handed
            await asyncio.sleep(POLL_S)

    def _handed_on(self) -> list[Connection]:
        return [one for one in self.connections if isinstance(one, Connection)]

    async def adopt(self, fds: list[int]) -> int:
        """Serve connections of the process before. How many are still open."""
        adopted = 0
        loop = asyncio.get_running_loop()
        for fd in fds:
            sock = socket.socket(fileno=fd)
            try:
                sock.setblocking(False)
                await loop.connect_accepted_socket(self, sock)
            except OSError:  # the client has gone meanwhile
                sock.close()
            else:
                adopted += 1
        return adopted
