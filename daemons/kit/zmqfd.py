"""A ZeroMQ socket in the event loop by its file descriptor.

The descriptor is edge-triggered: it turns readable once when the socket's state changes, not while
messages wait. So each wake-up drains until EAGAIN; after a capped batch it re-arms itself, so that
the rest of the loop gets its turn; and every send looks at the events again, because a send may
swallow the edge (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import zmq

MAX_BATCH: Final = 256


class ZmqStream:
    """Calls ``on_message(parts)`` for each multipart message of a socket.

    parts are bytes, or zmq.Frame with ``frames=True`` (a Frame tells the peer's User-Id).
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[Any]], None],
        *,
        max_batch: int = MAX_BATCH,
        frames: bool = False,
    ) -> None:
        self.socket = socket
        self._on_message = on_message
        self._max_batch = max_batch
        self._copy = not frames
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._armed = False

    def start(self) -> None:
        """Watch the socket in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._fd = self.socket.getsockopt(zmq.FD)  # type: ignore[assignment]  # FD is an int
        self._loop.add_reader(self._fd, self._drain)
        self._arm()

    def stop(self, linger_ms: int = 0) -> None:
        """Stop watching and close the socket; nothing more is delivered.

        linger_ms: how long what was sent may still take to leave.
        """
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None
        if not self.socket.closed:
            self.socket.close(linger=linger_ms)

    @property
    def active(self) -> bool:
        return self._loop is not None

    def send(self, parts: list[bytes]) -> bool:
        """Queue one message. False when the queue is full or there is no peer to take it."""
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.ENOTSOCK):
                return False
            raise
        finally:
            self._arm()
        return True

    def _arm(self) -> None:
        if not self._armed and self._loop is not None:
            self._armed = True
            self._loop.call_soon(self._rearmed)

    def _rearmed(self) -> None:
        self._armed = False
        self._drain()

    def _drain(self) -> None:
        receive = self.socket.recv_multipart
        for _ in range(self._max_batch):
            if self._loop is None:  # a handler stopped us
                return
            try:
                parts = receive(zmq.NOBLOCK, copy=self._copy)
            except zmq.Again:
                return
            self._on_message(parts)
        self._arm()
