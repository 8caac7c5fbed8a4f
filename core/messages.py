"""The control plane's messages: what members and controller say to each other.

Frozen dataclasses, one per meaning. ``to_plain`` and ``from_plain`` turn them into lists and maps
of plain types; the kit packs those with msgpack. On the wire a message is the list
``[type, version, body]``: type is the short name below, version a number that grows when a body
changes its meaning. A receiver refuses a version newer than its own and unknown fields, by name.
The byte-exact examples are in docs/wire.md.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

from intentd.core.errors import WireError

VERSION: Final = 1
MAX_TEXT: Final = 4096
MAX_REASONS: Final = 8  # why a member is not ready, in a report
MAX_NUMBER: Final = 2**53  # eras, numbers and sequences stay exact in JSON
ROLES: Final = ("agent", "sequencer", "controller", "gpu", "proxy")
APPLICATIONS: Final = ("flows", "jobs", "prompts")


@dataclass(frozen=True, slots=True)
class Hello:
    """A member's first message, and again after every reconnection.

    boot: random 64-bit hex of this process. policies: application -> [era, number] it runs.
    capabilities: plain facts such as {"domains": [...], "shapes": true}.
    """

    role: str
    host: str
    name: str
    version: str
    boot: str
    policies: dict[str, list[int]] = field(default_factory=dict)
    capabilities: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What a member measured since its last report.

    sequence grows by one a report within a boot, so that repeats are recognised.
    body: per application, for example {"flows": {domain: {...}}}.
    """

    boot: str
    sequence: int
    policies: dict[str, list[int]] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NumberedPolicy:
    """A whole policy. (era, number) orders policies of one application; larger wins."""

    application: str
    era: int
    number: int
    issued_wall_s: float
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PolicyAck:
    """What became of a policy: applied, or refused with the reason; old stays when refused."""

    application: str
    era: int
    number: int
    applied: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The controller's answer to Hello: who it is, and how often to report."""

    controller: str
    boot: str
    report_interval_s: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """The controller's answer to something it cannot accept, e.g. a newer version."""

    reason: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    """A member leaves on purpose."""

    boot: str


@dataclass(frozen=True, slots=True)
class Question:
    """The controller asks a member for what reports do not carry: lists, previews, an answer.

    Only members that announce ``{"answers": true}`` are asked. subject: as in docs/wire.md.
    """

    number: int
    subject: str
    body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """A member's answer to the question of that number; error: why there is none."""

    number: int
    body: dict[str, Any] = field(default_factory=dict)
    error: str = ""


Message = (
    Hello | Report | NumberedPolicy | PolicyAck | Welcome | Refusal | Goodbye | Question | Answer
)

_TYPES: Final[dict[str, type[Any]]] = {
    "hello": Hello,
    "report": Report,
    "policy": NumberedPolicy,
    "ack": PolicyAck,
    "welcome": Welcome,
    "refusal": Refusal,
    "goodbye": Goodbye,
    "question": Question,
    "answer": Answer,
}
_NAMES: Final = {cls: name for name, cls in _TYPES.items()}


def to_plain(message: Message) -> list[Any]:
    """``[type, version, body]`` of plain types."""
    body = {f.name: getattr(message, f.name) for f in fields(message)}
    return [_NAMES[type(message)], VERSION, body]


def from_plain(plain: object) -> Message:
    """Inverse of to_plain for untrusted input. Raises WireError naming what is wrong."""
    if not isinstance(plain, (list, tuple)) or len(plain) != 3:
        raise WireError("message: expected [type, version, body]")
    name, version, body = plain
    if not isinstance(name, str) or name not in _TYPES:
        raise WireError(f"message type: got {name!r:.80}, expected one of {', '.join(_TYPES)}")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise WireError(f"message version: got {version!r:.80}, expected an integer >= 1")
    if version > VERSION:
        raise WireError(
            f"message version: got {version}, newer than {VERSION}: upgrade this member"
        )
    if not isinstance(body, dict):
        raise WireError(f"{name}: expected a map of fields")
    cls = _TYPES[name]
    known = {f.name: f for f in fields(cls)}
    for key in body:
        if key not in known:
            raise WireError(f"{name}.{key!s:.80}: unknown field")
    for key, spec in known.items():
        if key in body:
            _check(f"{name}.{key}", str(spec.type), body[key])
        elif spec.default is MISSING and spec.default_factory is MISSING:
            raise WireError(f"{name}.{key}: missing")
    message: Message = cls(**body)
    if isinstance(message, Hello) and message.role not in ROLES:
        raise WireError(f"hello.role: got {message.role!r:.80}, expected one of {', '.join(ROLES)}")
    if isinstance(message, (NumberedPolicy, PolicyAck)) and (
        message.application not in APPLICATIONS
        or not 0 <= message.era <= MAX_NUMBER
        or not 0 <= message.number <= MAX_NUMBER
    ):
        raise WireError(f"{name}: expected a known application and era, number of 0 to 2^53")
    return message


def _check(where: str, kind: str, value: object) -> None:
    if kind == "str":
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise WireError(f"{where}: expected text of at most {MAX_TEXT} characters")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise WireError(f"{where}: expected true or false")
    elif kind == "int":
        if isinstance(value, bool) or not isinstance(value, int):
            raise WireError(f"{where}: expected an integer")
    elif kind == "float":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise WireError(f"{where}: expected a number")
    elif kind == "dict[str, list[int]]":
        _check_numbers(where, value)
    elif not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"{where}: expected a map with text keys")


def _check_numbers(where: str, value: object) -> None:
    """A map application -> [era, number]."""
    holds = isinstance(value, dict) and all(
        key in APPLICATIONS
        and isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(type(part) is int and 0 <= part <= MAX_NUMBER for part in pair)
        for key, pair in value.items()
    )
    if not holds:
        raise WireError(f"{where}: expected a map application -> [era, number]")
