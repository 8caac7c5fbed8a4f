"""The sequencer's sockets: ROUTER frames and FIN datagrams into the core, answers out.

The request path is the daemon's whole cost, so the ROUTER is read here without the kit's
multipart lists: two receives and two sends a request, drained until EAGAIN (the descriptor is
edge-triggered) in capped batches that re-arm themselves.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Container
from typing import Final

import zmq

from intentd.core.errors import ConfigError, IntentdError
from intentd.core.flows.fin import MAX_BYTES, FinVerifier
from intentd.core.flows.turn.sequencer import SequencerCore
from intentd.core.flows.turn.wire import MAX_FRAME_BYTES
from intentd.daemons.kit.zap import user_key

MAX_BATCH: Final = 128
MAX_FINS: Final = 64
LAST_WORD_MS: Final = 500  # for what is said before the end to leave
QUEUE_MESSAGES: Final = 1000  # a peer; a client that does not read loses answers, nobody else
HANDSHAKE_MS: Final = 5000

Answer = Callable[[bytes, bytes, float], bytes | None]
Admit = Callable[[bytes, bytes], bytes | None]


class TurnSocket:
    """A ROUTER in the event loop. answer(peer, frame, now) returns what goes back, or None.

    Messages of more than one part are not ours: dropped and counted. With CURVE, admit(key,
    frame) sees what comes from peers not yet in ``known``, with their public key; what it returns
    is a refusal that goes back instead. Those known cost one look-up.
    """

    def __init__(
        self,
        router: zmq.Socket[bytes],
        answer: Answer,
        clock: Callable[[], float],
        *,
        admit: Admit | None = None,
        known: Container[bytes] = (),
    ) -> None:
        self._admit = admit
        self._known = known
        self._router = router
        self._answer = answer
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._armed = False
        self._linger_ms = 0
        self.multipart = 0
        self.send_failures = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = self._router.getsockopt(zmq.FD)  # type: ignore[assignment]  # FD is an int
        self._loop.add_reader(self._fd, self._drain)
        self._arm()

    def hush(self) -> None:
        """Read and answer no more."""
        if self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._loop = None

    def tell(self, frames: list[tuple[bytes, bytes]]) -> None:
        """The last words, (peer, frame); ``stop`` lets them leave."""
        self._linger_ms = LAST_WORD_MS if frames else 0
        for peer, frame in frames:
            try:
                self._router.send(peer, zmq.NOBLOCK | zmq.SNDMORE)
                self._router.send(frame, zmq.NOBLOCK)
            except zmq.ZMQError:
                self.send_failures += 1

    def stop(self) -> None:
        self.hush()
        self._router.close(linger=self._linger_ms)

    def _arm(self) -> None:
        if not self._armed and self._loop is not None:
            self._armed = True
            self._loop.call_soon(self._rearmed)

    def _rearmed(self) -> None:
        self._armed = False
        self._drain()

    def _drain(self) -> None:
        router = self._router
        receive, send, more = router.recv, router.send, router.getsockopt
        answer, now = self._answer, self._clock()
        admit, known = self._admit, self._known
        nowait, rcvmore, sndmore = zmq.NOBLOCK, zmq.RCVMORE, zmq.NOBLOCK | zmq.SNDMORE
        try:
            for _ in range(MAX_BATCH):
                peer = receive(nowait)
                reply = None
                if admit is None or peer in known:
                    frame = receive(nowait)
                else:
                    frame, key = self._with_key()
                    reply = admit(key, frame)
                if more(rcvmore):
                    self._discard()
                    continue
                if reply is None:
                    reply = answer(peer, frame, now)
                if reply is not None:
                    send(peer, sndmore)
                    send(reply, nowait)
        except zmq.Again:
            return
        except zmq.ZMQError:  # the peer went between its question and our answer
            self.send_failures += 1
        if self._loop is not None:
            self._arm()

    def _with_key(self) -> tuple[bytes, bytes]:
        frame = self._router.recv(zmq.NOBLOCK, copy=False)
        return frame.bytes, user_key(frame)

    def _discard(self) -> None:
        self.multipart += 1
        while self._router.getsockopt(zmq.RCVMORE):
            self._router.recv(zmq.NOBLOCK)


def open_router(context: zmq.Context[zmq.Socket[bytes]], *, max_peers: int) -> zmq.Socket[bytes]:
    """A ROUTER with bounds; security, then bind, are the caller's."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
    router.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
    router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.setsockopt(zmq.TCP_KEEPALIVE, 1)
    router.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    router.setsockopt(zmq.BACKLOG, min(max_peers, 1024))
    return router


def bind(router: zmq.Socket[bytes], endpoint: str, where: str) -> str:
    """The address bound, with the real port. Raises ConfigError."""
    try:
        router.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(where, endpoint, f"an address to bind ({error.strerror})") from None
    return router.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]


class FinSocket:
    """A UDP socket in the event loop; datagrams whose MAC holds go to the core."""

    def __init__(
        self,
        address: tuple[str, int],
        group: str,
        verifier: FinVerifier,
        core: SequencerCore,
        clock: Callable[[], float],
    ) -> None:
        self.verifier = verifier
        self._core = core
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = open_datagrams(address, group)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._drain)

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()

    def _drain(self) -> None:
        """At most MAX_FINS a wake-up; the descriptor is level-triggered, the loop comes back."""
        receive, now = self._socket.recv, self._clock()
        for _ in range(MAX_FINS):
            try:
                datagram = receive(MAX_BYTES + 1)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # an ICMP error of an earlier datagram
                continue
            fin = self.verifier.accept(datagram)
            if fin is not None:
                self._core.finished(fin, now)


def open_datagrams(address: tuple[str, int], group: str) -> socket.socket:
    """A bound, non-blocking UDP socket, in a multicast group if one is named."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    try:
        udp.setblocking(False)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        udp.bind((host, port))
        if group:
            request = struct.pack("=4sI", socket.inet_aton(group), socket.INADDR_ANY)
            udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    except OSError as error:
        udp.close()
        raise IntentdError(
            f"fin.bind: got {host}:{port}, expected an address to bind ({error})"
        ) from None
    return udp
