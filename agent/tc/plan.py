"""What the kernel should hold for a domain's policy, and what must change to get there.

Pure: policies and what was read back go in, a list of changes comes out. One HTB qdisc with a
handle of ours, one root class at the link's rate, under it one leaf for each class of the policy
and one for packets that nobody marked.

Rates follow the weights, and so do quanta: HTB shares *idle* bandwidth by quantum, not by rate
(sch_htb's deficit round robin among classes that borrow). With default quanta two active classes
that should have .667/.333 got .574/.426; with these .661/.339 (measured: benchmarks.htb).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from intentd.core.errors import InputError, PolicyError
from intentd.core.flows.policy import DomainPolicy

MAJOR: Final = (
    0x2D17  # our root qdisc; whoever else shapes by hand takes 1: or lets the kernel pick
)
HANDLE: Final = MAJOR << 16
ROOT_MINOR: Final = 0x1
UNMARKED_MINOR: Final = 0x8
FIRST_LEAF_MINOR: Final = 0x10  # class i of the policy has minor 0x10 + i, 64 at most
LAST_LEAF_MINOR: Final = 0x4F
QUEUE_MAJOR: Final = 0x2E00  # the leaf queue of minor m has handle (0x2E00 + m):
FILTER_PREFS: Final = {"ipv4": 10, "ipv6": 11}  # u32 wants one preference per protocol

UNMARKED_SHARE: Final = 0.01
# A strict class lives on what the link has left, in order of priority; this much is its floor.
STRICT_SHARE: Final = 0.001
STRICT_FLOOR_BPS: Final = 64_000

# One GSO packet is up to 64 KB: a smaller quantum lets a class overdraw each round. Above a few
# MB a round takes tens of milliseconds at 1 Gb/s, and its classes lose their short-term share.
QUANTUM_BASE_BYTES: Final = 100_000
QUANTUM_MIN_BYTES: Final = 65_536
QUANTUM_MAX_BYTES: Final = 4_000_000
# Flows up to the burst skip serialisation, so keep it small; but it has to cover the time the
# qdisc's timer may be late.
BURST_MIN_BYTES: Final = 16_000
BURST_TIME_S: Final = 125e-6
QUEUE_PACKETS: Final = 1000
MAX_RATE_BPS: Final = 1e12
MIN_RATE_BPS: Final = 1e6

RATE_TOLERANCE: Final = 1e-3
BURST_TOLERANCE: Final = 0.05  # kept in 64 ns ticks at the class's rate
# What the kernel attaches by itself has handle 0; a qdisc somebody installed never has.
KERNEL_HANDLE: Final = 0


@dataclass(frozen=True, slots=True)
class HtbClass:
    """One HTB class. Rates in bits per second, minor numbers under our major."""

    minor: int
    parent_minor: int
    rate_bps: int
    ceil_bps: int
    burst_bytes: int
    cburst_bytes: int
    quantum_bytes: int
    prio: int


@dataclass(frozen=True, slots=True)
class DscpFilter:
    """Packets of one protocol ("ipv4", "ipv6") with this DSCP go to this class."""

    protocol: str
    dscp: int
    minor: int


@dataclass(frozen=True, slots=True)
class HtbTree:
    """The whole of what a device should hold. classes: the root class first."""

    classes: tuple[HtbClass, ...]
    queue_packets: int
    filters: tuple[DscpFilter, ...]

    @property
    def leaves(self) -> tuple[HtbClass, ...]:
        return tuple(cls for cls in self.classes if cls.minor != ROOT_MINOR)


@dataclass(frozen=True, slots=True)
class SeenClass:
    """A class as the kernel reports it; queue_packets is None where the leaf queue is not ours."""

    shape: HtbClass
    queue_packets: int | None = None
    backlog_packets: int = 0


@dataclass(frozen=True, slots=True)
class SeenFilter:
    """A filter under our qdisc; shape is None where it is none of ours."""

    pref: int
    handle: int
    shape: DscpFilter | None


@dataclass(frozen=True, slots=True)
class SeenTree:
    """What a device holds. kind and handle are those of its root qdisc."""

    kind: str
    handle: int
    default_minor: int = 0
    classes: Mapping[int, SeenClass] = field(default_factory=dict)
    filters: Sequence[SeenFilter] = ()

    @property
    def ours(self) -> bool:
        return self.kind == "htb" and self.handle == HANDLE

    @property
    def foreign(self) -> bool:
        return not self.ours and self.handle != KERNEL_HANDLE


@dataclass(frozen=True, slots=True)
class RemoveRoot:
    """Take our qdisc away with all below it; the kernel attaches its default."""


@dataclass(frozen=True, slots=True)
class InstallRoot:
    """Put our qdisc in; unmarked packets go to UNMARKED_MINOR."""


@dataclass(frozen=True, slots=True)
class PutClass:
    """Add a class, or change it in place."""

    shape: HtbClass
    new: bool


@dataclass(frozen=True, slots=True)
class PutQueue:
    """Give a leaf its queue, or change the queue's limit."""

    minor: int
    limit_packets: int
    new: bool


@dataclass(frozen=True, slots=True)
class PutFilter:
    """Add a DSCP filter."""

    shape: DscpFilter


@dataclass(frozen=True, slots=True)
class DropFilter:
    """Take one of our filters away."""

    protocol: str
    pref: int
    handle: int


@dataclass(frozen=True, slots=True)
class DropClass:
    """Take an empty class away (a busy one would lose its packets)."""

    minor: int


Change = RemoveRoot | InstallRoot | PutClass | PutQueue | PutFilter | DropFilter | DropClass


def minor_of(class_index: int) -> int:
    """The leaf of a policy's class."""
    if not 0 <= class_index <= LAST_LEAF_MINOR - FIRST_LEAF_MINOR:
        raise InputError("class_index", class_index, "0 to 63")
    return FIRST_LEAF_MINOR + class_index


def priority_of(class_index: int) -> int:
    """The SO_PRIORITY that puts a socket's packets into the class, without any filter."""
    return HANDLE | minor_of(class_index)


def quanta_bytes(weights: Sequence[float]) -> list[int]:
    """Quanta in proportion to weights: 100 KB for the smallest where the largest stays in bounds.

    Where the weights are further apart than the bounds allow (about 1:60), the largest gets
    QUANTUM_MAX_BYTES and the smallest QUANTUM_MIN_BYTES: then a tiny class borrows more of the
    idle bandwidth than its weight; its guaranteed rate is exact still.
    """
    low, high = min(weights), max(weights)
    per_weight = min(
        QUANTUM_BASE_BYTES / low,
        max(QUANTUM_MAX_BYTES / high, min(QUANTUM_MIN_BYTES / low, QUANTUM_MAX_BYTES / high)),
    )
    return [max(QUANTUM_MIN_BYTES, round(weight * per_weight)) for weight in weights]


def burst_bytes(rate_bps: float) -> int:
    """Near 16 KB up to 1 Gb/s, above it 125 microseconds of the rate."""
    return max(BURST_MIN_BYTES, round(rate_bps / 8 * BURST_TIME_S))


def tree_for(
    policy: DomainPolicy,
    *,
    rate_bps: float | None = None,
    unmarked_share: float = UNMARKED_SHARE,
    queue_packets: int = QUEUE_PACKETS,
    by_dscp: bool = False,
) -> HtbTree:
    """The tree a policy asks for.

    rate_bps: the link's rate, the policy's own unless given. by_dscp: packets carry no
    SO_PRIORITY here (they come from other hosts), so every class needs a DSCP of its own.
    Weighted classes share (1 - unmarked_share) of the link as guaranteed rates and may borrow all
    of it; the sum never exceeds the link, or HTB would overrun it. Where priorities differ
    (PIAS) every class gets a tiny rate, the whole link as ceiling, and its priority for the rest.
    Raises PolicyError or InputError.
    """
    link_bps = policy.rate_bps if rate_bps is None else rate_bps
    _check_inputs(link_bps, unmarked_share, queue_packets)
    link = round(link_bps)
    link_burst = burst_bytes(link)
    strict = len({cls.priority for cls in policy.classes}) > 1

    def leaf(minor: int, rate: float, quantum: int, prio: int) -> HtbClass:
        whole = max(round(rate), 8)
        return HtbClass(
            minor, ROOT_MINOR, whole, link, burst_bytes(whole), link_burst, quantum, prio
        )

    classes = [
        HtbClass(ROOT_MINOR, 0, link, link, link_burst, link_burst, QUANTUM_MIN_BYTES, 0),
        leaf(UNMARKED_MINOR, link * unmarked_share, QUANTUM_MIN_BYTES, 0),
    ]
    quanta = quanta_bytes([cls.weight for cls in policy.classes])
    for index, (cls, quantum) in enumerate(zip(policy.classes, quanta, strict=True)):
        if strict:
            rate = max(link * STRICT_SHARE, STRICT_FLOOR_BPS)
        else:
            rate = link * (1 - unmarked_share) * cls.weight
        classes.append(leaf(minor_of(index), rate, quantum, cls.priority if strict else 0))
    return HtbTree(tuple(classes), queue_packets, _filters(policy, by_dscp))


def _check_inputs(link_bps: float, unmarked_share: float, queue_packets: int) -> None:
    if not MIN_RATE_BPS <= link_bps <= MAX_RATE_BPS:
        raise InputError("rate_bps", link_bps, "1 Mbit to 1 Tbit per second")
    if not 0.001 <= unmarked_share <= 0.5:
        raise InputError("unmarked_share", unmarked_share, "a share in [0.001, 0.5]")
    if not 2 <= queue_packets <= 1_000_000:
        raise InputError("queue_packets", queue_packets, "2 to 1,000,000 packets")


def _filters(policy: DomainPolicy, by_dscp: bool) -> tuple[DscpFilter, ...]:
    owner: dict[int, int] = {}
    filters = []
    for index, cls in enumerate(policy.classes):
        if cls.dscp == 0:  # the default mark of everything: it tells no class apart
            if by_dscp:
                raise PolicyError(f"classes[{index}].dscp", 0, "a mark from 1 to 63")
            continue
        if cls.dscp in owner:
            raise PolicyError(
                f"classes[{index}].dscp", cls.dscp, f"a mark that classes[{owner[cls.dscp]}] lacks"
            )
        owner[cls.dscp] = index
        filters += [DscpFilter(protocol, cls.dscp, minor_of(index)) for protocol in FILTER_PREFS]
    return tuple(filters)


def changes(desired: HtbTree, seen: SeenTree) -> list[Change]:
    """What turns what was seen into what is desired, in an order the kernel accepts.

    Nothing when they agree within tolerance. Classes of ours that are not desired go when they
    are empty, else they stay until the next time. What others put below our qdisc stays.
    Raises InputError if the root qdisc is foreign.
    """
    if seen.foreign:
        raise InputError("root qdisc", f"{seen.kind} {seen.handle >> 16:x}:", "none but ours")
    plan: list[Change] = []
    if seen.ours and not _rebuildable_in_place(desired, seen):
        plan.append(RemoveRoot())
        seen = SeenTree("", KERNEL_HANDLE)
    if not seen.ours:
        plan.append(InstallRoot())
    for shape in desired.classes:
        there = seen.classes.get(shape.minor)
        if there is None or not same_class(shape, there.shape):
            plan.append(PutClass(shape, new=there is None))
        queue = None if there is None else there.queue_packets
        if shape.minor != ROOT_MINOR and queue != desired.queue_packets:
            plan.append(PutQueue(shape.minor, desired.queue_packets, new=queue is None))
    return plan + _filter_changes(desired, seen) + _class_removals(desired, seen)


def _rebuildable_in_place(desired: HtbTree, seen: SeenTree) -> bool:
    parents = {cls.minor: cls.parent_minor for cls in desired.classes}
    return seen.default_minor == UNMARKED_MINOR and all(
        minor not in parents or there.shape.parent_minor == parents[minor]
        for minor, there in seen.classes.items()
    )


def _filter_changes(desired: HtbTree, seen: SeenTree) -> list[Change]:
    wanted = dict.fromkeys(desired.filters)
    plan: list[Change] = []
    for there in seen.filters:
        if there.shape is None:
            continue
        if there.shape in wanted:
            del wanted[there.shape]
        else:
            plan.append(DropFilter(there.shape.protocol, there.pref, there.handle))
    return plan + [PutFilter(shape) for shape in wanted]


def _class_removals(desired: HtbTree, seen: SeenTree) -> list[Change]:
    kept = {cls.minor for cls in desired.classes}
    return [
        DropClass(minor)
        for minor, there in seen.classes.items()
        if FIRST_LEAF_MINOR <= minor <= LAST_LEAF_MINOR
        and minor not in kept
        and there.backlog_packets == 0
    ]


def same_class(desired: HtbClass, seen: HtbClass) -> bool:
    """Do they agree, rates to .1 %, bursts to the kernel's ticks, the rest exactly?"""
    return (
        (desired.minor, desired.parent_minor, desired.quantum_bytes, desired.prio)
        == (seen.minor, seen.parent_minor, seen.quantum_bytes, seen.prio)
        and _near(desired.rate_bps, seen.rate_bps, RATE_TOLERANCE)
        and _near(desired.ceil_bps, seen.ceil_bps, RATE_TOLERANCE)
        and _near(desired.burst_bytes, seen.burst_bytes, BURST_TOLERANCE)
        and _near(desired.cburst_bytes, seen.cburst_bytes, BURST_TOLERANCE)
    )


def _near(desired: float, seen: float, tolerance: float) -> bool:
    return abs(desired - seen) <= max(tolerance * desired, 8)


def as_command(change: Change, device: str) -> str:
    """The change as the tc command that would make it, for people."""
    head, at = f"dev {device}", f"{MAJOR:x}:"
    match change:
        case RemoveRoot():
            return f"tc qdisc del {head} root"
        case InstallRoot():
            return f"tc qdisc add {head} root handle {at} htb default {UNMARKED_MINOR:x}"
        case PutClass(shape, new):
            parent = f"{at}{shape.parent_minor:x}" if shape.parent_minor else at
            return (
                f"tc class {'add' if new else 'change'} {head} parent {parent} "
                f"classid {at}{shape.minor:x} htb rate {shape.rate_bps}bit "
                f"ceil {shape.ceil_bps}bit burst {shape.burst_bytes} "
                f"cburst {shape.cburst_bytes} quantum {shape.quantum_bytes} prio {shape.prio}"
            )
        case PutQueue(minor, limit, new):
            return (
                f"tc qdisc {'add' if new else 'change'} {head} parent {at}{minor:x} "
                f"handle {QUEUE_MAJOR + minor:x}: pfifo limit {limit}"
            )
        case PutFilter(shape):
            ip = "ip" if shape.protocol == "ipv4" else "ipv6"
            match_ = f"match {'ip dsfield' if ip == 'ip' else 'ip6 priority'} {shape.dscp << 2:#x}"
            return (
                f"tc filter add {head} parent {at} protocol {ip} "
                f"pref {FILTER_PREFS[shape.protocol]} u32 {match_} 0xfc flowid {at}{shape.minor:x}"
            )
        case DropFilter(protocol, pref, handle):
            table, bucket, node = handle >> 20, (handle >> 12) & 0xFF, handle & 0xFFF
            ip = "ip" if protocol == "ipv4" else "ipv6"
            return (
                f"tc filter del {head} parent {at} protocol {ip} pref {pref} "
                f"handle {table:x}:{bucket:x}:{node:x} u32"
            )
        case DropClass(minor):
            return f"tc class del {head} classid {at}{minor:x}"


def tree_to_plain(tree: HtbTree) -> dict[str, object]:
    """JSON-ready, for status and ``intentctl tc plan --json``."""
    return {
        "handle": f"{MAJOR:x}:",
        "queue_packets": tree.queue_packets,
        "classes": [
            {
                "classid": f"{MAJOR:x}:{cls.minor:x}",
                "role": role_of(cls.minor),
                "priority": HANDLE | cls.minor,
                "rate_bps": cls.rate_bps,
                "ceil_bps": cls.ceil_bps,
                "burst_bytes": cls.burst_bytes,
                "cburst_bytes": cls.cburst_bytes,
                "quantum_bytes": cls.quantum_bytes,
                "prio": cls.prio,
            }
            for cls in tree.classes
        ],
        "filters": [
            {"protocol": f.protocol, "dscp": f.dscp, "classid": f"{MAJOR:x}:{f.minor:x}"}
            for f in tree.filters
        ],
    }


def role_of(minor: int) -> str:
    """What a class of our tree is for: "link", "unmarked", "class 3"."""
    if minor == ROOT_MINOR:
        return "link"
    if minor == UNMARKED_MINOR:
        return "unmarked"
    if FIRST_LEAF_MINOR <= minor <= LAST_LEAF_MINOR:
        return f"class {minor - FIRST_LEAF_MINOR}"
    return "not ours"
