"""The gate of one link domain: which flows may send now (dissertation, section 2.4.4).

Local decisions only: order across hosts is the turn protocol's. Pure: events and `now` in,
releases out. Daemon, simulator and tests drive this same object.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple

from intentd.core.errors import InputError, IntentdError, StateError
from intentd.core.flows.boost import queue_key
from intentd.core.flows.policy import UNLIMITED, ClassPolicy, DomainPolicy

ORDERED: Final = ""
TIMEOUT: Final = "timeout"
EARLY_FIN: Final = "early_fin"
RACED: Final = "raced"
MAX_FLOWS: Final = 100_000
MAX_SIZE_BYTES: Final = 2**63 - 1
_COMPACT_FROM: Final = 64


class GateFullError(IntentdError):
    """The gate holds as many flows as it may; the arrival was refused and nothing changed."""

    def __init__(self, domain: str, limit: int) -> None:
        self.limit = limit
        super().__init__(
            f"domain {domain}: {limit} flows wait or send already; refused, send without the gate"
        )


class Release(NamedTuple):  # made for every flow: a third of what a frozen dataclass costs
    """A flow may start now.

    degraded: "" when order and multiplexing level hold, else why they may not:
        "timeout" (waited max_wait), "early_fin" (one before it announced its end and has not
        ended long after), "raced" (started by itself on a class it saw free, which no longer
        was); the turn protocol adds "lease" and "fallback".
    """

    flow: int
    class_index: int
    degraded: str = ORDERED


class FlowState(enum.Enum):
    WAITING = "waiting"  # in its class's queue
    SENDING = "sending"  # released; holds one of the class's mpl places
    ANNOUNCED = "announced"  # in hand-over: its last bytes leave, its place has been passed on
    OVERDUE = "overdue"  # announced its end, and has not ended within the hand-over's bound


# Read from here: up to Python 3.11, reading a member from its class is slow (120 ns against 14).
_WAITING: Final = FlowState.WAITING
_SENDING: Final = FlowState.SENDING
_ANNOUNCED: Final = FlowState.ANNOUNCED
_OVERDUE: Final = FlowState.OVERDUE


class _Flow:
    __slots__ = (
        "arrived",
        "class_index",
        "flow",
        "handed_over",
        "mark",
        "pinned",
        "sequence",
        "size",
        "state",
    )

    def __init__(
        self, flow: int, size: int, class_index: int, pinned: bool, arrived: float, sequence: int
    ) -> None:
        self.flow = flow
        self.size = size
        self.class_index = class_index
        self.pinned = pinned
        self.arrived = arrived
        self.sequence = sequence
        self.state = _WAITING
        self.mark: str | None = None
        self.handed_over = -math.inf  # when it started on an announcement


class _Class:
    __slots__ = (
        "announced",
        "expected",
        "handover_bytes",
        "leaving_bytes",
        "mpl",
        "overdue",
        "queue",
        "sending",
        "waiting",
    )

    def __init__(self, policy: ClassPolicy, handover_bytes: int) -> None:
        self.handover_bytes = handover_bytes
        self.leaving_bytes = 0  # at most, of the flows in hand-over
        self.mpl = math.inf if policy.mpl == UNLIMITED else policy.mpl
        # (key, sequence, flow); entries whose flow no longer waits here are skipped when met.
        self.queue: list[tuple[float, int, int]] = []
        self.waiting = 0
        self.sending = 0
        self.announced = 0
        self.overdue = 0
        self.expected = 0  # 1: a flow has started of which the gate will hear

    @property
    def free(self) -> bool:
        """Whether one more may start: a place, and no more hand-overs under way than there may."""
        return self.sending + self.expected < self.mpl and (
            self.announced <= self.mpl or self.leaving_bytes < self.handover_bytes
        )

    def announces(self, size: int) -> None:
        self.announced += 1
        self.leaving_bytes += min(size, self.handover_bytes)

    def leaves(self, size: int) -> None:
        """A flow in hand-over has ended, or is overdue."""
        self.announced -= 1
        self.leaving_bytes -= min(size, self.handover_bytes)


class FlowGate:
    """At most mpl flows of a class send at a time; the others wait in the class's order.

    A flow is WAITING, then SENDING, perhaps ANNOUNCED, then forgotten:
    arrive -> WAITING or SENDING; release (arrive, finish, cancel, announce, expire, set_policy)
    WAITING -> SENDING; announce SENDING -> ANNOUNCED; expire ANNOUNCED -> OVERDUE; finish SENDING |
    ANNOUNCED | OVERDUE -> gone; cancel any -> gone. Anything else raises StateError.

    A flow that announces its end is in hand-over while its last bytes leave: its place passes on,
    to one that starts in order (``handed_over`` counts those). When a flow starts, at most mpl
    flows are in hand-over, or any number with less than early_fin_bytes left in all: so mpl
    flows send beside the last bytes of mpl others, or of small ones that are no more. A flow
    that has not ended within ``DomainPolicy.handover_s`` is overdue: its announcement was wrong,
    the marks of those that started after it, on announcements, become "early_fin" (``demoted``),
    and so is the mark of starts that need its place.

    Every call takes `now`, seconds on one monotonic clock (a reading that lies before an earlier
    one counts as that one), and costs O(log n) in the flows waiting, set_policy O(n log n).
    At most max_flows flows are held, waiting and sending together; the next arrival raises
    GateFullError and its sender goes on without the gate. Expiry: whoever waited max_wait_s is
    released as degraded, on top of mpl; later ordered releases of the class wait until it is
    below mpl again. A flow may also say that it has started already, because ``admits`` told its
    class was free: it is ordered if that still holds, else "raced", on top of mpl as well. Where
    the caller knows of such a start before it arrives, ``expect`` keeps its place.
    """

    def __init__(self, policy: DomainPolicy, *, max_flows: int = MAX_FLOWS) -> None:
        self.policy = policy
        self.max_flows = max_flows
        self._flows: dict[int, _Flow] = {}
        self._waiting: OrderedDict[int, _Flow] = OrderedDict()  # in order of arrival
        self._handovers: OrderedDict[int, tuple[float, float]] = OrderedDict()  # announced, due
        self._sequence = 0
        self._now = -math.inf
        self.handed_over = 0
        self.demoted = 0
        self._adopt(policy)

    def arrive(
        self,
        flow: int,
        size_bytes: int,
        *,
        now: float,
        class_index: int | None = None,
        started: bool = False,
    ) -> list[Release]:
        """A flow wants to send; its own release comes back when it may start at once.

        class_index: the class the application names; else size and policy choose it. started: it
        sends already; its release comes back in any case.
        Raises InputError for a bad size or class, GateFullError, StateError for an id in use.
        """
        if not 0 <= size_bytes <= MAX_SIZE_BYTES:  # NaN fails too
            raise InputError("size_bytes", size_bytes, f"a size in 0 to {MAX_SIZE_BYTES}")
        if class_index is not None and not 0 <= class_index < len(self._classes):
            raise InputError("class_index", class_index, f"0 to {len(self._classes) - 1}")
        if flow in self._flows:
            raise StateError(f"flow {flow} arrives, but is {self._flows[flow].state.value}")
        if len(self._flows) >= self.max_flows:
            raise GateFullError(self.policy.domain, self.max_flows)
        self._now = now = max(self._now, now)
        if class_index is not None:
            index = class_index
        elif self._by_size:
            index = bisect_left(self._thresholds, size_bytes)
        else:
            index = self._choose(size_bytes)
        self._sequence += 1
        entry = _Flow(flow, size_bytes, index, class_index is not None, now, self._sequence)
        self._flows[flow] = entry
        cls = self._classes[index]
        if started and cls.expected:
            cls.expected = 0
            return [self._start(entry, cls, ORDERED if cls.free else RACED)]
        if not cls.waiting and cls.free:
            return [self._start(entry, cls)]
        if started:
            return [self._start(entry, cls, RACED)]
        self._enqueue(entry, cls)
        self._waiting[flow] = entry
        return []

    def finish(self, flow: int, *, now: float) -> list[Release]:
        """A sending flow has sent everything; whoever is next in its class starts."""
        self._now = max(self._now, now)
        entry = self._flows.get(flow)
        if entry is None or entry.state is _WAITING:
            raise self._refusal(flow, "finishes")
        return self._leave(entry)

    def cancel(self, flow: int, *, now: float) -> list[Release]:
        """The application gave up, or died, in any state."""
        self._advance(now)
        entry = self._get(flow, "is cancelled", *FlowState)
        if entry.state is not _WAITING:
            return self._leave(entry)
        cls = self._classes[entry.class_index]
        del self._flows[flow]
        del self._waiting[flow]
        cls.waiting -= 1
        self._compact(cls)
        return []

    def announce(self, flow: int, *, now: float) -> list[Release]:
        """Early FIN: the place passes on while the last bytes leave. Again: nothing."""
        now = self._advance(now)
        entry = self._get(flow, "announces its end", _SENDING, _ANNOUNCED, _OVERDUE)
        if entry.state is not _SENDING:
            return []
        entry.state = _ANNOUNCED
        self._handovers[flow] = (now, now + self._handover_s)
        cls = self._classes[entry.class_index]
        cls.sending -= 1
        cls.announces(entry.size)
        return self._pump(entry.class_index)

    def expect(self, class_index: int, *, now: float) -> None:
        """A flow has started in this class and will arrive: until then nobody gets its place."""
        self._advance(now)
        self._classes[class_index].expected = 1

    def forgo(self, class_index: int, *, now: float) -> list[Release]:
        """It will not arrive. Nothing where none is expected, or the class is gone."""
        self._advance(now)
        if class_index >= len(self._classes) or not self._classes[class_index].expected:
            return []
        self._classes[class_index].expected = 0
        return self._pump(class_index)

    def expire(self, *, now: float) -> list[Release]:
        """Release whoever has waited max_wait_s, oldest first, marked "timeout"; and whoever waits
        for a hand-over that is overdue."""
        now = self._advance(now)
        max_wait = self.policy.max_wait_s
        released = self._overdue(now) if self._handovers else []
        while self._waiting:
            entry = next(iter(self._waiting.values()))
            if now < entry.arrived + max_wait:
                break
            cls = self._classes[entry.class_index]
            del self._waiting[entry.flow]
            cls.waiting -= 1
            released.append(self._start(entry, cls, TIMEOUT))
            self._compact(cls)
        return released

    def next_timer(self) -> float | None:
        """When expire has something to do, on the same clock; None while it has not."""
        at = None
        for entry in self._waiting.values():
            at = entry.arrived + self.policy.max_wait_s
            break
        for _, due in self._handovers.values():
            return due if at is None or due < at else at
        return at

    def set_policy(self, policy: DomainPolicy, *, now: float) -> list[Release]:
        """Follow another policy from now on; returns whom it lets start.

        Waiting flows keep their age and are put into the new classes; running flows go on and
        count in their new class, which may exceed its mpl until they end. A class that the
        application named is kept where it still exists, else size decides.
        """
        self._advance(now)
        if policy == self.policy:
            return []
        before = [entry for entry in self._flows.values() if entry.state is not _WAITING]
        self.policy = policy
        self._adopt(policy)
        for entry in before:
            entry.class_index = self._class_after_change(entry)
            cls = self._classes[entry.class_index]
            if entry.state is _SENDING:
                cls.sending += 1
            elif entry.state is _ANNOUNCED:
                cls.announces(entry.size)
            else:
                cls.overdue += 1
        for entry in self._waiting.values():
            entry.class_index = self._class_after_change(entry)
            self._enqueue(entry, self._classes[entry.class_index])
        released = []
        for index in range(len(self._classes)):
            released.extend(self._pump(index))
        return released

    def class_index_of(self, flow: int) -> int | None:
        """Class of a flow the gate holds, else None."""
        entry = self._flows.get(flow)
        return None if entry is None else entry.class_index

    def state_of(self, flow: int) -> FlowState | None:
        entry = self._flows.get(flow)
        return None if entry is None else entry.state

    def mark_of(self, flow: int) -> str | None:
        """The mark of a started flow as it stands now; None while it waits or is not held."""
        entry = self._flows.get(flow)
        return None if entry is None else entry.mark

    def queue_lengths(self) -> list[int]:
        """Flows waiting, per class."""
        return [cls.waiting for cls in self._classes]

    def active(self) -> list[int]:
        """Flows sending, announced ones too, per class."""
        return [cls.sending + cls.announced + cls.overdue for cls in self._classes]

    def admits(self) -> list[int]:
        """Per class, 1 if the next arrival starts at once, else 0; size must be what chooses it."""
        if not self._by_size:
            return [0] * len(self._classes)
        return [int(not cls.waiting and cls.free) for cls in self._classes]

    def __len__(self) -> int:
        return len(self._flows)

    def _adopt(self, policy: DomainPolicy) -> None:
        self._classes = [_Class(cls, policy.early_fin_bytes) for cls in policy.classes]
        self._by_size = policy.dispatch == "size"
        self._handover_s = policy.handover_s
        # Ascending and infinity last where size decides: the class is where the size fits in.
        self._thresholds = [cls.threshold_bytes for cls in policy.classes]

    def _advance(self, now: float) -> float:
        self._now = max(self._now, now)
        return self._now

    def _get(self, flow: int, does: str, *allowed: FlowState) -> _Flow:
        entry = self._flows.get(flow)
        if entry is None or entry.state not in allowed:
            raise self._refusal(flow, does)
        return entry

    def _refusal(self, flow: int, does: str) -> StateError:
        entry = self._flows.get(flow)
        if entry is None:
            return StateError(f"flow {flow} {does}, but the gate does not hold it")
        return StateError(
            f"flow {flow} {does}, but is {entry.state.value} since {entry.arrived:.6f} "
            f"in class {entry.class_index}"
        )

    def _choose(self, size_bytes: float) -> int:
        if self._by_size:
            return self.policy.class_of(size_bytes)
        # Baraat FIFO-LM: small flows share class 0, each other flow takes a class without work;
        # where none is free, the one with the fewest flows.
        classes = self._classes
        if size_bytes <= self.policy.classes[0].threshold_bytes or len(classes) == 1:
            return 0
        best, fewest = 1, math.inf
        for index in range(1, len(classes)):
            cls = classes[index]
            work = cls.waiting + cls.sending + cls.announced + cls.overdue
            if work < fewest:
                best, fewest = index, work
                if not work:
                    break
        return best

    def _class_after_change(self, entry: _Flow) -> int:
        exists = entry.class_index < len(self._classes)
        if entry.pinned and exists:
            return entry.class_index
        entry.pinned = False
        if not self._by_size and exists and entry.class_index:
            small = entry.size <= self.policy.classes[0].threshold_bytes
            if not small:
                return entry.class_index
        return self._choose(entry.size)

    def _enqueue(self, entry: _Flow, cls: _Class) -> None:
        key = queue_key(
            self.policy.classes[entry.class_index],
            rate_bps=self.policy.rate_bps,
            arrived=entry.arrived,
            size_bytes=entry.size,
        )
        heappush(cls.queue, (key, entry.sequence, entry.flow))
        cls.waiting += 1

    def _start(self, entry: _Flow, cls: _Class, degraded: str = ORDERED) -> Release:
        if not degraded and (cls.announced or cls.overdue):
            if cls.sending + cls.overdue >= cls.mpl:
                degraded = EARLY_FIN
            elif cls.sending + cls.overdue + cls.announced >= cls.mpl:
                entry.handed_over = self._now
                self.handed_over += 1
        entry.state = _SENDING
        entry.mark = degraded
        cls.sending += 1
        return Release(entry.flow, entry.class_index, degraded)

    def _leave(self, entry: _Flow) -> list[Release]:
        del self._flows[entry.flow]
        cls = self._classes[entry.class_index]
        if entry.state is _SENDING:
            cls.sending -= 1
        elif entry.state is _ANNOUNCED:
            del self._handovers[entry.flow]
            cls.leaves(entry.size)
        else:
            cls.overdue -= 1
        return self._pump(entry.class_index) if cls.waiting else []

    def _overdue(self, now: float) -> list[Release]:
        """Flows that announced their end and go on all the same: it no longer counts as one."""
        released: list[Release] = []
        while self._handovers:
            flow, (announced, due) = next(iter(self._handovers.items()))
            if now < due:
                break
            del self._handovers[flow]
            entry = self._flows[flow]
            entry.state = _OVERDUE
            cls = self._classes[entry.class_index]
            cls.leaves(entry.size)
            cls.overdue += 1
            for heir in self._flows.values():
                if (
                    heir.class_index == entry.class_index
                    and heir.handed_over >= announced
                    and heir.mark == ORDERED
                ):
                    heir.mark = EARLY_FIN
                    self.demoted += 1
            released += self._pump(entry.class_index)
        return released

    def _pump(self, index: int) -> list[Release]:
        cls = self._classes[index]
        released = []
        while cls.waiting and cls.free:
            _, sequence, flow = heappop(cls.queue)
            entry = self._waiting.get(flow)
            if entry is None or entry.sequence != sequence:
                continue  # cancelled or expired since
            del self._waiting[flow]
            cls.waiting -= 1
            released.append(self._start(entry, cls))
        if not cls.waiting:
            cls.queue.clear()
        return released

    def _compact(self, cls: _Class) -> None:
        """Keep abandoned entries below half the queue, so that memory follows the flows held."""
        if len(cls.queue) > max(_COMPACT_FROM, 2 * cls.waiting):
            cls.queue = [
                row
                for row in cls.queue
                if (entry := self._waiting.get(row[2])) is not None and entry.sequence == row[1]
            ]
            heapify(cls.queue)
