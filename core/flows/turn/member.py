"""The agent's side of the turn protocol, for one domain (dissertation, sections 2.4.4, 2.4.5).

A member takes tickets (epoch, id) from the domain's sequencer and lets its waiting flows start
when all but mpl - 1 of the earlier ids of the class are over. Tickets are rights to start: which
of its own waiting flows a member starts on the ticket whose turn has come is its own local order.
Pure: events and ``now`` in, releases and an outbox out.
One state machine, hence one long module; what a class holds is in line.py.
"""

from __future__ import annotations

import enum
import math
from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from intentd.core.errors import StateError
from intentd.core.flows.gate import Release
from intentd.core.flows.policy import DomainPolicy
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.line import Line, Turn, Waiting

ORDERED: Final = ""
TIMEOUT: Final = "timeout"  # waited max_wait
LEASE: Final = "lease"  # an earlier id is over only by its holder's lease, or one's own ran out
EARLY_FIN: Final = "early_fin"  # an earlier id announced its end and did not end
ESTIMATED: Final = "policy"  # decentralised turns: the policy asks for an estimate, not for order

MAX_TICKETS: Final = 1024  # waiting ids a class; flows beyond wait for one without
MAX_IN_FLIGHT: Final = 32  # unanswered requests
REPEATED_RUNS: Final = 3  # earlier runs that a FIN says again, against loss
_KEPT_SENDS: Final = 32
_STORY: Final = 16


@dataclass(frozen=True, slots=True)
class TurnTiming:
    """Periods of the member, in seconds. Lease and heartbeat come from the sequencer.

    lease_share: of the lease a member counts on, so that it knows of its end before the
    sequencer does although clocks drift.
    """

    join_s: float = 0.5
    retry_s: float = 0.1
    away_retry_s: float = 0.2
    refused_retry_s: float = 1.0
    probe_s: float = 0.05
    probe_max_s: float = 0.4
    poll_s: float = 0.005
    lease_share: float = 0.9


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A FIN to sign and to send to agents and sequencer."""

    domain_id: int
    epoch: int
    runs: tuple[wire.Run, ...]

    def finished(self) -> wire.Finished:
        """The same for the sequencer's link, where there is no key to sign with."""
        last: dict[tuple[int, int], wire.Run] = {}
        for run in self.runs:  # runs of one id; over outweighs announced
            at = (run.class_index, run.first)
            if at not in last or last[at].announced:
                last[at] = run
        return wire.Finished(self.domain_id, self.epoch, tuple(last[at] for at in sorted(last)))


Outgoing = wire.Message | Broadcast


class MemberState(enum.Enum):
    """AWAY: no lease, order is local. JOINING: said Hello, flows wait for the answer a short time.
    MEMBER: registered, the lease runs. REJOINING: the lease runs but the sequencer must first take
    up what is held (new epoch, new connection); nothing starts in order meanwhile.
    """

    AWAY = "away"
    JOINING = "joining"
    MEMBER = "member"
    REJOINING = "rejoining"


_AWAY: Final = MemberState.AWAY  # as in gate.py: cheaper to read than a member of its class
_JOINING: Final = MemberState.JOINING
_MEMBER: Final = MemberState.MEMBER
_REJOINING: Final = MemberState.REJOINING
_ALLOWED: Final = {
    MemberState.AWAY: (MemberState.JOINING, MemberState.MEMBER),
    MemberState.JOINING: (MemberState.MEMBER, MemberState.AWAY),
    MemberState.MEMBER: (MemberState.REJOINING, MemberState.AWAY),
    MemberState.REJOINING: (MemberState.MEMBER, MemberState.AWAY),
}


class TurnMember:
    """Tickets and turns of one agent in one domain.

    States and transitions: see MemberState; ``_ALLOWED`` is the table, anything else raises
    StateError with the recent story. Before any call is served the lease is checked, so that no
    start is called ordered that the sequencer may know nothing of.

    A flow is waiting (arrive), then sending (a Release names it), then gone (finish, cancel).
    ``demoted`` counts flows that started in order and whose mark was withdrawn since, because the
    lease ran out while they were sending, or an earlier id that had announced its end did not end
    (``handed_over`` counts the starts that relied on one); mark_of tells a flow's mark of now.
    """

    def __init__(
        self, policy: DomainPolicy, *, name: str, boot: int, timing: TurnTiming | None = None
    ) -> None:
        self.policy = policy
        self.name = name
        self.boot = boot
        self.timing = timing or TurnTiming()
        self.domain_id = wire.name_id(policy.domain)
        self.sender = wire.name_id(name)
        self.state = _AWAY
        self.epoch = 0
        self.linked = False
        self.reason = "no connection to the sequencer"
        self.demoted = 0
        self.handed_over = 0
        self.ignored = 0  # messages and runs that made no sense here
        self._lease_until = -math.inf
        self._lease_s = 0.0
        self._heartbeat_s = 1.0
        self._recover_until = -math.inf
        self._recovering = False
        self._join_until = math.inf
        self._next_beat = math.inf
        self._sequence = 0
        self._request_number = 0
        self._probe_number = 0
        self._arrivals = 0
        self._sent: dict[int, float] = {}  # sequence of Hello or Heartbeat -> when
        self._hellos: set[int] = set()  # sequences of Hellos whose Welcome is awaited
        self._requests: dict[int, tuple[int, int, float]] = {}  # number -> class, count, resend at
        self._lines: dict[int, Line] = {}
        self._waiting: dict[int, Waiting] = {}
        self._turn_of: dict[int, Turn] = {}
        self._ages: list[tuple[float, int, int]] = []  # (arrived, sequence, flow), some abandoned
        self._outbox: list[Outgoing] = []
        self._over: list[wire.Run] = []  # to be broadcast
        self._repeat: deque[wire.Run] = deque(maxlen=REPEATED_RUNS)
        self._story: deque[str] = deque(maxlen=_STORY)

    # -- flows ---------------------------------------------------------------------------------

    def arrive(
        self,
        flow: int,
        size_bytes: int,
        *,
        class_index: int,
        now: float,
        arrived: float | None = None,
    ) -> list[Release]:
        """A flow of a globally ordered class waits for its turn. arrived: when, if earlier."""
        if flow in self._waiting or flow in self._turn_of:
            raise StateError(f"flow {flow} arrives, but is held already; {self.story()}")
        self._enter(now)
        self._arrivals += 1
        entry = Waiting(
            flow, size_bytes, class_index, now if arrived is None else arrived, self._arrivals
        )
        self._waiting[flow] = entry
        heappush(self._ages, (entry.arrived, entry.sequence, flow))
        line = self._line(class_index)
        line.enqueue(entry, self.policy)
        self._balance(line, now)
        return self._advance(line, now)

    def finish(self, flow: int, *, now: float) -> list[Release]:
        """A sending flow is done; the next of its batch starts, or its id is over."""
        self._enter(now)
        turn = self._turn_of.pop(flow, None)
        if turn is None:
            raise StateError(f"flow {flow} finishes, but is not sending; {self.story()}")
        line = self._line(turn.class_index)
        took = now - turn.started
        line.service_s = 0.8 * line.service_s + 0.2 * took if line.service_s else took
        return self._next_of_batch(line, turn, now)

    def cancel(self, flow: int, *, now: float) -> list[Release]:
        """A flow gives up, waiting or sending."""
        if flow in self._turn_of:
            return self.finish(flow, now=now)
        self._enter(now)
        entry = self._waiting.pop(flow, None)
        if entry is None:
            raise StateError(f"flow {flow} is cancelled, but is not held; {self.story()}")
        line = self._line(entry.class_index)
        self._left(line, entry)
        self._balance(line, now)
        return []

    def announce(self, flow: int, *, now: float) -> list[Release]:
        """Early FIN: the turn passes on. Nothing while flows of its batch still wait for it."""
        self._enter(now)
        turn = self._turn_of.get(flow)
        if turn is None:
            raise StateError(f"flow {flow} announces its end, but is not sending; {self.story()}")
        if turn.announced or turn.pending or not turn.id:
            return []
        turn.announced = True
        line = self._line(turn.class_index)
        line.progress.announce(turn.id, 1)
        self._say_over(wire.Run(turn.class_index, turn.id, 1, announced=True))
        return self._advance(line, now)

    def set_policy(self, policy: DomainPolicy, *, now: float) -> list[Release]:
        """Follow another policy of the same domain. The caller has withdrawn every waiting flow
        whose class changes or is no longer globally ordered."""
        self._enter(now)
        self.policy = policy
        released = []
        for line in self._lines.values():
            self._balance(line, now)
            released += self._advance(line, now)
        return released

    def withdraw(self, flows: Iterable[int], *, now: float) -> None:
        """Take waiting flows back (they will be ordered otherwise)."""
        lines = set()
        for flow in flows:
            entry = self._waiting.pop(flow)
            line = self._line(entry.class_index)
            self._left(line, entry)
            lines.add(line.index)
        for index in lines:
            self._balance(self._lines[index], now)

    def waiting_flows(self) -> list[int]:
        """Flows that wait for a ticket's turn, in order of arrival; not those in a batch."""
        if not self._waiting:
            return []
        rows = [entry for entry in self._waiting.values() if not entry.batched]
        return [entry.flow for entry in sorted(rows, key=lambda e: (e.arrived, e.sequence))]

    def class_index_of(self, flow: int) -> int | None:
        """Class of a flow held here, else None."""
        held = self._waiting.get(flow) or self._turn_of.get(flow)
        return None if held is None else held.class_index

    def active(self, classes: int) -> list[int]:
        """Flows sending, per class."""
        counts = [0] * classes
        for turn in self._turn_of.values():
            if turn.class_index < classes:
                counts[turn.class_index] += 1
        return counts

    def mark_of(self, flow: int) -> str | None:
        """Mark of a sending flow as it stands now; None if it is not sending here."""
        turn = self._turn_of.get(flow)
        return None if turn is None else turn.mark

    def ticket_of(self, flow: int) -> int:
        """The id a sending flow holds in this epoch; 0 if none."""
        turn = self._turn_of.get(flow)
        return 0 if turn is None else turn.id

    def lease_left_s(self, now: float) -> float:
        """Seconds this member may still count on what it holds; negative: none."""
        if self.state not in (_MEMBER, _REJOINING):
            return -math.inf
        return self._lease_until - now

    def ordered_sending(self, class_index: int) -> list[int]:
        """Ids whose flow sends, started in order, not demoted since and not announced."""
        line = self._lines.get(class_index)
        if line is None:
            return []
        return [t for t, turn in line.turns.items() if turn.mark == ORDERED and not turn.announced]

    def held_ids(self, class_index: int) -> list[int]:
        """Ids of this class that are neither over nor announced at this member, ascending."""
        line = self._lines.get(class_index)
        if line is None:
            return []
        sending = [ticket for ticket, turn in line.turns.items() if not turn.announced]
        return sorted(line.tickets + sending)

    def announced_ids(self, class_index: int) -> list[int]:
        """Ids of this class whose flow sends its announced last bytes at this member."""
        line = self._lines.get(class_index)
        if line is None:
            return []
        return [ticket for ticket, turn in line.turns.items() if turn.announced]

    def queue_length(self, class_index: int) -> int:
        """Waiting flows of a class, those that wait inside a batch included."""
        line = self._lines.get(class_index)
        if line is None:
            return 0
        return line.waiting + line.batched

    # -- time ----------------------------------------------------------------------------------

    def expire(self, *, now: float) -> list[Release]:
        """Serve every timer that is due."""
        self._enter(now)
        released = self._time_out(now)
        if now >= self._next_beat and self.linked:
            if self.state is _MEMBER:
                self._heartbeat(now)
            else:
                self._hello(now)
        if self.state is _MEMBER and now >= self._recover_until:
            self._recovering = False
            self._resend(now)
            for line in self._lines.values():
                if line.tickets or line.waiting:
                    self._balance(line, now)
                    released += self._advance(line, now)
                if line.due:
                    released += self._overdue(line, now)
                if now >= line.probe_at:
                    self._probe(line, now)
        return released

    def next_timer(self) -> float | None:
        """When expire has something to do; None while there is nothing."""
        if self.state is _AWAY and not self.linked and not self._ages:
            return None  # asked twice a flow, also where no domain has a sequencer
        times = [math.inf]
        if self.linked:
            times.append(self._next_beat)
        if self.state in (_MEMBER, _REJOINING):
            times.append(self._lease_until)
        elif self.state is _JOINING:
            times.append(self._join_until)
        if self.state is _MEMBER:
            recover = self._recover_until
            if self._recovering:
                times.append(recover)
            times += [max(at, recover) for _, _, at in self._requests.values()]
            times += [max(line.probe_at, recover) for line in self._lines.values()]
            times += [
                max(at, recover) for line in self._lines.values() for at, _ in line.due.values()
            ]
            if self.policy.turn_mode == "decentralised":
                times += [
                    self._estimate(line)
                    for line in self._lines.values()
                    if self._may_estimate(line)
                ]
        self._drop_stale_ages()
        if self._ages:
            times.append(self._ages[0][0] + self.policy.max_wait_s)
        earliest = min(times)
        return None if earliest == math.inf else earliest

    # -- messages ------------------------------------------------------------------------------

    def connected(self, up: bool, *, now: float) -> None:
        """The link to the sequencer came up or went down."""
        self._enter(now)
        if not up:
            self.linked = False
            self._outbox = [item for item in self._outbox if isinstance(item, Broadcast)]
            if self.state is _JOINING:
                self._away("the connection to the sequencer is down", now)
            return
        self.linked = True
        if self.state is _AWAY and not self.epoch:
            self._go(_JOINING, now, "connected")
            self._join_until = now + self.timing.join_s
        elif self.state is _MEMBER:
            self._rejoin(now, "connected again")
        self._hello(now)

    def handle(self, message: wire.Message, *, now: float) -> list[Release]:
        """A message from the sequencer. What is late, repeated or not for us changes nothing."""
        self._enter(now)
        match message:
            case wire.Tickets():
                return self._on_tickets(message, now)
            case wire.State():
                return self._on_state(message, now)
            case wire.Beat():
                self._on_beat(message)
            case wire.Pause():
                self._on_pause(message)
            case wire.Welcome():
                return self._on_welcome(message, now)
            case wire.EpochChange():
                self._on_epoch(message, now)
            case wire.Error():
                self._on_error(message, now)
            case _:
                self.ignored += 1
        return []

    def handle_fin(
        self, sender: int, epoch: int, runs: tuple[wire.Run, ...], *, now: float
    ) -> list[Release]:
        """A FIN whose MAC held; believed in hybrid mode alone, and never of an id held here."""
        self._enter(now)
        hybrid = self.policy.turn_mode == "hybrid"
        if not hybrid or sender == self.sender or epoch != self.epoch:
            return []
        touched: dict[int, None] = {}
        for run in runs:
            if run.class_index >= len(self.policy.classes):
                self.ignored += 1
                continue
            line = self._line(run.class_index)
            if line.holds_any(run.first, run.count):
                self.ignored += 1
                continue
            if run.announced:
                line.progress.announce(run.first, run.count)
            else:
                line.progress.finish(run.first, run.count)
            touched[run.class_index] = None
        released: list[Release] = []
        for index in touched:
            released += self._advance(self._lines[index], now)
        return released

    def goodbye(self, *, now: float) -> None:
        """The agent stops on purpose: everything it holds is over."""
        self._enter(now)
        if self.linked and self.epoch:
            self._outbox.append(wire.Goodbye(self.domain_id, self.epoch))
        self._away("stopped", now)

    def poll_outbox(self) -> list[Outgoing]:
        """What to send, once: messages for the sequencer, and FINs to sign and broadcast."""
        out, self._outbox = self._outbox, []
        if self._over:
            runs, self._over = self._over, []
            for start in range(0, len(runs), 32):
                fresh = runs[start : start + 32]
                repeated = [run for run in self._repeat if run not in fresh]
                out.append(Broadcast(self.domain_id, self.epoch, (*fresh, *repeated)))
                self._repeat.extend(fresh)
        return out

    def story(self) -> str:
        """Recent changes of state, for an error's text."""
        return f"{self.policy.domain}/{self.name}: " + "; ".join(self._story)

    # -- inside: states ------------------------------------------------------------------------

    def _go(self, state: MemberState, now: float, why: str) -> None:
        if state not in _ALLOWED[self.state]:
            raise StateError(f"turn member {self.state.value} -> {state.value}: {self.story()}")
        self.state = state
        self.reason = why
        self._story.append(f"{now:.3f} {state.value} ({why}), epoch {self.epoch}")

    def _enter(self, now: float) -> None:
        """Before anything else: is the lease still ours?"""
        if self.state in (_MEMBER, _REJOINING):
            if now >= self._lease_until:
                self._away("the lease ran out: no answer from the sequencer", now)
        elif self.state is _JOINING and now >= self._join_until:
            self._away("the sequencer does not answer", now)

    def _away(self, why: str, now: float) -> None:
        """Without lease: tickets are void, marks withdrawn, requests given up."""
        if self.state is not _AWAY:
            self._go(_AWAY, now, why)
        self._give_up_requests()
        for line in self._lines.values():
            line.tickets.clear()
            line.probe_at = math.inf
            for turn in line.turns.values():
                self._demote(turn)
        self._next_beat = now + self.timing.away_retry_s

    def _demote(self, turn: Turn) -> None:
        if turn.mark == ORDERED:
            turn.mark = LEASE
            self.demoted += 1

    def _rejoin(self, now: float, why: str) -> None:
        self._go(_REJOINING, now, why)
        self._give_up_requests()
        self._hellos.clear()

    def _give_up_requests(self) -> None:
        """Answers that still come are for ids nobody will use: their numbers count as acked."""
        self._requests.clear()
        for line in self._lines.values():
            line.requested = 0

    def _on_welcome(self, message: wire.Welcome, now: float) -> list[Release]:
        sent = self._sent.get(message.sequence)
        if message.sequence not in self._hellos or sent is None:
            return []
        lease_s = message.lease_ms / 1e3 * self.timing.lease_share
        if now >= sent + lease_s:
            return []  # too old to count on
        self._hellos.clear()
        self._lease_s = lease_s
        self._lease_until = sent + lease_s
        self._heartbeat_s = message.heartbeat_ms / 1e3
        self._next_beat = now + self._heartbeat_s
        self._recover_until = now + message.recover_ms / 1e3
        self._recovering = True
        fresh = message.epoch != self.epoch
        self.epoch = message.epoch
        if fresh:
            self._repeat.clear()
            self._over.clear()
        self._go(_MEMBER, now, "registered")
        self._keep_accepted(message.accepted, fresh)
        released: list[Release] = []
        for line in self._lines.values():
            self._balance(line, now)
            released += self._advance(line, now)
        return released

    def _keep_accepted(self, accepted: tuple[wire.Run, ...], fresh: bool) -> None:
        kept: dict[int, set[int]] = {}
        for run in accepted:
            kept.setdefault(run.class_index, set()).update(range(run.first, run.first + run.count))
        for line in self._lines.values():
            if fresh:
                line.forget()
            ours = kept.get(line.index, set())
            line.tickets = [ticket for ticket in line.tickets if ticket in ours]
            for ticket, turn in list(line.turns.items()):
                if ticket not in ours:
                    del line.turns[ticket]
                    turn.id = 0
                    self._demote(turn)
                elif turn.announced:
                    line.progress.announce(ticket, 1)

    def _on_beat(self, message: wire.Beat) -> None:
        sent = self._sent.get(message.sequence)
        if sent is None or message.epoch != self.epoch or self.state is not _MEMBER:
            return
        self._lease_until = max(self._lease_until, sent + self._lease_s)

    def _on_pause(self, message: wire.Pause) -> None:
        """A planned restart: what is held stays valid until the sequencer is back."""
        sent = self._sent.get(message.sequence)
        if sent is None or message.epoch != self.epoch or self.state is not _MEMBER:
            return
        lease_s = message.lease_ms / 1e3 * self.timing.lease_share
        self._lease_until = max(self._lease_until, sent + lease_s)

    def _on_epoch(self, message: wire.EpochChange, now: float) -> None:
        if message.epoch < self.epoch or self.state is not _MEMBER:
            return
        self._rejoin(now, f"the sequencer asks for registration in epoch {message.epoch}")
        self._hello(now)

    def _on_error(self, message: wire.Error, now: float) -> None:
        if message.code == wire.ERROR_BUSY:
            request = self._requests.get(message.number)
            if request is not None:
                self._requests[message.number] = (*request[:2], now + 4 * self.timing.retry_s)
            return
        if message.code == wire.ERROR_SUPERSEDED and message.number not in self._sent:
            return  # about an earlier life
        self._away(f"the sequencer refuses: {message.text or message.code}", now)
        self.reason = f"the sequencer refuses: {message.text or message.code}"
        self._next_beat = now + self.timing.refused_retry_s

    # -- inside: sending -----------------------------------------------------------------------

    def _held_runs(self) -> tuple[wire.Run, ...]:
        runs: list[wire.Run] = []
        for index in sorted(self._lines):
            runs += self._lines[index].held_runs()
        return tuple(runs[: wire.MAX_RUNS])

    def _acked(self) -> int:
        return min(self._requests, default=self._request_number + 1) - 1

    def _next_sequence(self, now: float) -> int:
        self._sequence += 1
        self._sent[self._sequence] = now
        while len(self._sent) > _KEPT_SENDS:
            del self._sent[next(iter(self._sent))]
        return self._sequence

    def _hello(self, now: float) -> None:
        sequence = self._next_sequence(now)
        self._hellos.add(sequence)
        self._hellos &= self._sent.keys()
        self._outbox.append(
            wire.Hello(
                self.policy.domain,
                self.name,
                self.boot,
                self.epoch,
                sequence,
                self._acked(),
                self._held_runs(),
            )
        )
        away = self.state is _AWAY
        self._next_beat = now + (self.timing.away_retry_s if away else self.timing.retry_s)

    def _heartbeat(self, now: float) -> None:
        self._outbox.append(
            wire.Heartbeat(
                self.domain_id,
                self.epoch,
                self._next_sequence(now),
                self._acked(),
                self._held_runs(),
            )
        )
        self._next_beat = now + self._heartbeat_s

    def _probe(self, line: Line, now: float) -> None:
        if self.linked:
            self._ask(line)
        if self.policy.turn_mode == "centralised":
            distance = max(1, line.unfinished)
            line.probe_at = now + min(self.timing.probe_max_s, self.timing.poll_s * distance)
        else:
            line.probe_wait_s = min(
                self.timing.probe_max_s, max(self.timing.probe_s, 2 * line.probe_wait_s)
            )
            line.probe_at = now + line.probe_wait_s

    def _ask(self, line: Line) -> None:
        self._probe_number = self._probe_number % 0xFFFFFFFF + 1
        self._outbox.append(wire.Probe(self.domain_id, self.epoch, line.index, self._probe_number))

    def _request(self, line: Line, count: int, now: float) -> None:
        self._request_number += 1
        line.requested += count
        self._requests[self._request_number] = (line.index, count, now + self.timing.retry_s)
        self._send_request(self._request_number, line.index, count)

    def _send_request(self, number: int, class_index: int, count: int) -> None:
        if self.linked:
            self._outbox.append(
                wire.TicketRequest(
                    self.domain_id, self.epoch, class_index, count, number, self._acked()
                )
            )

    def _resend(self, now: float) -> None:
        for number, (class_index, count, at) in list(self._requests.items()):
            if now >= at:
                self._requests[number] = (class_index, count, now + self.timing.retry_s)
                self._send_request(number, class_index, count)

    def _say_over(self, run: wire.Run) -> None:
        """Tell the others, as the policy's mode has it; heartbeats repair what gets lost."""
        if self.state not in (_MEMBER, _REJOINING):
            return
        mode = self.policy.turn_mode
        if mode == "hybrid":
            self._over.append(run)
        elif mode == "centralised" and self.linked:
            self._outbox.append(wire.Finished(self.domain_id, self.epoch, (run,)))

    # -- inside: turns -------------------------------------------------------------------------

    def _on_tickets(self, message: wire.Tickets, now: float) -> list[Release]:
        if message.epoch != self.epoch or self.state is not _MEMBER:
            return []
        request = self._requests.get(message.number)
        if request is None or request[:2] != (message.class_index, message.count):
            return []  # a repeat, or given up
        del self._requests[message.number]
        line = self._line(message.class_index)
        line.requested -= message.count
        line.progress.raise_floor(message.floor)
        for ticket in range(message.first, message.first + message.count):
            insort(line.tickets, ticket)
        if len(self._requests) == MAX_IN_FLIGHT - 1:  # others could not ask meanwhile
            for other in self._lines.values():
                self._balance(other, now)
        self._balance(line, now)
        return self._advance(line, now)

    def _on_state(self, message: wire.State, now: float) -> list[Release]:
        known = message.class_index in self._lines
        if message.epoch != self.epoch or self.state is not _MEMBER or not known:
            return []
        line = self._lines[message.class_index]
        line.synced = True
        line.progress.merge(message.floor, message.finished, message.lease, message.announced)
        return self._advance(line, now)

    def _advance(self, line: Line, now: float) -> list[Release]:
        """Start whoever's turn it is."""
        released: list[Release] = []
        line.note_handovers(now + self.policy.handover_s)
        if self.state is not _MEMBER or now < self._recover_until:
            return released
        mpl = self.policy.classes[line.index].mpl if line.index < len(self.policy.classes) else 1
        while line.tickets:
            ticket = line.tickets[0]
            if not line.waiting:
                line.tickets.pop(0)
                self._ticket_over(line, ticket)
                continue
            mark = self._mark(line, ticket, max(1, mpl), now)
            if mark is None:
                break
            line.tickets.pop(0)
            released.append(self._start(line, ticket, mark, now))
        self._plan_probe(line, now)
        return released

    def _mark(self, line: Line, ticket: int, mpl: int, now: float) -> str | None:
        """How a start on this ticket would be marked now; None: it is not its turn."""
        if self.policy.turn_mode == "decentralised":
            due = len(line.turns) < mpl and now >= self._estimate(line)
            return ESTIMATED if due else None
        unfinished, lease, announced = line.progress.before(ticket)
        if unfinished >= mpl:
            return None
        if unfinished + lease + announced < mpl:
            return ORDERED
        handovers, overdue = line.handovers_before(ticket)
        if len(handovers) > mpl:
            return None
        if unfinished + lease >= mpl:
            return LEASE
        return EARLY_FIN if unfinished + lease + overdue >= mpl else ORDERED

    def _overdue(self, line: Line, now: float) -> list[Release]:
        """Ids that were announced and are not over in time: ask once, then believe it no more."""
        ask = False
        for one, (at, asked) in list(line.due.items()):
            if now < at:
                continue
            if not asked:
                ask = True
                line.due[one] = (now + self.policy.handover_s, True)
                continue
            del line.due[one]
            line.overdue.add(one)
            for turn in line.turns.values():
                if one in turn.relied and turn.mark == ORDERED:
                    turn.mark = EARLY_FIN
                    self.demoted += 1
        if ask and self.linked:
            self._ask(line)
        return self._advance(line, now)

    def _may_estimate(self, line: Line) -> bool:
        if not (line.tickets and line.waiting) or line.index >= len(self.policy.classes):
            return False
        return len(line.turns) < max(1, self.policy.classes[line.index].mpl)

    def _estimate(self, line: Line) -> float:
        """When the next own ticket should be due, from the gap to our last start."""
        if line.last_start is None:
            return -math.inf
        last, started = line.last_start
        mpl = max(1, self.policy.classes[line.index].mpl)
        return started + max(0, line.tickets[0] - last) * line.service_s / mpl

    def _start(self, line: Line, ticket: int, mark: str, now: float) -> Release:
        """The best waiting flow starts, and as many as fit the batch follow it on the same id."""
        entry = line.pop(self._waiting)
        del self._waiting[entry.flow]
        turn = Turn(line.index, entry.flow, ticket, mark, now)
        mpl = max(1, self.policy.classes[line.index].mpl)
        if mark == ORDERED and line.due and sum(line.progress.before(ticket)) >= mpl:
            turn.relied = tuple(line.handovers_before(ticket)[0])
            self.handed_over += 1
        total = entry.size_bytes
        while line.waiting:
            following = line.peek(self._waiting)
            total += following.size_bytes
            if total > self.policy.batch_bytes:
                break
            line.pop(self._waiting)
            following.batched = True
            line.batched += 1
            turn.pending.append(following)
        line.batches = max(0, line.batches - 1)
        line.turns[ticket] = turn
        line.last_start = (ticket, now)
        self._turn_of[entry.flow] = turn
        return Release(entry.flow, line.index, mark)

    def _next_of_batch(self, line: Line, turn: Turn, now: float) -> list[Release]:
        while turn.pending:
            entry = turn.pending.popleft()
            if self._waiting.get(entry.flow) is not entry:
                continue  # cancelled or timed out since
            del self._waiting[entry.flow]
            line.batched -= 1
            turn.flow = entry.flow
            turn.started = now
            self._turn_of[entry.flow] = turn
            return [Release(entry.flow, turn.class_index, turn.mark)]
        if turn.id:
            del line.turns[turn.id]
            self._ticket_over(line, turn.id)
        return self._advance(line, now)

    def _ticket_over(self, line: Line, ticket: int) -> None:
        line.progress.finish(ticket, 1)
        self._say_over(wire.Run(line.index, ticket, 1))

    def _time_out(self, now: float) -> list[Release]:
        """Whoever waited max_wait starts, with the class's next ticket if there is one."""
        released: list[Release] = []
        while True:
            self._drop_stale_ages()
            if not self._ages or now < self._ages[0][0] + self.policy.max_wait_s:
                return released
            _, _, flow = heappop(self._ages)
            entry = self._waiting.pop(flow)
            line = self._line(entry.class_index)
            self._left(line, entry)
            ticket = line.tickets.pop(0) if line.tickets and not entry.batched else 0
            turn = Turn(line.index, flow, ticket, TIMEOUT, now)
            if ticket:
                line.turns[ticket] = turn
            self._turn_of[flow] = turn
            released.append(Release(flow, line.index, TIMEOUT))
            self._balance(line, now)

    def _plan_probe(self, line: Line, now: float) -> None:
        """Ask when a ticket waits longer than its bound; sooner while nothing is known."""
        if not line.tickets or self.policy.turn_mode == "decentralised":
            line.probe_at = math.inf
            line.unfinished = -1
            return
        unfinished = line.progress.before(line.tickets[0])[0]
        if unfinished == line.unfinished and line.probe_at != math.inf:
            return
        closer = line.unfinished < 0 or unfinished < line.unfinished
        line.unfinished = unfinished
        if self.policy.turn_mode == "centralised":
            if line.probe_at == math.inf:
                self._probe(line, now)
        elif not line.synced:
            if line.probe_at == math.inf:
                line.probe_wait_s = 0.0
                self._probe(line, now)
        elif closer or line.probe_at == math.inf:
            line.probe_wait_s = self.timing.probe_s
            line.probe_at = now + self.timing.probe_s

    def _balance(self, line: Line, now: float) -> None:
        """Ask for the ids the waiting flows need beyond those held and asked for."""
        if self.state is not _MEMBER or now < self._recover_until:
            return
        if not line.waiting:
            line.batches = line.open_bytes = 0
            for ticket in line.tickets:
                self._ticket_over(line, ticket)
            line.tickets.clear()
            return
        line.batches = max(1, min(line.batches, line.waiting))
        missing = min(line.batches, MAX_TICKETS) - len(line.tickets) - line.requested
        if missing > 0 and len(self._requests) < MAX_IN_FLIGHT:
            self._request(line, min(missing, wire.MAX_IDS), now)

    # -- inside: the queue of a class ----------------------------------------------------------

    def _line(self, class_index: int) -> Line:
        line = self._lines.get(class_index)
        if line is None:
            line = self._lines[class_index] = Line(class_index)
        return line

    def _left(self, line: Line, entry: Waiting) -> None:
        """A waiting flow went otherwise; its entries in heaps are skipped when met."""
        if len(self._ages) > 64 + 2 * len(self._waiting):
            self._ages = sorted(
                (other.arrived, other.sequence, other.flow) for other in self._waiting.values()
            )
        line.left(entry, self._waiting)

    def _drop_stale_ages(self) -> None:
        while self._ages:
            _, sequence, flow = self._ages[0]
            entry = self._waiting.get(flow)
            if entry is not None and entry.sequence == sequence:
                return
            heappop(self._ages)
