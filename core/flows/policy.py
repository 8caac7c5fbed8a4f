"""What a flow policy says: the whole, numbered, immutable instruction for one link domain.

The controller issues it, agents enforce it, gate and simulator are driven by it. It imports
neither numpy nor anything with I/O: agents keep it on their path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.errors import PolicyError

MAX_CLASSES: Final = 64
MAX_DOMAINS: Final = 256
UNLIMITED: Final = 0  # multiplexing level of a class without a gate
HANDOVER_S: Final = 0.25  # above TCP's least retransmission timeout (200 ms on Linux)

ORDERS: Final = ("fifo", "boost", "sjf")
SEQUENCING: Final = ("local", "global")
TURN_MODES: Final = ("hybrid", "centralised", "decentralised")
DISPATCH: Final = ("size", "empty_class")


@dataclass(frozen=True, slots=True)
class ClassPolicy:
    """One size class of a domain.

    threshold_bytes: the class takes flows of size <= threshold; the last class has infinity.
    weight: share of the link among busy classes, in (0, 1]; a domain's weights sum to 1.
    mpl: multiplexing level, flows that may send at a time; 0 (UNLIMITED): no gate.
    order: key of the queue: "fifo" arrival; "boost" arrival - b(size) with boost_gamma_per_s;
        "sjf" size.
    sequencing: "global" flows take a ticket from the domain's sequencer, "local" ones do not.
    dscp: 0-63, the mark of the class. priority: 0 shares by weight; a strict-priority policy
        (PIAS) numbers its classes 0, 1, ... and smaller goes first.
    """

    threshold_bytes: float
    weight: float
    mpl: int = 1
    order: str = "fifo"
    boost_gamma_per_s: float = 0.0
    sequencing: str = "local"
    dscp: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class DomainPolicy:
    """The policy of one link domain. Validated on construction; raises PolicyError.

    rate_bps: capacity of the link. name: the policy family ("2d", "2d-boost", "ps", ...).
    dispatch: "size" by threshold; "empty_class" small flows (class 0) by threshold, the others
        to the first class without work (Baraat FIFO-LM).
    max_wait_s: a flow that waited longer is released, marked degraded.
    batch_bytes: bytes that may ride on one waiting ticket (0: no batching).
    early_fin_bytes: the turn is announced when this much is left to send (0: at the end); it then
        leaves while the next flow starts (hand-over).
    local_below_bytes: flows up to this size (one bandwidth-delay product) skip global order.
    """

    domain: str
    rate_bps: float
    classes: tuple[ClassPolicy, ...]
    name: str = "2d"
    dispatch: str = "size"
    turn_mode: str = "hybrid"
    max_wait_s: float = 30.0
    batch_bytes: int = 0
    early_fin_bytes: int = 0
    local_below_bytes: int = 0

    def __post_init__(self) -> None:
        _check_domain(self)

    def class_of(self, size_bytes: float) -> int:
        """Index of the first class with size <= threshold. size_bytes >= 0."""
        for index, cls in enumerate(self.classes):
            if size_bytes <= cls.threshold_bytes:
                return index
        return len(self.classes) - 1

    @property
    def handover_s(self) -> float:
        """How long a flow that announced its end may go on: its last bytes at the rate that the
        smallest class is sure of, and as long as a lost packet takes to be noticed."""
        smallest = min(cls.weight for cls in self.classes)
        return HANDOVER_S + self.early_fin_bytes * 8 / (smallest * self.rate_bps)


@dataclass(frozen=True, slots=True)
class FlowsPolicy:
    """All domains together: the body of a numbered policy of the flows application."""

    domains: tuple[DomainPolicy, ...] = field(default=())

    def __post_init__(self) -> None:
        if len(self.domains) > MAX_DOMAINS:
            raise PolicyError("domains", len(self.domains), f"at most {MAX_DOMAINS} domains")
        seen: set[str] = set()
        for index, domain in enumerate(self.domains):
            if domain.domain in seen:
                raise PolicyError(f"domains[{index}].domain", domain.domain, "a name used once")
            seen.add(domain.domain)

    def domain(self, name: str) -> DomainPolicy | None:
        return next((d for d in self.domains if d.domain == name), None)


def _check_domain(policy: DomainPolicy) -> None:
    def refuse(where: str, value: object, expected: str) -> None:
        raise PolicyError(where, value, expected)

    if not policy.domain or len(policy.domain) > 64 or not policy.domain.isprintable():
        refuse("domain", policy.domain, "a printable name of 1-64 characters")
    if not (math.isfinite(policy.rate_bps) and policy.rate_bps > 0):
        refuse("rate_bps", policy.rate_bps, "a finite number > 0")
    if policy.dispatch not in DISPATCH:
        refuse("dispatch", policy.dispatch, f"one of {', '.join(DISPATCH)}")
    if policy.turn_mode not in TURN_MODES:
        refuse("turn_mode", policy.turn_mode, f"one of {', '.join(TURN_MODES)}")
    if not (math.isfinite(policy.max_wait_s) and policy.max_wait_s > 0):
        refuse("max_wait_s", policy.max_wait_s, "a finite number of seconds > 0")
    for name in ("batch_bytes", "early_fin_bytes", "local_below_bytes"):
        if getattr(policy, name) < 0:
            refuse(name, getattr(policy, name), "a number of bytes >= 0")
    if not 1 <= len(policy.classes) <= MAX_CLASSES:
        refuse("classes", len(policy.classes), f"1 to {MAX_CLASSES} classes")
    previous = -1.0
    for index, cls in enumerate(policy.classes):
        _check_class(cls, f"classes[{index}]")
        if policy.dispatch == "size" and not cls.threshold_bytes > previous:
            refuse(
                f"classes[{index}].threshold_bytes",
                cls.threshold_bytes,
                f"more than the class before it ({previous:g})",
            )
        previous = cls.threshold_bytes
    if previous != math.inf:
        refuse(
            f"classes[{len(policy.classes) - 1}].threshold_bytes", previous, "infinity (last class)"
        )
    total = math.fsum(cls.weight for cls in policy.classes)
    if abs(total - 1.0) > 1e-6:
        refuse("classes[*].weight", round(total, 9), "weights that sum to 1")


def _check_class(cls: ClassPolicy, where: str) -> None:
    checks: tuple[tuple[str, bool, str], ...] = (
        ("threshold_bytes", cls.threshold_bytes >= 0, "bytes >= 0"),
        ("weight", 0 < cls.weight <= 1, "a share in (0, 1]"),
        ("mpl", 0 <= cls.mpl <= 65535, "0 (no gate) to 65535"),
        ("order", cls.order in ORDERS, f"one of {', '.join(ORDERS)}"),
        ("sequencing", cls.sequencing in SEQUENCING, f"one of {', '.join(SEQUENCING)}"),
        ("dscp", 0 <= cls.dscp <= 63, "0 to 63"),
        ("priority", 0 <= cls.priority <= 7, "0 to 7 (HTB has eight)"),
        (
            "boost_gamma_per_s",
            math.isfinite(cls.boost_gamma_per_s)
            and (cls.boost_gamma_per_s > 0 if cls.order == "boost" else cls.boost_gamma_per_s >= 0),
            "a finite number, > 0 where order is boost",
        ),
    )
    for name, holds, expected in checks:
        if not holds:
            raise PolicyError(f"{where}.{name}", getattr(cls, name), expected)


def domain_to_plain(policy: DomainPolicy) -> dict[str, Any]:
    """As JSON-ready types; infinity is None, as in the command outputs."""
    plain: dict[str, Any] = {
        name: getattr(policy, name) for name in policy.__slots__ if name != "classes"
    }
    plain["classes"] = [
        {
            name: None if getattr(cls, name) == math.inf else getattr(cls, name)
            for name in cls.__slots__
        }
        for cls in policy.classes
    ]
    return plain


def domain_from_plain(plain: object, where: str = "domain") -> DomainPolicy:
    """The inverse, for anything that came from outside: every field is checked.

    Raises PolicyError naming the path, for unknown, missing, ill-typed and ill-valued fields.
    """
    table = _table(plain, where, DomainPolicy.__slots__, required=("domain", "rate_bps", "classes"))
    rows = table.get("classes")
    if not isinstance(rows, (list, tuple)):
        raise PolicyError(f"{where}.classes", rows, "a list of classes")
    if len(rows) > MAX_CLASSES:
        raise PolicyError(f"{where}.classes", len(rows), f"1 to {MAX_CLASSES} classes")
    classes = []
    for index, row in enumerate(rows):
        at = f"{where}.classes[{index}]"
        fields = _table(row, at, ClassPolicy.__slots__, required=("threshold_bytes", "weight"))
        if fields["threshold_bytes"] is None:
            fields["threshold_bytes"] = math.inf
        _check_types(fields, _CLASS_TYPES, at)
        classes.append(ClassPolicy(**fields))
    table["classes"] = tuple(classes)
    _check_types(table, _DOMAIN_TYPES, where)
    try:
        return DomainPolicy(**table)
    except PolicyError as error:
        raise PolicyError(f"{where}.{error.field}", error.value, error.expected) from None


def flows_to_plain(policy: FlowsPolicy) -> dict[str, Any]:
    return {"domains": [domain_to_plain(domain) for domain in policy.domains]}


def flows_from_plain(plain: object) -> FlowsPolicy:
    """Inverse of flows_to_plain for untrusted input. Raises PolicyError."""
    table = _table(plain, "policy", ("domains",), required=("domains",))
    rows = table["domains"]
    if not isinstance(rows, (list, tuple)) or len(rows) > MAX_DOMAINS:
        raise PolicyError("policy.domains", rows, f"a list of at most {MAX_DOMAINS} domains")
    return FlowsPolicy(
        tuple(domain_from_plain(row, f"domains[{index}]") for index, row in enumerate(rows))
    )


_CLASS_TYPES: Final = {
    "threshold_bytes": float,
    "weight": float,
    "mpl": int,
    "order": str,
    "boost_gamma_per_s": float,
    "sequencing": str,
    "dscp": int,
    "priority": int,
}
_DOMAIN_TYPES: Final = {
    "domain": str,
    "rate_bps": float,
    "name": str,
    "dispatch": str,
    "turn_mode": str,
    "max_wait_s": float,
    "batch_bytes": int,
    "early_fin_bytes": int,
    "local_below_bytes": int,
}


def _table(
    plain: object, where: str, known: tuple[str, ...], required: tuple[str, ...]
) -> dict[str, Any]:
    if not isinstance(plain, Mapping):
        raise PolicyError(where, plain, "a table")
    for name in plain:
        if name not in known:
            raise PolicyError(f"{where}.{name}", plain[name], f"one of {', '.join(known)}")
    for name in required:
        if name not in plain:
            raise PolicyError(f"{where}.{name}", None, "a value (it is required)")
    return dict(plain)


def _check_types(fields: dict[str, Any], types: Mapping[str, type], where: str) -> None:
    for name, value in fields.items():
        expected = types.get(name)
        if expected is None:
            continue
        accepted = (int, float) if expected is float else (expected,)
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise PolicyError(f"{where}.{name}", value, f"a value of type {expected.__name__}")
