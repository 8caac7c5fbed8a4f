"""Ask this host's intentd agent for a turn before sending: one module, standard library only.

    from intentd.agent.client import flows            # or: from intentd_client import flows

    with flows.open(size=len(data), peer=sock) as flow:
        flow.send(sock, data)

    async with aflows.open(size=len(data), peer=writer) as flow:
        await flow.send(writer, data)

``open`` returns when the flow may send. Leaving the block waits until the bytes have left this
host's queues, then passes the turn on. All threads of a process share one connection, and so do
all tasks of an event loop.

**Fail open.** Nothing here stops a program from sending: if the agent is absent, slow, dead or
does not understand, the flow starts at once, ``flow.degraded`` says why and ``flows.degraded``
counts it by reason. Every wait is bounded. Wrong arguments raise ValueError or TypeError, whether
an agent runs or not.

The module starts no thread and no loop, installs no signal handler, configures and writes no log.
It talks to ``$INTENTD_SOCKET``, by default ``/run/intentd/agent.sock``; the protocol is in the
project's docs/wire.md.
"""

# One file on purpose, longer than the rest of the project's: it is also shipped alone, as the
# distribution intentd-client, and can be copied into a program.

from __future__ import annotations

import array
import asyncio
import bisect
import contextlib
import errno
import fcntl
import ipaddress
import mmap
import os
import socket
import struct
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol

__all__ = [
    "AsyncFlow",
    "AsyncFlows",
    "Board",
    "Flow",
    "Flows",
    "aflows",
    "flows",
    "pending_bytes",
    "received_board",
]

DEFAULT_SOCKET: Final = "/run/intentd/agent.sock"

_MAGIC: Final = 0x4941
_VERSION: Final = 1
_HELLO, _WELCOME, _OPEN, _GRANT, _QUEUED, _ANNOUNCE, _DONE, _CANCEL = 1, 2, 3, 4, 5, 6, 7, 8
_MARK, _MARKED, _ERROR = 9, 10, 11
_WELCOME_BYTE, _PAUSE_BYTE = b"\x02", b"\x0e"  # the type, as it stands in a packet
_WANTS_MARK, _MARK_ONLY, _STARTED, _GRANT_MARKED = 1, 2, 4, 1
_WELCOME_BOARD: Final = 4
_STOPPING: Final = 7  # an ERROR's code: the agent leaves
_NO_CLASS: Final = 0xFFFF
_REASONS: Final = (
    "", "timeout", "lease", "fallback", "early_fin", "policy", "no_domain", "raced",
)  # fmt: skip
_MAX_SIZE: Final = 2**62
_MAX_PACKET: Final = 512

_HEADER: Final = struct.Struct("!HBBI")
_OPEN_PACKET: Final = struct.Struct("!HBBIHHB3xq16s64s")
_GRANT_PACKET: Final = struct.Struct("!HBBIQHBBHHIIQ")
_QUEUED_PACKET: Final = struct.Struct("!HBBIQHHII")
_ANNOUNCE_PACKET: Final = struct.Struct("!HBBIQ")
_DONE_PACKET: Final = struct.Struct("!HBBIQQQ")
_MARKED_PACKET: Final = struct.Struct("!HBBIHBBI")
_ERROR_PACKET: Final = struct.Struct("!HBBIHH")
_HELLO_PACKET: Final = struct.Struct("!HBBI64s")
_WELCOME_PACKET: Final = struct.Struct("!HBBIQII")
_PAUSE_PACKET: Final = struct.Struct("!HBBII")
_BOARD_MAGIC: Final = 0x49414244
_BOARD_HEAD: Final = struct.Struct("=IIQIIII")  # the board is in the host's byte order
_BOARD_DOMAIN: Final = struct.Struct("=64sQIIII")
_BOARD_CLASS: Final = struct.Struct("=QIHH")
_BOARD_HEAD_BYTES: Final = 64
_BOARD_CLASSES: Final = 64
_BOARD_SMALL: Final = 2  # free for flows up to the domain's bound
_OFD_SETLK: Final = 37  # linux/fcntl.h, F_OFD_SETLK: locks that belong to the open file
_LOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_TIMEVAL: Final = struct.Struct("ll")

_SIOCOUTQNSD: Final = 0x894B  # linux/sockios.h: bytes not handed to the network layer yet
_SIOCOUTQ: Final = 0x5411
_SO_MEMINFO: Final = 55  # linux/sock_diag.h: nine u32, the third is what qdisc and device hold
_SO_MEMINFO_BYTES: Final = 36

_ANSWER_TIMEOUT_S: Final = 0.25  # an agent that lives answers within microseconds
_MARK_TIMEOUT_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 30.0  # an agent may ask for while it restarts
_BACK_S: Final = 1.0  # from its WELCOME to its answers
_WAIT_GRACE_S: Final = 0.5  # beyond the longest wait the agent itself promised
_RETRY_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # pauses between attempts to reach the agent
_STALL_S: Final = 0.25  # the receiver takes nothing for so long: the turn is passed on
_DRAIN_SLEEP_S: Final = (20e-6, 2e-3)

PeerLike = Any  # an IP address as text, (address, port), a connected socket, or a StreamWriter


class _Fileno(Protocol):
    def fileno(self) -> int: ...


class _AgentGoneError(Exception):
    """No turn from the agent; ``reason`` becomes the flow's ``degraded``."""

    def __init__(self, reason: str, text: str = "", *, known: bool = False) -> None:
        """known: the agent was not tried, the pause after an earlier failure lasts."""
        super().__init__(reason)
        self.reason = reason
        self.text = text
        self.counts = not known and reason not in ("refused", "timeout")


# -- bytes ----------------------------------------------------------------------------------------


def _peer_address(peer: PeerLike) -> tuple[int, bytes]:
    """(family 0, 4 or 6, packed address). Raises ValueError for what is no IP address."""
    if peer is None or peer == "":
        return 0, b""
    if hasattr(peer, "get_extra_info"):
        peer = peer.get_extra_info("peername")
    elif hasattr(peer, "getpeername"):
        try:
            peer = peer.getpeername()
        except OSError:
            return 0, b""
    if isinstance(peer, tuple) and peer:
        peer = peer[0]
    if not isinstance(peer, str) or not peer:
        return 0, b""
    if peer[0] == "/" or "\0" in peer:  # a Unix socket's name: no network to order
        return 0, b""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        raise ValueError(
            f"peer: got {peer!r:.80}, expected an IP address (names are not resolved here)"
        ) from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.version, address.packed


def _open_packet(
    request: int, size: int, domain: str, peer: PeerLike, class_hint: int | None, flags: int
) -> bytes:
    """Raises ValueError or TypeError naming the argument."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size: got {size!r:.80}, expected a number of bytes")
    if not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"size: got {size}, expected bytes from 0 to 2**62")
    if class_hint is not None and not 0 <= class_hint < _NO_CLASS:
        raise ValueError(f"class_hint: got {class_hint}, expected 0 to {_NO_CLASS - 1}")
    name = domain.encode()
    if len(name) > 64:
        raise ValueError(f"domain: got {domain!r:.80}, expected at most 64 bytes")
    family, packed = _peer_address(peer)
    hint = _NO_CLASS if class_hint is None else class_hint
    return _OPEN_PACKET.pack(
        _MAGIC, _VERSION, _OPEN, request, flags, hint, family, size, packed, name
    )


_UNMARKED_BY_SIZE: Final = struct.pack("!HH", 0, _NO_CLASS)  # flags and class_hint of an OPEN


def _numbered(packet: bytes, request: int) -> bytes:
    """The OPEN under its request number."""
    return packet[:4] + request.to_bytes(4, "big") + packet[8:]


def _started(packet: bytes, request: int) -> bytes:
    """The same OPEN for a flow that sends already."""
    flags = _STARTED.to_bytes(2, "big")
    return packet[:4] + request.to_bytes(4, "big") + flags + packet[10:]


def _wish(packet: bytes) -> tuple[int, bytes, bool]:
    """Size, domain and whether a peer is named, of an OPEN."""
    _, _, _, _, _, _, family, size, _, name = _OPEN_PACKET.unpack(packet)
    return size, name.rstrip(b"\0"), family != 0


class _Reply:
    """What the agent has said about one request so far, filed by whoever reads."""

    __slots__ = ("answer", "flow", "grant", "marked", "over", "waiter", "wake")

    def __init__(self) -> None:
        self.answer = 0.0  # a QUEUED came: wait no longer than this many seconds
        self.grant: tuple[int, ...] | _AgentGoneError | None = None
        self.marked: tuple[int, ...] | None = None
        self.flow: _FlowState | None = None  # started by the board, the agent has not answered yet
        self.over = False  # that flow has ended meanwhile
        self.wake: threading.Lock | None = None
        self.waiter: asyncio.Future[None] | None = None


def _understand(
    packet: bytes, replies: dict[int, _Reply], board: Board | None = None
) -> _Reply | None:
    """File a packet under its request; the reply that changed. May raise _AgentGoneError."""
    try:
        magic, version, kind, request = _HEADER.unpack_from(packet)
        if magic != _MAGIC or version != _VERSION:
            raise _AgentGoneError("protocol", f"agent speaks {magic:#06x} version {version}")
        reply = replies.get(request)
        if kind == _GRANT:
            values = _GRANT_PACKET.unpack(packet)
            if reply is not None:
                reply.grant = values
                if reply.flow is not None:
                    reply.flow._confirmed(values)
        elif kind == _QUEUED:
            values = _QUEUED_PACKET.unpack(packet)
            if reply is not None:
                reply.answer = values[8] / 1e3
        elif kind == _MARKED:
            values = _MARKED_PACKET.unpack(packet)
            if reply is not None:
                reply.marked = values
                if reply.grant is None:
                    reply.grant = values  # the answer to a mark-only request
        elif kind == _ERROR:
            _, _, _, _, code, length = _ERROR_PACKET.unpack_from(packet)
            text = packet[_ERROR_PACKET.size : _ERROR_PACKET.size + length]
            reason = "closed" if code == _STOPPING else "refused"
            gone = _AgentGoneError(reason, text.decode("utf-8", "replace"))
            if reply is not None:
                if reply.grant is None:
                    reply.grant = gone
                else:
                    reply.marked = ()
        elif kind != _WELCOME:
            return None
    except struct.error:
        raise _AgentGoneError("protocol", f"unreadable packet of {len(packet)} bytes") from None
    if kind in (_GRANT, _ERROR):
        if board is not None:
            board.settled(request)
        if reply is not None and reply.flow is not None:
            reply.flow = None
            if reply.over:
                replies.pop(request, None)
    return reply


class _Offer(NamedTuple):
    """A free class: what a GRANT would say of it."""

    class_index: int
    dscp: int
    priority: int
    early_fin_bytes: int
    rate_bps: int


class Board:
    """The agent's board, read: which classes are free (docs/wire.md). Other threads may read too.

    An own start is not on the board until the agent has heard of it. ``start`` therefore claims the
    class, among this host's programs and in this one, until ``settled`` tells that the agent has.
    """

    def __init__(self, fd: int) -> None:
        """Maps the descriptor, which stays the caller's. Raises OSError or ValueError."""
        self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        if self._map[:8] != struct.pack("=II", _BOARD_MAGIC, 1):
            raise ValueError("not a board of version 1")
        self._fd = os.dup(fd)
        self._view = memoryview(self._map)
        self._words = self._view.cast("H")
        self._generations = self._view.cast("Q")
        self._read_at = 0
        self._routed = True
        self._default = b""
        self._domains: dict[bytes, tuple[list[int], list[_Offer], int, int]] = {}
        self._taken: dict[tuple[bytes, int], int] = {}
        self._starts: dict[int, tuple[bytes, int, int]] = {}

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def start(self, request: int, size: int, domain: bytes, has_peer: bool) -> _Offer | None:
        """The flow's class if it is free; it then counts as taken by this request."""
        if self._generations[1] != self._read_at and not self._read():
            return None
        if not domain:
            if has_peer and self._routed:
                return None
            domain = self._default
        known = self._domains.get(domain)
        if known is None:
            return None
        limits, offers, at, small = known
        index = bisect.bisect_left(limits, size)
        key = (domain, index)
        at += index * (_BOARD_CLASS.size // 2)
        free = self._words[at]
        if not free or (free == _BOARD_SMALL and size > small) or key in self._taken:
            return None
        if not self._lock(at, fcntl.F_WRLCK):
            return None  # another program is about to start there
        if self._words[at] != free or self._generations[1] != self._read_at:
            self._lock(at, fcntl.F_UNLCK)
            return None
        self._taken[key] = request
        self._starts[request] = (domain, index, at)
        return offers[index]

    def _lock(self, word: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self._fd, _OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, 2 * word, 2, 0))
        except OSError:
            return False
        return True

    @property
    def unsettled(self) -> bool:
        """Whether the agent has not answered some start yet, as far as is known here."""
        return bool(self._starts)

    def settled(self, request: int) -> None:
        """The agent has answered: the board shows what this request took."""
        start = self._starts.pop(request, None)
        if start is not None:
            self._taken.pop(start[:2], None)
            self._lock(start[2], fcntl.F_UNLCK)

    def _read(self) -> bool:
        """Domains and classes, when the agent has written them anew. False: it is at it."""
        generation = self._generations[1]
        if generation % 2:
            return False
        _, _, _, count, live, default, routed = _BOARD_HEAD.unpack_from(self._map)
        size = _BOARD_DOMAIN.size + _BOARD_CLASSES * _BOARD_CLASS.size
        domains = {}
        self._default = b""
        for number in range(count if live else 0):
            start = _BOARD_HEAD_BYTES + number * size
            name, rate, early, _, classes, small = _BOARD_DOMAIN.unpack_from(self._map, start)
            first = start + _BOARD_DOMAIN.size
            rows = [
                _BOARD_CLASS.unpack_from(self._map, first + index * _BOARD_CLASS.size)
                for index in range(min(classes, _BOARD_CLASSES))
            ]
            name = name.rstrip(b"\0")
            if number == default:
                self._default = name
            if rows:
                domains[name] = (
                    [row[0] for row in rows[:-1]],
                    [_Offer(i, row[2], row[1], early, rate) for i, row in enumerate(rows)],
                    (first + _BOARD_CLASS.size - 2) // 2,
                    small,
                )
        if self._generations[1] != generation:
            return False
        self._domains, self._routed, self._read_at = domains, bool(routed), generation
        return True


def received_board(packet: bytes, fds: list[int]) -> Board | None:
    """The board that came with a WELCOME; None: the agent has none, or another kind."""
    try:
        welcome = len(packet) == _WELCOME_PACKET.size and packet[3] == _WELCOME
        if welcome and fds and _WELCOME_PACKET.unpack(packet)[5] & _WELCOME_BOARD:
            return Board(fds[0])
    except (OSError, ValueError):
        pass  # a board of a later kind: then every flow asks
    finally:
        for fd in fds:
            os.close(fd)
    return None


def pending_bytes(sock: _Fileno) -> int:
    """Bytes given to a TCP or UDP socket that have not left this host; 0 where it cannot be told.

    Counts what the transport has not sent yet and what queueing discipline and device still hold
    (kernel bookkeeping: somewhat more than the payload). Not what only waits for acknowledgement:
    a receiver may delay that by 40 ms.
    """
    fd = sock.fileno()
    if fd < 0:
        return 0
    raw = array.array("i", [0])
    try:
        fcntl.ioctl(fd, _SIOCOUTQNSD, raw)
    except OSError:  # not TCP
        raw[0] = 0
    memory = bytearray(_SO_MEMINFO_BYTES)
    try:
        held = _meminfo(sock, fd, memory)
    except OSError:
        held = 0
    return max(0, raw[0]) + held


def _meminfo(sock: _Fileno, fd: int, memory: bytearray) -> int:
    getsockopt = getattr(sock, "getsockopt", None)
    if getsockopt is None:
        raw = array.array("i", [0])
        fcntl.ioctl(fd, _SIOCOUTQ, raw)
        return max(0, raw[0])
    info = getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _SO_MEMINFO_BYTES)
    return int(struct.unpack_from("=I", info, 8)[0]) if len(info) >= 12 else 0


def _drain_sleep_s(left: int, rate_bps: int) -> float:
    low, high = _DRAIN_SLEEP_S
    return min(high, max(low, left * 8 / rate_bps if rate_bps else low))


def _carries(sock: Any, priority: int, dscp: int) -> bool:
    """Whether a socket has these marks already; 0 asks for none."""
    try:
        if priority and sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) != priority:
            return False
        if not dscp:
            return True
        if sock.family == socket.AF_INET6:
            traffic_class = sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
        else:
            traffic_class = sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)
    except (OSError, AttributeError):
        return False
    return int(traffic_class) >> 2 == dscp


# -- what sync and async share --------------------------------------------------------------------


class _FlowState:
    """What is known about one flow; its methods are in Flow and AsyncFlow.

    degraded: "" started in its turn; else the agent's reason (timeout, lease, fallback, early_fin,
    policy, raced: known only some time after the start) or this module's: absent, slow, closed,
    protocol, refused (``error`` has the text).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.id = 0
        self.class_index = -1
        self.degraded = ""
        self.error = ""
        self.dscp = 0
        self.priority = 0
        self.marked = False
        self.waited_s = 0.0
        self.bytes_sent = 0
        self._early_fin = 0
        self._rate_bps = 0
        self._request = 0
        self._started_ns = 0
        self._announced = False
        self._open = True
        self._sockets: list[Any] = []
        self._connection: Any = None
        self._reply: _Reply | None = None
        self._counter: Counter[str] | None = None  # where a late reason is counted

    def __del__(self) -> None:
        """A flow that nobody closed must not keep its turn for as long as the program lives."""
        connection = getattr(self, "_connection", None)
        if connection is None or not self._open or connection.dead:
            return
        warnings.warn(f"flow {self.id} was never closed", ResourceWarning, stacklevel=2)
        connection.abandon(self._request)

    def _granted(self, grant: tuple[int, ...], connection: _ConnectionState, reply: _Reply) -> None:
        (_, _, _, _, flow, index, dscp, reason, flags, _, priority, early, rate) = grant
        self.id, self.class_index, self.dscp, self.priority = flow, index, dscp, priority
        self.degraded = _REASONS[reason] if reason < len(_REASONS) else "policy"
        if self.degraded == "no_domain":
            self.degraded = ""
        self.marked = bool(flags & _GRANT_MARKED)
        self._early_fin, self._rate_bps = early, rate
        self._connection, self._reply = connection, reply

    def _offered(self, offer: _Offer, connection: _ConnectionState, reply: _Reply) -> None:
        self.class_index, self.dscp, self.priority = offer.class_index, offer.dscp, offer.priority
        self._early_fin, self._rate_bps = offer.early_fin_bytes, offer.rate_bps
        self._connection, self._reply = connection, reply

    def _confirmed(self, grant: tuple[int, ...]) -> None:
        """The agent's word on a flow that started by the board."""
        self.id = grant[4]
        reason = grant[7]
        self.degraded = _REASONS[reason] if reason < len(_REASONS) else "policy"
        if self.degraded and self._counter is not None:
            self._counter[self.degraded] += 1

    def _failed(self, gone: _AgentGoneError) -> None:
        self.degraded, self.error = gone.reason, gone.text

    def _needs_mark(self, sock: Any) -> bool:
        if not self.priority and not self.dscp:
            return False
        return not _carries(sock, self.priority, self.dscp)

    def _note(self, sock: Any, sent: int) -> None:
        if not self._started_ns:
            self._started_ns = time.monotonic_ns()
        if sock is not None and not any(known is sock for known in self._sockets):
            self._sockets.append(sock)
        self.bytes_sent += sent

    def sent(self, sink: Any, count: int) -> None:
        """Say that count bytes were sent on a socket (or writer) by other means than ``send``."""
        self._note(sink, count)

    def announce(self, bytes_left: int = 0) -> None:
        """Nearly done: let the next flow start while the last bytes leave. Once; optional."""
        if self._announced or self._connection is None:
            return
        self._announced = True
        self._tell(_ANNOUNCE_PACKET.pack(_MAGIC, _VERSION, _ANNOUNCE, self._request, bytes_left))

    def cancel(self) -> None:
        """The flow will not send (any more); pass the turn on."""
        self._finish(_HEADER.pack(_MAGIC, _VERSION, _CANCEL, self._request))

    def _ask_mark(self, sock: Any) -> bool:
        """Pass the socket to the agent to be marked. False: nobody to ask."""
        if self._connection is None or self._reply is None:
            return False
        self._reply.marked = None
        self._connection.send(_HEADER.pack(_MAGIC, _VERSION, _MARK, self._request), sock)
        return True

    def _drain_pause(self, left: int, watch: _Leaving) -> float | None:
        """Seconds until the bytes left are worth another look; None: done, or nothing leaves."""
        if 0 < left <= self._early_fin:
            self.announce(left)
        if left == 0:
            return None
        now = time.monotonic()
        if left < watch.least:
            watch.least, watch.since = left, now
        elif now - watch.since > _STALL_S:
            return None
        goal = left if self._announced else max(0, left - self._early_fin)
        return _drain_sleep_s(goal, self._rate_bps)

    @property
    def _drains(self) -> bool:
        return self._open and self._connection is not None and not self._connection.dead

    def _done(self) -> None:
        """The bytes have left, or nobody waits for them any more."""
        ended_ns = time.monotonic_ns() if self._started_ns else 0
        self._finish(
            _DONE_PACKET.pack(
                _MAGIC, _VERSION, _DONE, self._request, self.bytes_sent, self._started_ns, ended_ns
            )
        )

    def _finish(self, packet: bytes) -> None:
        if not self._open:
            return
        self._open = False
        if self._connection is not None:
            self._connection.forget(self._request)
            self._tell(packet)
            self._connection = None

    def _tell(self, packet: bytes) -> None:
        try:
            if self._connection is not None and self._connection.pid == os.getpid():
                self._connection.send(packet)
        except _AgentGoneError:
            pass  # the agent learns it from the connection's end


class _Leaving:
    """The fewest bytes that a flow has had left, and since when."""

    __slots__ = ("least", "since")

    def __init__(self) -> None:
        self.least, self.since = 1 << 62, time.monotonic()


class _Settings:
    """Where the agent is, how failures are counted. Shared by Flows and AsyncFlows."""

    def __init__(
        self,
        path: str | None = None,
        *,
        name: str = "",
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
        max_wait_s: float = 60.0,
        on_degraded: Callable[[Any], None] | None = None,
    ) -> None:
        """name: how `intentctl flows` calls this program, by default its file name.

        answer_timeout_s: an agent that has not answered by then is treated as absent. max_wait_s:
        the longest a flow may queue, whatever the agent says. on_degraded: called with each flow
        that starts degraded, in the caller's thread or task; it must not block. A flow that raced
        another is only counted: that comes to light after its start.
        """
        self._path = path
        self._name = name
        self._answer_timeout_s = answer_timeout_s
        self._max_wait_s = max_wait_s
        self._on_degraded = on_degraded
        self.degraded: Counter[str] = Counter()
        self.opened = 0

    @property
    def path(self) -> str:
        return self._path or os.environ.get("INTENTD_SOCKET") or DEFAULT_SOCKET

    def _hello(self) -> bytes:
        name = self._name or os.path.basename(sys.argv[0] if sys.argv else "") or "python"
        raw = name.encode("utf-8", "replace")[:64].decode("utf-8", "ignore")
        clean = "".join(c for c in raw if c.isprintable())
        return _HELLO_PACKET.pack(_MAGIC, _VERSION, _HELLO, 0, clean.encode())

    def _count(self, flow: _FlowState) -> None:
        self.opened += 1
        if flow.degraded:
            self.degraded[flow.degraded] += 1
            if self._on_degraded is not None:
                self._on_degraded(flow)


def _grant_of(reply: _Reply) -> tuple[int, ...]:
    """What the agent said to an OPEN. Raises _AgentGoneError: nothing in time, or a refusal."""
    grant = reply.grant
    if grant is None:
        raise _AgentGoneError("timeout" if reply.answer else "slow")
    if isinstance(grant, _AgentGoneError):
        raise grant
    return grant


def _give_up(connection: _ConnectionState, request: int, error: BaseException) -> None:
    """An OPEN that was sent came to nothing: tell the agent, unless it said so itself."""
    reason = error.reason if isinstance(error, _AgentGoneError) else ""
    if reason == "slow":  # not even QUEUED: the agent hangs
        connection.fail("slow")
    elif reason in ("", "timeout") and not connection.dead:
        with contextlib.suppress(_AgentGoneError):
            connection.send(_HEADER.pack(_MAGIC, _VERSION, _CANCEL, request))


class _Retry:
    """When the agent may be tried again: at once first, then after growing pauses."""

    def __init__(self) -> None:
        self._failures = 0
        self._not_before = 0.0
        self.reason = "absent"

    def holds(self) -> bool:
        return self._failures > 0 and time.monotonic() < self._not_before

    def failed(self, reason: str) -> None:
        pause = _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
        self._failures += 1
        self._not_before = time.monotonic() + pause
        self.reason = reason

    def succeeded(self) -> None:
        self._failures = 0


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)  # a full backlog answers EAGAIN instead of waiting
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    whole = int(seconds)
    raw = _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6)))
    sock.setsockopt(socket.SOL_SOCKET, option, raw)


def _fd_ancillary(sock: _Fileno) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]).tobytes())]


class _ConnectionState:
    """Requests and what the agent has said to them; the board; the end. Sending is the shells'."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.pid = os.getpid()
        self.dead = False
        self._lock = threading.Lock()
        self._replies: dict[int, _Reply] = {}
        self._next_request = 0
        self._greeted = False
        self._board: Board | None = None
        self.paused_until = 0.0  # the agent restarts, and answers by then

    def __del__(self) -> None:
        sock = getattr(self, "_sock", None)
        if sock is not None:
            sock.close()

    def request(self) -> tuple[int, _Reply]:
        reply = _Reply()
        with self._lock:
            number = self._next_request
            while True:
                number = number % 0xFFFFFFFF + 1
                if number not in self._replies:
                    break
            self._next_request = number
            self._replies[number] = reply
        return number, reply

    def forget(self, request: int) -> None:
        """Nobody waits for the request; one that the agent still answers stays until then."""
        reply = self._replies.get(request)
        if reply is not None and reply.flow is not None:
            reply.over = True
        else:
            self._replies.pop(request, None)

    def abandon(self, request: int) -> None:
        """CANCEL without waiting, from any thread: a flow was dropped unclosed."""
        self.forget(request)
        if not self.dead and self.pid == os.getpid():
            packet = _HEADER.pack(_MAGIC, _VERSION, _CANCEL, request)
            with contextlib.suppress(OSError):
                self._sock.send(packet, socket.MSG_DONTWAIT)

    def offer(self, request: int, reply: _Reply, flow: _FlowState, packet: bytes) -> _Offer | None:
        """The class this OPEN may start in at once, by the board."""
        board = self._board
        if board is None or packet[8:12] != _UNMARKED_BY_SIZE:
            return None
        with self._lock:
            offer = board.start(request, *_wish(packet))
            if offer is not None:
                reply.flow = flow
        return offer

    def send(self, packet: bytes, sock: _Fileno | None = None) -> None:
        """Raises _AgentGoneError."""
        raise NotImplementedError

    def fail(self, reason: str) -> None:
        """End the connection for everyone: all that wait get the reason."""
        with self._lock:
            if self.dead:
                return
            self.dead = True
            waiting = list(self._replies.values())
        self._hang_up()
        for reply in waiting:
            if reply.grant is None:
                reply.grant = _AgentGoneError(reason)
            elif reply.marked is None:
                reply.marked = ()
            self._wake(reply)

    def _hang_up(self) -> None:
        raise NotImplementedError

    @staticmethod
    def _wake(reply: _Reply) -> None:
        raise NotImplementedError

    def _receive(self, flags: int = 0) -> bytes | None:
        """The next packet, empty at the end, None: not yet. WELCOME may bring a board: it is the
        first, and comes again from an agent that has restarted and kept the connection."""
        try:
            if self._greeted:
                return self._sock.recv(_MAX_PACKET, flags)
            packet, fds, _, _ = socket.recv_fds(self._sock, _MAX_PACKET, 1, flags)
            if packet[3:4] == _WELCOME_BYTE:
                self._greeted = True
                # It is back, and about to read what was asked meanwhile.
                self.paused_until = min(self.paused_until, time.monotonic() + _BACK_S)
            self._board = received_board(packet, fds)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        return packet

    def _file(self, packet: bytes) -> None:
        if not packet:
            self.fail("closed")
            return
        if packet[3:4] == _PAUSE_BYTE and len(packet) == _PAUSE_PACKET.size:
            longest_ms = _PAUSE_PACKET.unpack(packet)[4]
            self.paused_until = time.monotonic() + min(longest_ms / 1e3, _LONGEST_PAUSE_S)
            self._greeted = False
            self._board = None
            return
        try:
            changed = _understand(packet, self._replies, self._board)
        except _AgentGoneError as gone:
            self.fail(gone.reason)
            return
        if changed is not None:
            self._wake(changed)


def _has_grant(reply: _Reply) -> bool:
    return reply.grant is not None


def _has_mark(reply: _Reply) -> bool:
    return reply.marked is not None


# -- sync -----------------------------------------------------------------------------------------


class _Connection(_ConnectionState):
    """One connection shared by all threads of a process: whoever waits reads for all.

    A thread that waits for its reply becomes the reader if there is none; others sleep on a lock of
    their own. The reader files what it reads, wakes whom it concerns and, when it has its own
    reply, wakes one sleeper to read on. No thread of ours, and no hop where one thread is alone.
    """

    def __init__(self, path: str, hello: bytes) -> None:
        super().__init__(_connect(path))
        self._sock.setblocking(True)
        _set_timeout(self._sock, socket.SO_SNDTIMEO, _ANSWER_TIMEOUT_S)
        self._reading = False
        self._read_timeout_s = 0.0
        self.send(hello)

    def offer(self, request: int, reply: _Reply, flow: _FlowState, packet: bytes) -> _Offer | None:
        board = self._board
        if board is not None and board.unsettled:
            self._read_answers()
        return super().offer(request, reply, flow, packet)

    def _read_answers(self) -> None:
        """File what has come, if nobody else is reading: flows that started did not wait for it."""
        with self._lock:
            if self._reading:
                return
            self._reading = True
        try:
            while not self.dead:
                packet = self._receive(socket.MSG_DONTWAIT)
                if packet is None:
                    return
                self._file(packet)
        finally:
            self._hand_over()

    def send(self, packet: bytes, sock: _Fileno | None = None) -> None:
        """Raises _AgentGoneError; never waits longer than the answer timeout."""
        try:
            if sock is None:
                self._sock.send(packet)
            else:
                self._sock.sendmsg([packet], _fd_ancillary(sock))
        except BlockingIOError:
            self.fail("slow")
            raise _AgentGoneError("slow") from None
        except OSError as error:
            if sock is not None and error.errno in (errno.EBADF, errno.EINVAL):
                raise  # the caller's socket is closed: their mistake, not the agent's
            self.fail("closed")
            raise _AgentGoneError("closed") from None

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # also ends the reader's recv

    def wait(
        self, reply: _Reply, ready: Callable[[_Reply], bool], timeout_s: float, longest_s: float
    ) -> bool:
        """Until ready(reply), the timeout (longer once QUEUED) or the end. False: not ready."""
        deadline = time.monotonic() + timeout_s
        queued = False
        while not ready(reply):
            if reply.answer and not queued:
                queued = True
                deadline += min(reply.answer + _WAIT_GRACE_S, longest_s)
            left = max(deadline, self.paused_until) - time.monotonic()
            if left <= 0:
                return False
            with self._lock:
                if ready(reply):
                    break
                if self.dead:
                    return False
                lead = not self._reading
                if lead:
                    self._reading = True
                else:
                    if reply.wake is None:
                        reply.wake = threading.Lock()
                    reply.wake.acquire(blocking=False)
            if lead:
                try:
                    self._read(left)
                finally:
                    self._hand_over()
            elif reply.wake is not None and reply.wake.acquire(timeout=left):
                pass
        return True

    def _read(self, timeout_s: float) -> None:
        if not 0 <= self._read_timeout_s - timeout_s < 0.02:
            self._read_timeout_s = timeout_s + 0.01
            _set_timeout(self._sock, socket.SO_RCVTIMEO, self._read_timeout_s)
        packet = self._receive()
        if packet is not None:
            self._file(packet)

    def _hand_over(self) -> None:
        with self._lock:
            self._reading = False
            for reply in self._replies.values():
                if reply.wake is not None and reply.wake.locked():
                    self._wake(reply)
                    break

    @staticmethod
    def _wake(reply: _Reply) -> None:
        if reply.wake is not None:
            with contextlib.suppress(RuntimeError):  # already awake
                reply.wake.release()


class Flow(_FlowState):
    """A flow that may send now. Use it as a context manager, or call ``close``."""

    def send(self, sock: socket.socket, data: bytes | bytearray | memoryview) -> None:
        """Mark the socket with the flow's class if it is not, and send all of data."""
        self.mark(sock)
        self._note(sock, 0)
        sock.sendall(data)
        self._note(sock, len(data))

    def sendfile(self, sock: socket.socket, file: Any, offset: int = 0, count: int = 0) -> int:
        """Like socket.sendfile, in this flow's turn. count 0: to the end. Returns bytes sent."""
        self.mark(sock)
        self._note(sock, 0)
        sent = sock.sendfile(file, offset, count or None)
        self._note(sock, sent)
        return sent

    def mark(self, sock: socket.socket) -> bool:
        """Have the agent set the socket's class (SO_PRIORITY and DSCP). True: it has it."""
        if not self._needs_mark(sock):
            return bool(self.priority or self.dscp)
        try:
            if not self._ask_mark(sock):
                return False
            self._connection.wait(self._reply, _has_mark, _MARK_TIMEOUT_S, 0.0)
        except _AgentGoneError:
            return False
        return bool(self._reply and self._reply.marked)

    def drain(self) -> None:
        """Wait until the bytes have left the host; bounded: a receiver that stalls ends it."""
        watch = _Leaving()
        while True:
            pause = self._drain_pause(sum(pending_bytes(sock) for sock in self._sockets), watch)
            if pause is None:
                return
            time.sleep(pause)

    def close(self) -> None:
        """Wait until the bytes have left, then pass the turn on."""
        if self._drains:
            self.drain()
        self._done()

    def __enter__(self) -> Flow:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.cancel()


class Flows(_Settings):
    """Flows of a program with threads. One instance, ``flows``, is ready to use."""

    def __init__(self, path: str | None = None, **settings: Any) -> None:
        super().__init__(path, **settings)
        self._connection: _Connection | None = None
        self._lock = threading.Lock()
        self._retry = _Retry()

    def open(
        self,
        size: int,
        *,
        peer: PeerLike = None,
        domain: str = "",
        class_hint: int | None = None,
        sock: socket.socket | None = None,
    ) -> Flow:
        """Wait for the turn of a flow of size bytes. The wait is bounded; see ``degraded``.

        peer: who receives, an IP address or a connected socket: picks the link domain unless domain
        names it. sock: the socket that will carry the flow, marked with its class already here.
        Raises ValueError or TypeError for wrong arguments, nothing else.
        """
        flags = _WANTS_MARK if sock is not None else 0
        packet = _open_packet(0, size, domain, sock if peer is None else peer, class_hint, flags)
        flow = Flow(size)
        began = time.monotonic()
        try:
            self._ask(flow, packet, sock)
        except _AgentGoneError as gone:
            flow._failed(gone)
            if gone.counts:
                self._retry.failed(gone.reason)
        flow.waited_s = time.monotonic() - began
        self._count(flow)
        return flow

    def mark(
        self,
        sock: socket.socket,
        *,
        size: int = 0,
        class_hint: int | None = None,
        peer: PeerLike = None,
        domain: str = "",
    ) -> bool:
        """Mark a socket by class or size without waiting for a turn (a server whose client gates).

        True: the socket carries the mark.
        """
        flags = _WANTS_MARK | _MARK_ONLY
        packet = _open_packet(0, size, domain, sock if peer is None else peer, class_hint, flags)
        try:
            connection = self._connected()
            request, reply = connection.request()
            try:
                connection.send(_numbered(packet, request), sock)
                connection.wait(reply, _has_grant, _MARK_TIMEOUT_S, 0.0)
            finally:
                connection.forget(request)
        except _AgentGoneError as gone:
            if gone.counts:
                self._retry.failed(gone.reason)
            return False
        return bool(reply.marked)

    def close(self) -> None:
        """Leave the agent; its flows of this process count as finished. The next open rejoins."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.fail("closed")

    def _ask(self, flow: Flow, packet: bytes, sock: socket.socket | None) -> None:
        connection = self._connected()
        request, reply = connection.request()
        flow._request = request
        offer = connection.offer(request, reply, flow, packet)
        if offer is not None:
            connection.send(_started(packet, request))
            flow._counter = self.degraded
            flow._offered(offer, connection, reply)
            return
        sent = False
        try:
            connection.send(_numbered(packet, request), sock)
            sent = True
            connection.wait(reply, _has_grant, self._answer_timeout_s, self._max_wait_s)
            grant = _grant_of(reply)
        except BaseException as error:
            connection.forget(request)
            if sent:
                _give_up(connection, request, error)
            raise
        flow._granted(grant, connection, reply)

    def _connected(self) -> _Connection:
        connection = self._connection
        if connection is not None and not connection.dead and connection.pid == os.getpid():
            return connection
        with self._lock:
            connection = self._connection
            if connection is not None and not connection.dead and connection.pid == os.getpid():
                return connection
            if self._retry.holds():
                raise _AgentGoneError(self._retry.reason, known=True)
            self._connection = None
            try:
                connection = _Connection(self.path, self._hello())
            except OSError:
                raise _AgentGoneError("absent") from None
            self._retry.succeeded()
            self._connection = connection
            return connection


# -- async ----------------------------------------------------------------------------------------


class _AsyncConnection(_ConnectionState):
    """One connection shared by all tasks of a loop, read by the loop's reader callback."""

    def __init__(self, path: str, hello: bytes, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(_connect(path))
        self.loop = loop
        self._backlog: list[bytes] = []
        self._later: list[bytes] = []  # OPENs of flows that have started by the board
        loop.add_reader(self._sock.fileno(), self._readable)
        self.send(hello)

    def send_later(self, packet: bytes) -> None:
        """Tell the agent when the task has done what it can do at once: its data goes first."""
        if not self._later:
            self.loop.call_soon(self._send_rest)
        self._later.append(packet)

    def _send_rest(self) -> None:
        later, self._later = self._later, []
        for packet in later:
            with contextlib.suppress(_AgentGoneError):  # the flows have started, whoever knows it
                self.send(packet)

    def send(self, packet: bytes, sock: _Fileno | None = None) -> None:
        if self.dead:
            raise _AgentGoneError("closed")
        if self._later:  # an OPEN goes before what follows it
            self._send_rest()
        try:
            if sock is not None:
                # Sockets do not queue behind a slow agent: the flow goes unmarked instead.
                self._sock.sendmsg([packet], _fd_ancillary(sock))
            elif self._backlog:
                self._queue(packet)
            else:
                self._sock.send(packet)
        except BlockingIOError:
            if sock is None:
                self._queue(packet)
                return
            raise _AgentGoneError("slow") from None
        except OSError as error:
            if sock is not None and error.errno in (errno.EBADF, errno.EINVAL):
                raise
            self.fail("closed")
            raise _AgentGoneError("closed") from None

    def _queue(self, packet: bytes) -> None:
        if len(self._backlog) >= 4096:
            self.fail("slow")
            raise _AgentGoneError("slow")
        if not self._backlog:
            self.loop.add_writer(self._sock.fileno(), self._writable)
        self._backlog.append(packet)

    def _writable(self) -> None:
        sent = 0
        try:
            for packet in self._backlog:
                self._sock.send(packet)
                sent += 1
        except BlockingIOError:
            pass
        except OSError:
            self.fail("closed")
            return
        del self._backlog[:sent]
        if not self._backlog:
            self.loop.remove_writer(self._sock.fileno())

    def _hang_up(self) -> None:
        if not self.loop.is_closed():
            self.loop.remove_reader(self._sock.fileno())
            self.loop.remove_writer(self._sock.fileno())
        self._sock.close()

    def _readable(self) -> None:
        for _ in range(64):  # then other callbacks of the loop have their turn
            packet = self._receive()
            if packet is None:
                return
            self._file(packet)
            if self.dead:
                return

    async def wait(
        self, reply: _Reply, ready: Callable[[_Reply], bool], timeout_s: float, longest_s: float
    ) -> bool:
        deadline = self.loop.time() + timeout_s
        queued = False
        while not ready(reply):
            if reply.answer and not queued:
                queued = True
                deadline += min(reply.answer + _WAIT_GRACE_S, longest_s)
            left = deadline - self.loop.time()
            if left <= 0:
                left = self.paused_until - time.monotonic()
            if left <= 0 or self.dead:
                return False
            reply.waiter = self.loop.create_future()
            timer = self.loop.call_later(left, self._wake, reply)
            try:
                await reply.waiter
            finally:
                timer.cancel()
                reply.waiter = None
        return True

    @staticmethod
    def _wake(reply: _Reply) -> None:
        if reply.waiter is not None and not reply.waiter.done():
            reply.waiter.set_result(None)


class AsyncFlow(_FlowState):
    """A flow of an asyncio program: ``async with aflows.open(...) as flow``."""

    async def send(self, sink: Any, data: bytes | bytearray | memoryview) -> None:
        """Send all of data on a StreamWriter or a non-blocking socket, marked with the class."""
        writer = hasattr(sink, "drain")
        await self.mark(sink)
        self._note(sink, 0)
        if writer:
            sink.write(data)
            await sink.drain()
        else:
            await asyncio.get_running_loop().sock_sendall(sink, data)
        self._note(sink, len(data))

    async def mark(self, sink: Any) -> bool:
        """Have the agent set the class of a socket, StreamWriter or transport. True: it has it."""
        sock = _socket_of(sink)
        if sock is None or not self._needs_mark(sock):
            return bool(sock is not None and (self.priority or self.dscp))
        try:
            if not self._ask_mark(sock):
                return False
            await self._connection.wait(self._reply, _has_mark, _MARK_TIMEOUT_S, 0.0)
        except _AgentGoneError:
            return False
        return bool(self._reply and self._reply.marked)

    async def drain(self) -> None:
        """Wait until the bytes have left the host; bounded: a receiver that stalls ends it.

        Loops sleep in whole milliseconds. Up to one millisecond of what is left is therefore waited
        for in turns of the loop, so that the next flow does not find the link idle.
        """
        watch = _Leaving()
        while True:
            pause = self._drain_pause(sum(_pending(sink) for sink in self._sockets), watch)
            if pause is None:
                return
            spin = pause < 1e-3 and time.monotonic() - watch.since < 1e-3
            await asyncio.sleep(0 if spin else max(1e-3, pause))

    async def close(self) -> None:
        """Wait until the bytes have left, then pass the turn on."""
        try:
            if self._drains:
                await self.drain()
        finally:
            self._done()


def _socket_of(sink: Any) -> Any:
    return sink.get_extra_info("socket") if hasattr(sink, "get_extra_info") else sink


def _pending(sink: Any) -> int:
    transport = getattr(sink, "transport", sink if hasattr(sink, "get_extra_info") else None)
    held = 0
    if transport is not None and hasattr(transport, "get_write_buffer_size"):
        held = int(transport.get_write_buffer_size())
    sock = _socket_of(sink)
    return held + (pending_bytes(sock) if sock is not None else 0)


class _Opening:
    """What ``aflows.open`` returns: enter it with ``async with``, or await it."""

    def __init__(self, begin: Callable[[], Awaitable[AsyncFlow]]) -> None:
        self._begin = begin
        self._flow: AsyncFlow | None = None

    def __await__(self) -> Generator[Any, None, AsyncFlow]:
        return self._begin().__await__()

    async def __aenter__(self) -> AsyncFlow:
        self._flow = await self._begin()
        return self._flow

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._flow is not None
        if kind is None:
            await self._flow.close()
        else:
            self._flow.cancel()


class AsyncFlows(_Settings):
    """Flows of asyncio programs. One instance, ``aflows``, is ready to use, in any loop."""

    def __init__(self, path: str | None = None, **settings: Any) -> None:
        super().__init__(path, **settings)
        self._local = threading.local()  # a thread runs one loop at a time

    def open(
        self,
        size: int,
        *,
        peer: PeerLike = None,
        domain: str = "",
        class_hint: int | None = None,
        sock: Any = None,
    ) -> _Opening:
        """As Flows.open; use it with ``async with``. Wrong arguments raise here, at once."""
        flags = _WANTS_MARK if sock is not None else 0
        packet = _open_packet(0, size, domain, sock if peer is None else peer, class_hint, flags)

        def begin() -> Awaitable[AsyncFlow]:
            return self._begin(size, packet, _socket_of(sock) if sock is not None else None)

        return _Opening(begin)

    def close(self) -> None:
        """Leave the agent, for this thread's loop. The next open rejoins."""
        connection: _AsyncConnection | None = getattr(self._local, "connection", None)
        self._local.connection = None
        if connection is not None:
            connection.fail("closed")

    async def _begin(self, size: int, packet: bytes, sock: _Fileno | None) -> AsyncFlow:
        flow = AsyncFlow(size)
        began = time.monotonic()
        try:
            await self._ask(flow, packet, sock)
        except _AgentGoneError as gone:
            flow._failed(gone)
            if gone.counts:
                self._retry().failed(gone.reason)
        flow.waited_s = time.monotonic() - began
        self._count(flow)
        return flow

    async def _ask(self, flow: AsyncFlow, packet: bytes, sock: _Fileno | None) -> None:
        connection = self._connected()
        request, reply = connection.request()
        flow._request = request
        offer = connection.offer(request, reply, flow, packet)
        if offer is not None:
            connection.send_later(_started(packet, request))
            flow._counter = self.degraded
            flow._offered(offer, connection, reply)
            return
        sent = False
        try:
            connection.send(_numbered(packet, request), sock)
            sent = True
            await connection.wait(reply, _has_grant, self._answer_timeout_s, self._max_wait_s)
            grant = _grant_of(reply)
        except BaseException as error:
            connection.forget(request)
            if sent:
                _give_up(connection, request, error)
            raise
        flow._granted(grant, connection, reply)

    def _retry(self) -> _Retry:
        retry: _Retry | None = getattr(self._local, "retry", None)
        if retry is None:
            retry = self._local.retry = _Retry()
        return retry

    def _connected(self) -> _AsyncConnection:
        loop = asyncio.get_running_loop()
        connection: _AsyncConnection | None = getattr(self._local, "connection", None)
        if (
            connection is not None
            and not connection.dead
            and connection.loop is loop
            and connection.pid == os.getpid()
        ):
            return connection
        if connection is not None and connection.loop is not loop:
            connection.fail("closed")  # its loop has ended
        retry = self._retry()
        if retry.holds():
            raise _AgentGoneError(retry.reason, known=True)
        self._local.connection = None
        try:
            connection = _AsyncConnection(self.path, self._hello(), loop)
        except OSError:
            raise _AgentGoneError("absent") from None
        retry.succeeded()
        self._local.connection = connection
        return connection


flows: Final = Flows()
aflows: Final = AsyncFlows()
