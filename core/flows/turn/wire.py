"""The turn protocol's messages between agents and sequencer: fixed structs, network byte order.

Every message starts with its type and its version, one byte each. Names of domains and members
travel once, in Hello; afterwards a domain is its 64-bit id. Ids of a class travel as runs
(class, first id, count). ``decode`` is strict: a wrong length, an unknown type, a value out of its
range, a byte left over raise WireError, and what decodes encodes to the same bytes again.
Byte-exact examples are in docs/wire.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final

from intentd.core.errors import WireError
from intentd.core.flows.policy import MAX_CLASSES

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 16384
MAX_RUNS: Final = 1024  # runs of ids in one message
MAX_IDS: Final = 4096  # ids in one request
MAX_RUN_IDS: Final = 65536  # ids in one run
MAX_BITMAP_BYTES: Final = 128  # 1,024 ids above the floor in one answer
MAX_TEXT_BYTES: Final = 200
MAX_ID: Final = 2**63 - 1

HELLO: Final = 1
REQUEST: Final = 2
HEARTBEAT: Final = 3
PROBE: Final = 4
FINISHED: Final = 5
GOODBYE: Final = 6
WELCOME: Final = 16
TICKETS: Final = 17
STATE: Final = 18
BEAT: Final = 19
EPOCH: Final = 20
ERROR: Final = 21
PAUSE: Final = 22

ERROR_VERSION: Final = 1  # the sender speaks a newer version than this side
ERROR_BUSY: Final = 2  # a bound is reached: ids outstanding, requests in flight
ERROR_DOMAIN: Final = 3  # this sequencer does not serve the domain, or serves too many
ERROR_SUPERSEDED: Final = 4  # another process with this name has registered since
ERROR_LIMIT: Final = 5  # too many members
ERROR_NAME: Final = 6  # the name is not the one this connection may use
ERROR_CODES: Final = (
    ERROR_VERSION,
    ERROR_BUSY,
    ERROR_DOMAIN,
    ERROR_SUPERSEDED,
    ERROR_LIMIT,
    ERROR_NAME,
)

REQUEST_STRUCT: Final = Struct("!BBBHIIQQ")
TICKETS_STRUCT: Final = Struct("!BBBHIQQQQ")
_HELLO_STRUCT: Final = Struct("!BBHIIQQBB")
_HEARTBEAT_STRUCT: Final = Struct("!BBHIIQQ")
_PROBE_STRUCT: Final = Struct("!BBBIQQ")
_FINISHED_STRUCT: Final = Struct("!BBHQQ")
_GOODBYE_STRUCT: Final = Struct("!BBQQ")
_WELCOME_STRUCT: Final = Struct("!BBHIIIIQQ")
_STATE_STRUCT: Final = Struct("!BBBIBQQQQ")
_BEAT_STRUCT: Final = Struct("!BBIQQ")
_EPOCH_STRUCT: Final = Struct("!BBQQ")
_PAUSE_STRUCT: Final = Struct("!BBIIQQ")
_ERROR_STRUCT: Final = Struct("!BBBIQB")
_RUN_STRUCT: Final = Struct("!BBIQ")


def name_id(name: str) -> int:
    """The 64-bit id of a domain's or a member's name: BLAKE2b, 8 bytes, big endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` consecutive ids of a class. announced: the turn passed on, still sending."""

    class_index: int
    first: int
    count: int
    announced: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """A member registers with a domain, and says what it still holds of its last epoch.

    epoch: the one its held ids belong to; 0: it holds nothing. sequence: one counter for Hello and
    Heartbeat, echoed by the answer. acked: every request up to it is answered or given up.
    """

    type: ClassVar[int] = HELLO
    domain: str
    name: str
    boot: int
    epoch: int
    sequence: int
    acked: int
    held: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class TicketRequest:
    """``count`` new ids in a class. A repeat (same number) gets the same ids."""

    type: ClassVar[int] = REQUEST
    domain_id: int
    epoch: int
    class_index: int
    count: int
    number: int
    acked: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Feeds the lease, and states everything the member holds: what is missing has finished."""

    type: ClassVar[int] = HEARTBEAT
    domain_id: int
    epoch: int
    sequence: int
    acked: int
    held: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """Whose turn is it in this class? number: echoed by the answer."""

    type: ClassVar[int] = PROBE
    domain_id: int
    epoch: int
    class_index: int
    number: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The member's ids that finished, or were announced (early FIN)."""

    type: ClassVar[int] = FINISHED
    domain_id: int
    epoch: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The member leaves the domain; all it held has finished."""

    type: ClassVar[int] = GOODBYE
    domain_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """Registered. accepted: what the sequencer still counts of the held ids, in this epoch.

    recover_ms: how long the sequencer goes on collecting what members held before its restart;
    until then it answers no request and no probe.
    """

    type: ClassVar[int] = WELCOME
    domain_id: int
    epoch: int
    sequence: int
    lease_ms: int
    heartbeat_ms: int
    recover_ms: int
    accepted: tuple[Run, ...] = ()


@dataclass(frozen=True, slots=True)
class Tickets:
    """Ids first .. first + count - 1. floor: every id up to it has finished."""

    type: ClassVar[int] = TICKETS
    domain_id: int
    epoch: int
    class_index: int
    first: int
    count: int
    number: int
    floor: int


@dataclass(frozen=True, slots=True)
class State:
    """What the sequencer knows of a class. Bit i of a map (little endian) is id floor + 1 + i.

    issued: the last id given out. finished, lease, announced: disjoint bit maps of what is over
    above the floor: finished for certain; declared over because its holder's lease ran out; passed
    on early and still sending.
    """

    type: ClassVar[int] = STATE
    domain_id: int
    epoch: int
    class_index: int
    number: int
    floor: int
    issued: int
    finished: int = 0
    lease: int = 0
    announced: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a Heartbeat: the lease runs on, counted from when it was sent."""

    type: ClassVar[int] = BEAT
    domain_id: int
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Pause:
    """The sequencer restarts and goes on in this epoch: the lease is lease_ms now, counted from
    when the Hello or Heartbeat with this sequence was sent."""

    type: ClassVar[int] = PAUSE
    domain_id: int
    epoch: int
    sequence: int
    lease_ms: int


@dataclass(frozen=True, slots=True)
class EpochChange:
    """The sequencer does not know the sender in this domain and epoch: say Hello."""

    type: ClassVar[int] = EPOCH
    domain_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Error:
    """A message was refused. number: of the request, sequence or probe it answers; else 0."""

    type: ClassVar[int] = ERROR
    domain_id: int
    code: int
    number: int
    text: str = ""


Message = (
    Hello
    | TicketRequest
    | Heartbeat
    | Probe
    | Finished
    | Goodbye
    | Welcome
    | Tickets
    | State
    | Beat
    | EpochChange
    | Error
    | Pause
)


def encode(message: Message) -> bytes:
    """The bytes of a message; values out of range raise struct.error (a programmer error)."""
    match message:
        case TicketRequest():
            return REQUEST_STRUCT.pack(
                REQUEST,
                VERSION,
                message.class_index,
                message.count,
                message.number,
                message.acked,
                message.domain_id,
                message.epoch,
            )
        case Tickets():
            return TICKETS_STRUCT.pack(
                TICKETS,
                VERSION,
                message.class_index,
                message.count,
                message.number,
                message.domain_id,
                message.epoch,
                message.first,
                message.floor,
            )
        case Hello():
            domain, name = message.domain.encode(), message.name.encode()
            head = _HELLO_STRUCT.pack(
                HELLO,
                VERSION,
                len(message.held),
                message.sequence,
                message.acked,
                message.boot,
                message.epoch,
                len(domain),
                len(name),
            )
            return b"".join((head, domain, name, _runs_bytes(message.held)))
        case Heartbeat():
            head = _HEARTBEAT_STRUCT.pack(
                HEARTBEAT,
                VERSION,
                len(message.held),
                message.sequence,
                message.acked,
                message.domain_id,
                message.epoch,
            )
            return head + _runs_bytes(message.held)
        case Welcome():
            head = _WELCOME_STRUCT.pack(
                WELCOME,
                VERSION,
                len(message.accepted),
                message.sequence,
                message.lease_ms,
                message.heartbeat_ms,
                message.recover_ms,
                message.domain_id,
                message.epoch,
            )
            return head + _runs_bytes(message.accepted)
        case _:
            return _encode_small(message)


def _encode_small(
    message: Probe | Finished | Goodbye | State | Beat | EpochChange | Error | Pause,
) -> bytes:
    match message:
        case Probe():
            return _PROBE_STRUCT.pack(
                PROBE,
                VERSION,
                message.class_index,
                message.number,
                message.domain_id,
                message.epoch,
            )
        case Finished():
            head = _FINISHED_STRUCT.pack(
                FINISHED, VERSION, len(message.runs), message.domain_id, message.epoch
            )
            return head + _runs_bytes(message.runs)
        case Goodbye():
            return _GOODBYE_STRUCT.pack(GOODBYE, VERSION, message.domain_id, message.epoch)
        case State():
            maps = (message.finished, message.lease, message.announced)
            size = (max(bits.bit_length() for bits in maps) + 7) // 8
            head = _STATE_STRUCT.pack(
                STATE,
                VERSION,
                message.class_index,
                message.number,
                size,
                message.domain_id,
                message.epoch,
                message.floor,
                message.issued,
            )
            return head + b"".join(bits.to_bytes(size, "little") for bits in maps)
        case Beat():
            return _BEAT_STRUCT.pack(
                BEAT, VERSION, message.sequence, message.domain_id, message.epoch
            )
        case Pause():
            return _PAUSE_STRUCT.pack(
                PAUSE, VERSION, message.sequence, message.lease_ms, message.domain_id, message.epoch
            )
        case EpochChange():
            return _EPOCH_STRUCT.pack(EPOCH, VERSION, message.domain_id, message.epoch)
        case Error():
            text = message.text.encode()
            head = _ERROR_STRUCT.pack(
                ERROR, VERSION, message.code, message.number, message.domain_id, len(text)
            )
            return head + text


def decode(frame: bytes) -> Message:
    """The message in a frame. Raises WireError for anything else."""
    if len(frame) < 2:
        raise WireError(f"turn frame: got {len(frame)} bytes, expected type and version")
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError(
            f"turn frame: got {len(frame)} bytes, expected at most {MAX_FRAME_BYTES} bytes"
        )
    parser = _PARSERS.get(frame[0])
    if parser is None:
        raise WireError(f"turn frame type: got {frame[0]}, expected a known type")
    if frame[1] != VERSION:
        kind = "newer than" if frame[1] > VERSION else "older than"
        raise WireError(f"turn frame version: got {frame[1]}, {kind} {VERSION}")
    return parser(frame)


def is_newer(frame: bytes) -> bool:
    """A frame that decode refuses only because its sender speaks a newer version."""
    return len(frame) >= 2 and frame[0] in _PARSERS and frame[1] > VERSION


def _exact(frame: bytes, size: int, what: str) -> None:
    if len(frame) != size:
        raise WireError(f"{what}: got {len(frame)} bytes, expected {size}")


def _at_least(frame: bytes, size: int, what: str) -> None:
    if len(frame) < size:
        raise WireError(f"{what}: got {len(frame)} bytes, expected at least {size}")


def _class(index: int, what: str) -> None:
    if index >= MAX_CLASSES:
        raise WireError(f"{what}.class: got {index}, expected 0 to {MAX_CLASSES - 1}")


def _id(value: int, lowest: int, what: str) -> None:
    if not lowest <= value <= MAX_ID:
        raise WireError(f"{what}: got {value}, expected {lowest} to {MAX_ID}")


def _runs_bytes(runs: tuple[Run, ...]) -> bytes:
    pack = _RUN_STRUCT.pack
    return b"".join(pack(run.class_index, run.announced, run.count, run.first) for run in runs)


def _runs(frame: bytes, offset: int, count: int, what: str) -> tuple[Run, ...]:
    """The runs that fill the frame from offset to its end; ascending, none overlapping."""
    if count > MAX_RUNS:
        raise WireError(f"{what}.runs: got {count}, expected at most {MAX_RUNS}")
    _exact(frame, offset + count * _RUN_STRUCT.size, what)
    runs = []
    last = (-1, 0)
    for class_index, announced, size, first in _RUN_STRUCT.iter_unpack(frame[offset:]):
        _class(class_index, what)
        if announced > 1:
            raise WireError(f"{what}.announced: got {announced}, expected 0 or 1")
        if not 1 <= size <= MAX_RUN_IDS:
            raise WireError(f"{what}.count: got {size}, expected 1 to {MAX_RUN_IDS}")
        _id(first, 1, f"{what}.first")
        _id(first + size - 1, 1, f"{what}.last")
        if (class_index, first) <= last:
            raise WireError(f"{what}.runs: expected ascending runs that do not overlap")
        last = (class_index, first + size - 1)
        runs.append(Run(class_index, first, size, bool(announced)))
    return tuple(runs)


def _text(raw: bytes, what: str, *, empty: bool = False) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise WireError(f"{what}: expected UTF-8") from None
    if (not text and not empty) or not text.isprintable():
        raise WireError(f"{what}: expected printable text")
    return text


def _parse_hello(frame: bytes) -> Hello:
    _at_least(frame, _HELLO_STRUCT.size, "hello")
    _, _, runs, sequence, acked, boot, epoch, domain_len, name_len = _HELLO_STRUCT.unpack_from(
        frame
    )
    start = _HELLO_STRUCT.size
    middle = start + domain_len
    end = middle + name_len
    _at_least(frame, end, "hello")
    domain = _text(frame[start:middle], "hello.domain")
    if len(domain) > 64:
        raise WireError("hello.domain: expected at most 64 characters")
    name = _text(frame[middle:end], "hello.name")
    held = _runs(frame, end, runs, "hello.held")
    return Hello(domain, name, boot, epoch, sequence, acked, held)


def _parse_request(frame: bytes) -> TicketRequest:
    _exact(frame, REQUEST_STRUCT.size, "request")
    _, _, class_index, count, number, acked, domain_id, epoch = REQUEST_STRUCT.unpack(frame)
    _class(class_index, "request")
    if not 1 <= count <= MAX_IDS:
        raise WireError(f"request.count: got {count}, expected 1 to {MAX_IDS}")
    return TicketRequest(domain_id, epoch, class_index, count, number, acked)


def _parse_heartbeat(frame: bytes) -> Heartbeat:
    _at_least(frame, _HEARTBEAT_STRUCT.size, "heartbeat")
    _, _, runs, sequence, acked, domain_id, epoch = _HEARTBEAT_STRUCT.unpack_from(frame)
    held = _runs(frame, _HEARTBEAT_STRUCT.size, runs, "heartbeat.held")
    return Heartbeat(domain_id, epoch, sequence, acked, held)


def _parse_probe(frame: bytes) -> Probe:
    _exact(frame, _PROBE_STRUCT.size, "probe")
    _, _, class_index, number, domain_id, epoch = _PROBE_STRUCT.unpack(frame)
    _class(class_index, "probe")
    return Probe(domain_id, epoch, class_index, number)


def _parse_finished(frame: bytes) -> Finished:
    _at_least(frame, _FINISHED_STRUCT.size, "finished")
    _, _, runs, domain_id, epoch = _FINISHED_STRUCT.unpack_from(frame)
    return Finished(domain_id, epoch, _runs(frame, _FINISHED_STRUCT.size, runs, "finished"))


def _parse_goodbye(frame: bytes) -> Goodbye:
    _exact(frame, _GOODBYE_STRUCT.size, "goodbye")
    _, _, domain_id, epoch = _GOODBYE_STRUCT.unpack(frame)
    return Goodbye(domain_id, epoch)


def _parse_welcome(frame: bytes) -> Welcome:
    _at_least(frame, _WELCOME_STRUCT.size, "welcome")
    _, _, runs, sequence, lease_ms, heartbeat_ms, recover_ms, domain_id, epoch = (
        _WELCOME_STRUCT.unpack_from(frame)
    )
    if not 1 <= heartbeat_ms < lease_ms:
        raise WireError(
            f"welcome.heartbeat_ms: got {heartbeat_ms}, expected 1 to the lease ({lease_ms})"
        )
    accepted = _runs(frame, _WELCOME_STRUCT.size, runs, "welcome.accepted")
    return Welcome(domain_id, epoch, sequence, lease_ms, heartbeat_ms, recover_ms, accepted)


def _parse_tickets(frame: bytes) -> Tickets:
    _exact(frame, TICKETS_STRUCT.size, "tickets")
    _, _, class_index, count, number, domain_id, epoch, first, floor = TICKETS_STRUCT.unpack(frame)
    _class(class_index, "tickets")
    if not 1 <= count <= MAX_IDS:
        raise WireError(f"tickets.count: got {count}, expected 1 to {MAX_IDS}")
    _id(first, 1, "tickets.first")
    _id(first + count - 1, 1, "tickets.last")
    _id(floor, 0, "tickets.floor")
    return Tickets(domain_id, epoch, class_index, first, count, number, floor)


def _parse_state(frame: bytes) -> State:
    start = _STATE_STRUCT.size
    _at_least(frame, start, "state")
    _, _, class_index, number, size, domain_id, epoch, floor, issued = _STATE_STRUCT.unpack_from(
        frame
    )
    _class(class_index, "state")
    if size > MAX_BITMAP_BYTES:
        raise WireError(f"state.bitmap: got {size} bytes, expected at most {MAX_BITMAP_BYTES}")
    _exact(frame, start + 3 * size, "state")
    _id(issued, 0, "state.issued")
    _id(floor, 0, "state.floor")
    maps = [
        int.from_bytes(frame[start + i * size : start + (i + 1) * size], "little") for i in range(3)
    ]
    if floor > issued or max(bits.bit_length() for bits in maps) > issued - floor:
        raise WireError("state: expected no id finished that was not issued")
    if maps[0] & maps[1] or maps[0] & maps[2] or maps[1] & maps[2]:
        raise WireError("state: expected disjoint bit maps")
    if size and not any(bits >> (8 * (size - 1)) for bits in maps):
        raise WireError("state.bitmap: expected no empty last byte")
    return State(domain_id, epoch, class_index, number, floor, issued, *maps)


def _parse_beat(frame: bytes) -> Beat:
    _exact(frame, _BEAT_STRUCT.size, "beat")
    _, _, sequence, domain_id, epoch = _BEAT_STRUCT.unpack(frame)
    return Beat(domain_id, epoch, sequence)


def _parse_epoch(frame: bytes) -> EpochChange:
    _exact(frame, _EPOCH_STRUCT.size, "epoch")
    _, _, domain_id, epoch = _EPOCH_STRUCT.unpack(frame)
    return EpochChange(domain_id, epoch)


def _parse_pause(frame: bytes) -> Pause:
    _exact(frame, _PAUSE_STRUCT.size, "pause")
    _, _, sequence, lease_ms, domain_id, epoch = _PAUSE_STRUCT.unpack(frame)
    return Pause(domain_id, epoch, sequence, lease_ms)


def _parse_error(frame: bytes) -> Error:
    start = _ERROR_STRUCT.size
    _at_least(frame, start, "error")
    _, _, code, number, domain_id, size = _ERROR_STRUCT.unpack_from(frame)
    if code not in ERROR_CODES:
        raise WireError(f"error.code: got {code}, expected one of {ERROR_CODES}")
    if size > MAX_TEXT_BYTES:
        raise WireError(f"error.text: got {size} bytes, expected at most {MAX_TEXT_BYTES}")
    _exact(frame, start + size, "error")
    return Error(domain_id, code, number, _text(frame[start:], "error.text", empty=True))


_PARSERS: Final[dict[int, Callable[[bytes], Message]]] = {
    HELLO: _parse_hello,
    REQUEST: _parse_request,
    HEARTBEAT: _parse_heartbeat,
    PROBE: _parse_probe,
    FINISHED: _parse_finished,
    GOODBYE: _parse_goodbye,
    WELCOME: _parse_welcome,
    TICKETS: _parse_tickets,
    STATE: _parse_state,
    BEAT: _parse_beat,
    EPOCH: _parse_epoch,
    ERROR: _parse_error,
    PAUSE: _parse_pause,
}
