"""What a member holds of one class: the queue of its waiting flows, its tickets and its turns."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

from intentd.core.flows.boost import queue_key
from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.ids import Progress


@dataclass(slots=True)
class Waiting:
    """A flow that waits for its turn."""

    flow: int
    size_bytes: int
    class_index: int
    arrived: float
    sequence: int
    batched: bool = False  # in the batch of a turn, no longer in its class's queue


class Turn:
    """Flows that use one id, one after the other. id 0: they hold none (any more).

    relied: earlier ids that were in hand-over when it started, and of which its order depends.
    """

    __slots__ = ("announced", "class_index", "flow", "id", "mark", "pending", "relied", "started")

    def __init__(self, class_index: int, flow: int, ticket: int, mark: str, now: float) -> None:
        self.class_index = class_index
        self.flow = flow
        self.id = ticket
        self.mark = mark
        self.pending: deque[Waiting] = deque()
        self.announced = False
        self.relied: tuple[int, ...] = ()
        self.started = now


class Line:
    """One class at one member.

    The queue is a heap whose entries may be of flows that are gone; ``waiting``, the member's
    table of waiting flows, tells, and such entries are skipped when met.
    """

    __slots__ = (
        "batched",
        "batches",
        "due",
        "index",
        "last_start",
        "open_bytes",
        "overdue",
        "probe_at",
        "probe_wait_s",
        "progress",
        "queue",
        "requested",
        "service_s",
        "synced",
        "tickets",
        "turns",
        "unfinished",
        "waiting",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.queue: list[tuple[float, int, int]] = []  # (key, sequence, flow)
        self.waiting = 0
        self.batched = 0  # that wait inside the batch of a turn
        self.batches = 0  # tickets the waiting flows need
        self.open_bytes = 0  # in the last batch
        self.tickets: list[int] = []  # ids that wait for their turn, ascending
        self.requested = 0  # ids asked for and not answered yet
        self.turns: dict[int, Turn] = {}  # by id, those that hold one
        self.service_s = 0.0  # decentralised: how long one of our flows takes
        self.last_start: tuple[int, float] | None = None
        self.forget()

    def forget(self) -> None:
        """A new epoch: nothing is known of other members' ids."""
        self.progress = Progress()
        self.due: dict[int, tuple[float, bool]] = {}  # ids in hand-over: bound, asked about
        self.overdue: set[int] = set()  # announced, and not over within it
        self.synced = False
        self.unfinished = -1
        self.probe_at = math.inf
        self.probe_wait_s = 0.0

    def enqueue(self, entry: Waiting, policy: DomainPolicy) -> None:
        """In the class's local order; a new batch if it does not fit the last one."""
        key = queue_key(
            policy.classes[self.index],
            rate_bps=policy.rate_bps,
            arrived=entry.arrived,
            size_bytes=entry.size_bytes,
        )
        heappush(self.queue, (key, entry.sequence, entry.flow))
        self.waiting += 1
        if self.batches and self.open_bytes + entry.size_bytes <= policy.batch_bytes:
            self.open_bytes += entry.size_bytes
        else:
            self.batches += 1
            self.open_bytes = entry.size_bytes

    def peek(self, waiting: Mapping[int, Waiting]) -> Waiting:
        """The flow that is next; there must be one."""
        while True:
            _, sequence, flow = self.queue[0]
            entry = waiting.get(flow)
            if entry is not None and entry.sequence == sequence:
                return entry
            heappop(self.queue)

    def pop(self, waiting: Mapping[int, Waiting]) -> Waiting:
        entry = self.peek(waiting)
        heappop(self.queue)
        self.waiting -= 1
        return entry

    def left(self, entry: Waiting, waiting: Mapping[int, Waiting]) -> None:
        """A waiting flow, already out of the table, went otherwise."""
        if entry.batched:
            self.batched -= 1
            return
        self.waiting -= 1
        if len(self.queue) > 64 + 2 * self.waiting:
            self.queue = sorted(
                row
                for row in self.queue
                if (other := waiting.get(row[2])) is not None and other.sequence == row[1]
            )

    def note_handovers(self, until: float) -> None:
        """Keep up with the ids that are announced: those heard of now have until then to end."""
        bits = self.progress.announced
        if not bits and not self.due and not self.overdue:
            return
        floor = self.progress.floor
        ids = set()
        while bits:
            low = bits & -bits
            bits ^= low
            ids.add(floor + low.bit_length())
        self.overdue &= ids
        self.due = {one: self.due.get(one, (until, False)) for one in sorted(ids - self.overdue)}

    def handovers_before(self, ticket: int) -> tuple[list[int], int]:
        """Earlier ids in hand-over, and how many are overdue."""
        return [one for one in self.due if one < ticket], sum(one < ticket for one in self.overdue)

    def holds_any(self, first: int, count: int) -> bool:
        """Is one of these ids a ticket or a turn of ours?"""
        end = first + count
        return any(first <= ticket < end for ticket in self.tickets) or any(
            first <= ticket < end for ticket in self.turns
        )

    def held_runs(self) -> list[wire.Run]:
        """Every id held, ascending, for Hello and Heartbeat."""
        runs: list[wire.Run] = []
        for ticket in sorted([*self.tickets, *self.turns]):
            turn = self.turns.get(ticket)
            announced = turn is not None and turn.announced
            last = runs[-1] if runs else None
            if last and last.announced == announced and last.first + last.count == ticket:
                runs[-1] = wire.Run(self.index, last.first, last.count + 1, announced)
            else:
                runs.append(wire.Run(self.index, ticket, 1, announced))
        return runs
