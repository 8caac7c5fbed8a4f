"""The application protocol: what a program says to its host's agent, as bytes.

One message is one packet of a SOCK_SEQPACKET Unix socket: a fixed header, then a fixed body by
type, network byte order, no padding of the compiler's. ``docs/wire.md`` has the byte-exact
examples. This module is pure: bytes in, messages out. A packet that is not a message raises
ProtocolError, which knows the ERROR packet to send back; it never costs the connection.

``request`` is the application's own number for a flow on its connection; the agent's number, known
host-wide and to ``explain``, comes back as ``flow``.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, NamedTuple

from intentd.core.errors import WireError

MAGIC: Final = 0x4941  # "IA"
VERSION: Final = 1
MAX_PACKET: Final = 512
MAX_NAME: Final = 64  # bytes of a domain or application name, zero padded
MAX_TEXT: Final = 400  # bytes of an ERROR's text
NO_CLASS: Final = 0xFFFF
MAX_SIZE_BYTES: Final = 2**62

HELLO: Final = 1
WELCOME: Final = 2
OPEN: Final = 3
GRANT: Final = 4
QUEUED: Final = 5
ANNOUNCE: Final = 6
DONE: Final = 7
CANCEL: Final = 8
MARK: Final = 9
MARKED: Final = 10
ERROR: Final = 11
STATS: Final = 12
STATS_REPLY: Final = 13
PAUSE: Final = 14

# OPEN flags
WANTS_MARK: Final = 1  # one socket rides along (SCM_RIGHTS): mark it with the flow's class
MARK_ONLY: Final = 2  # no gate, no flow: classify, mark the socket, answer MARKED
STARTED: Final = 4  # the flow sends already: the board showed its class free
# GRANT flags
GRANT_MARKED: Final = 1  # the socket that came with OPEN carries this class's mark
GRANT_SHAPED: Final = 2  # the domain's device shares its link by class weight
# WELCOME flags
WELCOME_SHAPES: Final = 1
WELCOME_MARKS: Final = 2
WELCOME_BOARD: Final = 4  # the board's descriptor rides along (SCM_RIGHTS)

# The board (agent/board.py)
BOARD_MAGIC: Final = 0x49414244  # "IABD"
BOARD_VERSION: Final = 1

# Why a flow starts now: "" in its turn; the others start outside the guaranteed order.
REASONS: Final = (
    "", "timeout", "lease", "fallback", "early_fin", "policy", "no_domain", "raced",
)  # fmt: skip
REASON_CODES: Final = {reason: code for code, reason in enumerate(REASONS)}

# ERROR codes
E_MALFORMED: Final = 1  # not a packet of this protocol
E_VERSION: Final = 2  # a newer version
E_VALUE: Final = 3  # a field's value is out of range
E_UNKNOWN: Final = 4  # no such domain, class or request
E_LIMIT: Final = 5  # a bound of the agent is reached
E_SOCKET: Final = 6  # the passed descriptor cannot be marked
E_STOPPING: Final = 7  # the agent is leaving: send at once

_HEADER: Final = struct.Struct("!HBBI")
_HELLO: Final = struct.Struct("!64s")
_WELCOME: Final = struct.Struct("!QII")
_OPEN: Final = struct.Struct("!HHB3sq16s64s")
_GRANT: Final = struct.Struct("!QHBBHHIIQ")
_QUEUED: Final = struct.Struct("!QHHII")
_ANNOUNCE: Final = struct.Struct("!Q")
_DONE: Final = struct.Struct("!QQQ")
_MARKED: Final = struct.Struct("!HBBI")
_ERROR: Final = struct.Struct("!HH")
_STATS: Final = struct.Struct("!64s")
_STATS_REPLY: Final = struct.Struct("!QQQIIII")
_PAUSE: Final = struct.Struct("!I")

HEADER_BYTES: Final = _HEADER.size
_OPEN_FLAGS: Final = (0, WANTS_MARK, WANTS_MARK | MARK_ONLY, STARTED)
_RESERVED: Final = bytes(3)
_EMPTY_NAME: Final = bytes(MAX_NAME)
_EMPTY_PEER: Final = bytes(16)
_ADDRESSES: Final = 1024  # peers whose text is remembered

NAMES: Final = {
    HELLO: "HELLO",
    WELCOME: "WELCOME",
    OPEN: "OPEN",
    GRANT: "GRANT",
    QUEUED: "QUEUED",
    ANNOUNCE: "ANNOUNCE",
    DONE: "DONE",
    CANCEL: "CANCEL",
    MARK: "MARK",
    MARKED: "MARKED",
    ERROR: "ERROR",
    STATS: "STATS",
    STATS_REPLY: "STATS_REPLY",
    PAUSE: "PAUSE",
}


class ProtocolError(WireError):
    """A packet is refused; ``packet()`` is the ERROR that says so to its sender."""

    def __init__(self, code: int, field: str, value: object, expected: str, request: int = 0):
        self.code = code
        self.field = field
        self.request = request
        super().__init__(f"{field}: got {_short(value)}, expected {expected}")

    def packet(self) -> bytes:
        return encode_error(self.request, self.code, str(self))


def _short(value: object) -> str:
    """A value as text for people, bounded: it came from outside."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True)
class Hello:
    """The application introduces itself; optional. name: for people, in `flows` and `explain`."""

    request: int
    name: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """boot: the agent's random number of this run. max_flows: open flows a connection may have."""

    request: int
    boot: int
    flags: int
    max_flows: int


class Open(NamedTuple):  # a tuple, as Done is: one of each a flow, cheaper than a dataclass
    """Ask for a turn. domain "" : by peer, else the agent's default domain.

    peer: textual IP address or "". class_hint: a class index, NO_CLASS: by size.
    """

    request: int
    size_bytes: int
    domain: str = ""
    peer: str = ""
    class_hint: int = NO_CLASS
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """The flow may send now. reason: one of REASONS; "" is in order.

    early_fin_bytes: announce when so many bytes are left to leave the host (0: do not).
    rate_bps: capacity of the domain's link, to estimate when the last byte leaves.
    """

    request: int
    flow: int
    class_index: int
    dscp: int = 0
    reason: str = ""
    flags: int = 0
    priority: int = 0
    early_fin_bytes: int = 0
    rate_bps: int = 0


@dataclass(frozen=True, slots=True)
class Queued:
    """The flow waits; it is granted within max_wait_ms at the latest."""

    request: int
    flow: int
    class_index: int
    ahead: int
    max_wait_ms: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Nearly done: the turn may pass on while the last bytes leave."""

    request: int
    bytes_left: int


class Done(NamedTuple):
    """The flow has left. started_ns, ended_ns: CLOCK_MONOTONIC of first and last byte, or 0."""

    request: int
    bytes_sent: int
    started_ns: int = 0
    ended_ns: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """The flow will not send (any more)."""

    request: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Mark the socket riding along with the class of the open flow ``request``."""

    request: int


@dataclass(frozen=True, slots=True)
class Marked:
    request: int
    class_index: int
    dscp: int
    priority: int


@dataclass(frozen=True, slots=True)
class Error:
    """request 0: the packet's request could not be read, or it concerns the connection."""

    request: int
    code: int
    text: str


@dataclass(frozen=True, slots=True)
class Stats:
    request: int
    domain: str = ""


@dataclass(frozen=True, slots=True)
class StatsReply:
    request: int
    arrivals: int
    finished: int
    degraded: int
    waiting: int
    active: int
    connections: int
    classes: int


FromApplication = Hello | Open | Announce | Done | Cancel | Mark | Stats
FromAgent = Welcome | Grant | Queued | Marked | Error | StatsReply


# -- application -> agent -----------------------------------------------------------------------


def decode_request(packet: bytes) -> FromApplication:
    """The message in a packet of an application. Raises ProtocolError for anything else."""
    length = len(packet)
    if length < HEADER_BYTES:
        raise ProtocolError(
            E_MALFORMED, "packet length", length, f"at least {HEADER_BYTES} bytes (the header)"
        )
    magic, version, kind, request = _HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise ProtocolError(E_MALFORMED, "magic", f"{magic:#06x}", f"{MAGIC:#06x}")
    if version != VERSION:
        expected = f"{VERSION} (this agent speaks no other)"
        raise ProtocolError(E_VERSION, "version", version, expected, request)
    body = _REQUEST_BODIES.get(kind)
    if body is None:
        expected = "HELLO, OPEN, ANNOUNCE, DONE, CANCEL, MARK or STATS"
        raise ProtocolError(E_MALFORMED, "type", NAMES.get(kind, kind), expected, request)
    if length != HEADER_BYTES + body:
        raise ProtocolError(
            E_MALFORMED,
            f"{NAMES[kind]} packet length",
            length,
            f"{HEADER_BYTES + body} bytes",
            request,
        )
    if kind == OPEN:
        return _decode_open(packet, request)
    if kind == DONE:
        sent, started, ended = _DONE.unpack_from(packet, HEADER_BYTES)
        if sent > MAX_SIZE_BYTES:
            raise _too_many("DONE.bytes_sent", sent, request)
        return Done(request, sent, started, ended)
    if kind == ANNOUNCE:
        (left,) = _ANNOUNCE.unpack_from(packet, HEADER_BYTES)
        if left > MAX_SIZE_BYTES:
            raise _too_many("ANNOUNCE.bytes_left", left, request)
        return Announce(request, left)
    if kind == CANCEL:
        return Cancel(request)
    if kind == MARK:
        return Mark(request)
    if kind == HELLO:
        (raw,) = _HELLO.unpack_from(packet, HEADER_BYTES)
        return Hello(request, _name("HELLO.name", raw, request))
    (raw,) = _STATS.unpack_from(packet, HEADER_BYTES)
    return Stats(request, _name("STATS.domain", raw, request))


_REQUEST_BODIES: Final = {
    HELLO: _HELLO.size,
    OPEN: _OPEN.size,
    ANNOUNCE: _ANNOUNCE.size,
    DONE: _DONE.size,
    CANCEL: 0,
    MARK: 0,
    STATS: _STATS.size,
}


def _decode_open(packet: bytes, request: int) -> Open:
    flags, hint, family, reserved, size, peer, domain = _OPEN.unpack_from(packet, HEADER_BYTES)
    if not 0 <= size <= MAX_SIZE_BYTES:
        expected = "bytes from 0 to 2**62 (every flow states its size)"
        raise ProtocolError(E_VALUE, "OPEN.size_bytes", size, expected, request)
    if flags not in _OPEN_FLAGS:
        unknown = flags & ~(WANTS_MARK | MARK_ONLY | STARTED)
        expected = "bits 0 to 2 only" if unknown else "bit 1 only with bit 0, bit 2 alone"
        raise ProtocolError(E_VALUE, "OPEN.flags", flags, expected, request)
    if reserved != _RESERVED:
        raise ProtocolError(E_VALUE, "OPEN.reserved", reserved, "zeros", request)
    name = "" if domain == _EMPTY_NAME else _name("OPEN.domain", domain, request)
    if family == 0:
        if peer != _EMPTY_PEER:
            raise ProtocolError(E_VALUE, "OPEN.peer", peer, "zeros when family is 0", request)
        address = ""
    elif family == 4:
        if peer[4:] != _EMPTY_PEER[4:]:
            raise ProtocolError(E_VALUE, "OPEN.peer", peer, "4 bytes, then zeros", request)
        address = _address(peer[:4])
    elif family == 6:
        address = _address(peer)
    else:
        raise ProtocolError(E_VALUE, "OPEN.family", family, "0 (no peer), 4 or 6", request)
    return Open(request, size, name, address, hint, flags)


@lru_cache(maxsize=_ADDRESSES)  # a host has few peers; the text costs more than all else in OPEN
def _address(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


def _too_many(field: str, value: int, request: int) -> ProtocolError:
    return ProtocolError(E_VALUE, field, value, "bytes from 0 to 2**62", request)


def _name(field: str, raw: bytes, request: int) -> str:
    text, _, rest = raw.partition(b"\0")
    if rest.strip(b"\0"):
        raise ProtocolError(E_VALUE, field, raw, "text, then zeros to the end", request)
    try:
        name = text.decode()
    except UnicodeDecodeError:
        raise ProtocolError(E_VALUE, field, text, "UTF-8 text", request) from None
    if not name.isprintable():
        raise ProtocolError(E_VALUE, field, name, "printable text", request)
    return name


def _pack_name(name: str) -> bytes:
    raw = name.encode()
    if len(raw) > MAX_NAME:
        raise ValueError(f"name: got {name!r:.80}, expected at most {MAX_NAME} bytes of UTF-8")
    return raw


def encode_hello(request: int, name: str) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, HELLO, request) + _HELLO.pack(_pack_name(name))


def encode_open(message: Open) -> bytes:
    if not message.peer:
        family, peer = 0, b""
    else:
        address = ipaddress.ip_address(message.peer)
        family, peer = address.version, address.packed
    return _HEADER.pack(MAGIC, VERSION, OPEN, message.request) + _OPEN.pack(
        message.flags,
        message.class_hint,
        family,
        _RESERVED,
        message.size_bytes,
        peer,
        _pack_name(message.domain),
    )


def encode_announce(request: int, bytes_left: int) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, ANNOUNCE, request) + _ANNOUNCE.pack(bytes_left)


def encode_done(request: int, bytes_sent: int, started_ns: int = 0, ended_ns: int = 0) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, DONE, request) + _DONE.pack(
        bytes_sent, started_ns, ended_ns
    )


def encode_cancel(request: int) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, CANCEL, request)


def encode_mark(request: int) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, MARK, request)


def encode_stats(request: int, domain: str = "") -> bytes:
    return _HEADER.pack(MAGIC, VERSION, STATS, request) + _STATS.pack(_pack_name(domain))


# -- agent -> application -----------------------------------------------------------------------


def encode_welcome(request: int, boot: int, flags: int, max_flows: int) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, WELCOME, request) + _WELCOME.pack(boot, flags, max_flows)


def encode_pause(longest_ms: int) -> bytes:
    """The agent restarts and takes this connection along: it answers again within longest_ms."""
    return _HEADER.pack(MAGIC, VERSION, PAUSE, 0) + _PAUSE.pack(longest_ms)


_GRANT_PACKET: Final = struct.Struct("!HBBIQHBBH2xIIQ")
# request, flow, class_index, dscp, reason, flags, priority, early_fin_bytes, rate_bps: fields, not
# an object, and no call in between: one a flow, on the agent's hot path.
pack_grant: Final[Callable[[int, int, int, int, int, int, int, int, int], bytes]] = partial(
    _GRANT_PACKET.pack, MAGIC, VERSION, GRANT
)


def encode_grant(message: Grant) -> bytes:
    return pack_grant(
        message.request,
        message.flow,
        message.class_index,
        message.dscp,
        REASON_CODES[message.reason],
        message.flags,
        message.priority,
        message.early_fin_bytes,
        message.rate_bps,
    )


def encode_queued(message: Queued) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, QUEUED, message.request) + _QUEUED.pack(
        message.flow, message.class_index, 0, message.ahead, message.max_wait_ms
    )


def encode_marked(message: Marked) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, MARKED, message.request) + _MARKED.pack(
        message.class_index, message.dscp, 0, message.priority
    )


def encode_error(request: int, code: int, text: str) -> bytes:
    raw = text.encode("utf-8", "replace")[:MAX_TEXT]
    raw = raw.decode("utf-8", "ignore").encode()  # a cut inside a character drops the character
    return _HEADER.pack(MAGIC, VERSION, ERROR, request) + _ERROR.pack(code, len(raw)) + raw


def encode_stats_reply(message: StatsReply) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, STATS_REPLY, message.request) + _STATS_REPLY.pack(
        message.arrivals,
        message.finished,
        message.degraded,
        message.waiting,
        message.active,
        message.connections,
        message.classes,
    )


_REPLY_BODIES: Final = {
    WELCOME: _WELCOME.size,
    GRANT: _GRANT.size,
    QUEUED: _QUEUED.size,
    MARKED: _MARKED.size,
    STATS_REPLY: _STATS_REPLY.size,
}


def decode_reply(packet: bytes) -> FromAgent:
    """The message in a packet of the agent (for clients in Python and tests). Raises WireError."""
    if len(packet) < HEADER_BYTES:
        raise WireError(f"packet: got {len(packet)} bytes, expected at least {HEADER_BYTES}")
    magic, version, kind, request = _HEADER.unpack_from(packet)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"header: got {packet[:4]!r}, expected magic {MAGIC:#x}, version {VERSION}")
    if kind == ERROR:
        return _decode_error(packet, request)
    body = _REPLY_BODIES.get(kind)
    if body is None or len(packet) != HEADER_BYTES + body:
        raise WireError(f"type {kind} of {len(packet)} bytes: expected a packet of an agent")
    if kind == GRANT:
        flow, index, dscp, reason, flags, _, priority, early, rate = _GRANT.unpack_from(
            packet, HEADER_BYTES
        )
        if reason >= len(REASONS):
            raise WireError(f"GRANT.reason: got {reason}, expected 0 to {len(REASONS) - 1}")
        return Grant(request, flow, index, dscp, REASONS[reason], flags, priority, early, rate)
    if kind == QUEUED:
        flow, index, _, ahead, wait = _QUEUED.unpack_from(packet, HEADER_BYTES)
        return Queued(request, flow, index, ahead, wait)
    if kind == WELCOME:
        return Welcome(request, *_WELCOME.unpack_from(packet, HEADER_BYTES))
    if kind == MARKED:
        index, dscp, _, priority = _MARKED.unpack_from(packet, HEADER_BYTES)
        return Marked(request, index, dscp, priority)
    return StatsReply(request, *_STATS_REPLY.unpack_from(packet, HEADER_BYTES))


def _decode_error(packet: bytes, request: int) -> Error:
    start = HEADER_BYTES + _ERROR.size
    if len(packet) < start:
        raise WireError(f"ERROR: got {len(packet)} bytes, expected at least {start}")
    code, length = _ERROR.unpack_from(packet, HEADER_BYTES)
    if len(packet) != start + length or length > MAX_TEXT:
        raise WireError(f"ERROR.length: got {length}, expected {len(packet) - start}")
    return Error(request, code, packet[start:].decode("utf-8", "replace"))
