"""The gate shell: applications' messages become events of the gates, releases become GRANTs.

GRANTs leave first, then what other hosts wait for; records, measures and timers come after, for
somebody waits for the former two. Flows come far apart, so that most of what they need has left
the caches: each call and object before the GRANT costs microseconds, not nanoseconds.

It holds no policy. Which flow goes first is the gate's decision (``core.flows``), the same object
that the simulator drives; here are only names, bounds, records and measuring. Nothing awaits:
every call runs to its end on the loop, with the clock's ``now`` read once. One table of flows that
every message and every timer reads and changes, hence one long module; domains, the board and
measures lie beside it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from intentd.agent import app_protocol as wire
from intentd.agent.app_protocol import FromApplication, ProtocolError
from intentd.agent.app_socket import Application
from intentd.agent.board import Board
from intentd.agent.domain import SENDING, WAITING, Domain, FlowRecord, Route
from intentd.agent.explain import explain
from intentd.agent.marking import Marked
from intentd.agent.measure import Meter
from intentd.core.errors import InputError
from intentd.core.flows.gate import GateFullError, Release
from intentd.core.flows.policy import DomainPolicy

log = logging.getLogger(__name__)

RECENT: Final = 4096  # ended flows that `explain` still knows
_STAMP_SLACK_NS: Final = 1_000_000
_ROUTES: Final = 4096  # peers whose domain is remembered
CLAIM_S: Final = 1.0  # how long an application may take from its start by the board to its OPEN
# A claim whose flow has come and gone is let go of when its program reads the GRANT, which takes it
# a tenth of a millisecond: so look in every turn of the loop first.
_CLAIM_SPIN_S: Final = 0.002
_CLAIM_CHECK_S: Final = 0.001


class Marker(Protocol):
    """marking.mark: sets a socket's SO_PRIORITY and DSCP. Raises OSError."""

    def __call__(self, sock: socket.socket, *, priority: int, dscp: int) -> Marked: ...


class Counts:
    """What the shell counts beyond the domains' meters; read by the metrics."""

    def __init__(self) -> None:
        self.errors = 0
        self.marks = 0
        self.mark_failures = 0
        self.no_domain = 0
        self.died_holding = 0
        self.early_announcements = 0
        self.opened = 0


class GateShell:
    """Applications on one side, the domains' gates on the other (see the module's docstring).

    now: the clock. mark: sets a socket's class. woken: told the earliest time ``tick`` has
    something to do, whenever that becomes earlier. changed: told a domain after its gate was
    called, so that its outbox is sent (turn protocol). board: where free classes are shown.
    """

    def __init__(
        self,
        *,
        now: Callable[[], float],
        mark: Marker,
        woken: Callable[[float], None] = lambda at: None,
        changed: Callable[[Domain], None] = lambda domain: None,
        boot: int = 0,
        max_flows: int = 16384,
        honour_hints: bool = True,
        recent: int = RECENT,
        board: Board | None = None,
    ) -> None:
        self.domains: dict[str, Domain] = {}
        self.counts = Counts()
        self.flows: dict[int, FlowRecord] = {}
        self.connections: Callable[[], int] = lambda: 0
        self.stopping = False
        self.emptied: Callable[[], None] = lambda: None  # the last open flow has left
        self.can_mark = True
        self._board = board
        self._now = now
        self._mark = mark
        self._woken = woken
        self._changed = changed
        self._boot = boot
        self._max_flows = max_flows
        self._honour_hints = honour_hints
        self._routes: list[Route] = []
        self._default = ""
        self._route_cache: OrderedDict[str, Domain | None] = OrderedDict()
        self._recent: deque[FlowRecord] = deque(maxlen=recent)
        self._next_flow = 1
        self._claims: dict[tuple[str, int], float] = {}  # expected by the gate -> until when
        self._wake_at: float | None = None
        self._actions: dict[type, Callable[[Application, Any, socket.socket | None], None]] = {
            wire.Open: self._open,
            wire.Done: self._done,
            wire.Announce: self._announce,
            wire.Cancel: self._cancel,
            wire.Mark: self._mark_flow,
            wire.Hello: self._hello,
            wire.Stats: self._stats,
        }

    # -- domains ----------------------------------------------------------------------------------

    def set_domains(self, domains: list[Domain], routes: list[Route], default: str) -> None:
        """The domains of this host. Flows of a domain that is left out are released at once."""
        now = self._now()
        kept = {domain.name: domain for domain in domains}
        gone = [d for name, d in self.domains.items() if kept.get(name) is not d]
        self.domains = kept
        self._routes = sorted(routes, key=lambda route: -route.network.prefixlen)
        self._default = default
        self._route_cache.clear()
        for domain in gone:
            self._abandon(domain, now)
        self.publish_board()

    def set_policy(self, domain: Domain, policy: DomainPolicy, number: tuple[int, int]) -> None:
        """Swap a domain's policy: nothing that waits is lost, running flows stay."""
        now = self._now()
        self._claims.clear()
        releases = domain.gate.set_policy(policy, now=now)
        domain.adopt(policy, number)
        for record in self.flows.values():
            if record.domain is domain:
                record.class_index = domain.gate.class_index_of(record.flow) or 0
        self._after(domain, releases, now)
        self.publish_board()

    def publish_board(self) -> None:
        """Domains, classes or marks have changed."""
        if self._board is not None and not self.stopping:
            self._board.publish(self.domains.values(), self._default, bool(self._routes))

    def stop(self) -> None:
        """Take no new flows; those that wait or send may end."""
        self.stopping = True
        if self._board is not None:
            self._board.withdraw()

    def take_up(self) -> None:
        """Take new flows again."""
        self.stopping = False
        self.publish_board()

    def restore(self, flows: list[FlowRecord], next_flow: int) -> None:
        """Go on with the flows of the agent before; their connections are this agent's already.

        Those that send take their places first, then the others queue in the order they came.
        """
        now = self._now()
        self._next_flow = max(self._next_flow, next_flow)
        earliest = min((record.arrived for record in flows), default=now)
        releases: dict[str, list[Release]] = {}
        for record in sorted(flows, key=lambda one: (one.outcome == WAITING, one.arrived)):
            domain, application = record.domain, record.application
            assert application is not None, "a flow without its connection"
            application.flows[record.request] = self.flows[record.flow] = record
            waits = record.outcome == WAITING
            released = [Release(record.flow, record.class_index, "policy")]
            if domain is not None:
                try:
                    released = domain.gate.arrive(
                        record.flow,
                        record.size,
                        now=record.arrived if waits else earliest,
                        class_index=self._class_again(record, domain),
                        started=not waits,
                    )
                except (InputError, GateFullError):
                    record.domain = None
            if not waits:
                continue
            if record.domain is None:
                self._grant(record, released[0], now)
            else:
                releases.setdefault(record.domain.name, []).extend(released)
        for name, domain in self.domains.items():
            for record in flows:
                if record.domain is domain:
                    record.class_index = domain.gate.class_index_of(record.flow) or 0
            self._after(domain, releases.get(name, []), now)

    def _class_again(self, record: FlowRecord, domain: Domain) -> int | None:
        """The class that a restored flow may name: its own while it sends, else its hint."""
        if record.outcome == SENDING:
            wanted = record.class_index
        elif record.hint != wire.NO_CLASS and self._honour_hints:
            wanted = record.hint
        else:
            return None
        return wanted if wanted < len(domain.policy.classes) else None

    @property
    def next_flow(self) -> int:
        return self._next_flow

    def _abandon(self, domain: Domain, now: float) -> None:
        for record in [r for r in self.flows.values() if r.domain is domain]:
            if record.outcome == WAITING:
                release = Release(record.flow, record.class_index, "policy")
                self._grant(record, release, now)
                domain.meter.released(release.class_index, now - record.arrived, release.degraded)
            record.domain = None

    def _domain_of(self, message: wire.Open) -> Domain | None:
        """By name, else by the peer's longest matching network, else the default. May raise."""
        if message.domain:
            domain = self.domains.get(message.domain)
            if domain is None:
                known = ", ".join(sorted(self.domains)) or "none"
                raise ProtocolError(
                    wire.E_UNKNOWN,
                    "OPEN.domain",
                    message.domain,
                    f"one of this agent's domains ({known})",
                    message.request,
                )
            return domain
        if not message.peer or not self._routes:
            return self.domains.get(self._default)
        cache = self._route_cache
        if message.peer in cache:
            return cache[message.peer]
        address = ipaddress.ip_address(message.peer)
        found = next((r.domain for r in self._routes if address in r.network), self._default)
        if len(cache) >= _ROUTES:
            cache.popitem(last=False)
        domain = cache[message.peer] = self.domains.get(found)
        return domain

    # -- the application socket's handler ---------------------------------------------------------

    def message(
        self, application: Application, message: FromApplication, passed: socket.socket | None
    ) -> None:
        self._actions[type(message)](application, message, passed)

    def refused(self, application: Application, error: ProtocolError) -> None:
        self.counts.errors += 1
        log.debug("refused", extra={"pid": application.pid, "reason": str(error)})

    def left(self, application: Application) -> None:
        """The application has gone, on purpose or not: what it held passes on at once."""
        now = self._now()
        for record in list(application.flows.values()):
            if record.outcome == SENDING:
                self.counts.died_holding += 1
            self._end(record, "left", now)
        if self._claims:
            self._check_claims(now)

    # -- messages ---------------------------------------------------------------------------------

    def _hello(
        self, application: Application, message: wire.Hello, _: socket.socket | None
    ) -> None:
        application.name = message.name
        self.welcome(application, message.request)

    def welcome(self, application: Application, request: int = 0) -> None:
        """Say what this agent does; the board rides along."""
        flags = wire.WELCOME_MARKS if self.can_mark else 0
        if any(domain.shaped for domain in self.domains.values()):
            flags |= wire.WELCOME_SHAPES
        board = None
        if self._board is not None:
            try:
                board = self._board.descriptor()
                flags |= wire.WELCOME_BOARD
            except OSError as error:  # no descriptors left: this application asks
                log.warning("no board for an application", extra={"reason": str(error)})
        welcome = wire.encode_welcome(request, self._boot, flags, self._max_flows)
        try:
            application.send(welcome, board)
        finally:
            if board is not None:
                os.close(board)

    def _open(
        self, application: Application, message: wire.Open, passed: socket.socket | None
    ) -> None:
        request = message.request
        if self.stopping:
            raise ProtocolError(
                wire.E_STOPPING, "agent", "stopping", "that you send at once", request
            )
        domain = self._domain_of(message)
        hint = None
        if message.class_hint != wire.NO_CLASS and domain is not None:
            hint = self._hint(message, domain)
        if message.flags & wire.MARK_ONLY:
            self._mark_only(application, message, domain, hint, passed)
            return
        if request in application.flows:
            raise ProtocolError(
                wire.E_VALUE, "OPEN.request", request, "a number no open flow has", request
            )
        if len(application.flows) >= self._max_flows:
            raise ProtocolError(
                wire.E_LIMIT,
                "flows",
                len(application.flows) + 1,
                f"at most {self._max_flows} on a connection",
                request,
            )
        now = self._now()
        flow = self._next_flow
        record = FlowRecord(flow, application, message, domain)
        record.arrived = now
        started = message.flags == wire.STARTED
        if self._board is not None and domain is not None and not started:
            self._look_for_claim(domain, message.size_bytes, hint, now)
        if domain is None:
            self.counts.no_domain += 1
            releases = [Release(flow, 0, "no_domain")]
        else:
            try:
                releases = domain.gate.arrive(
                    flow,
                    message.size_bytes,
                    now=now,
                    class_index=hint,
                    started=started,
                )
            except GateFullError as error:
                raise ProtocolError(
                    wire.E_LIMIT, "flows", "one more", f"at most {error.limit} in a domain", request
                ) from None
        self._next_flow += 1
        self.counts.opened += 1
        application.flows[request] = self.flows[flow] = record
        if domain is None:
            self._grant(record, releases[0], now)
            return
        if passed is not None:
            record.class_index = domain.gate.class_index_of(flow) or 0
            self._mark_socket(record, passed)
        if started and self._claims:
            self._claims.pop((domain.name, releases[0].class_index), None)
        self._after(domain, releases, now)
        domain.meter.arrived(message.size_bytes, now)
        if record.outcome == WAITING:
            self._queued(record, domain)

    def _look_for_claim(self, domain: Domain, size: int, hint: int | None, now: float) -> None:
        """Before a flow that asks arrives: has another started there by the board just now?"""
        assert self._board is not None
        if self._claims:
            self._check_claims(now)
        index = domain.policy.class_of(size) if hint is None else hint
        if self._board.take(domain, index):
            domain.gate.expect(index, now=now)
            self._claims[domain.name, index] = now + CLAIM_S
            self._wake_at = now
            self._woken(now)

    def _check_claims(self, now: float) -> None:
        """Who claimed a class and let go of it without a flow, or died, is waited for no longer."""
        assert self._board is not None
        for (name, index), until in list(self._claims.items()):
            domain = self.domains.get(name)
            if domain is None:
                del self._claims[name, index]
            elif now >= until or not self._board.claimed(domain, index):
                del self._claims[name, index]
                self._after(domain, domain.gate.forgo(index, now=now), now)

    def _hint(self, message: wire.Open, domain: Domain) -> int | None:
        last = len(domain.policy.classes) - 1
        if message.class_hint > last:
            raise ProtocolError(
                wire.E_VALUE,
                "OPEN.class_hint",
                message.class_hint,
                f"0 to {last} (domain {domain.name} has {last + 1} classes)",
                message.request,
            )
        return message.class_hint if self._honour_hints else None

    def _queued(self, record: FlowRecord, domain: Domain) -> None:
        record.class_index = index = domain.gate.class_index_of(record.flow) or 0
        record.queues = tuple(domain.gate.queue_lengths())
        record.ahead = record.queues[index] - 1 + domain.gate.active()[index]
        if record.application is not None:
            record.application.send(
                wire.encode_queued(
                    wire.Queued(
                        record.request,
                        record.flow,
                        index,
                        max(0, record.ahead),
                        domain.max_wait_ms,
                    )
                )
            )

    def _record(self, application: Application, request: int, kind: str) -> FlowRecord:
        record = application.flows.get(request)
        if record is None:
            raise ProtocolError(
                wire.E_UNKNOWN,
                f"{kind}.request",
                request,
                "the request of an open flow of this connection",
                request,
            )
        assert isinstance(record, FlowRecord)
        return record

    def _done(self, application: Application, message: wire.Done, _: socket.socket | None) -> None:
        record = self._record(application, message.request, "DONE")
        now = self._now()
        record.sent_bytes = message.bytes_sent
        now_ns = int(now * 1e9)
        ended_ns = now_ns
        earliest = int(record.arrived * 1e9) - _STAMP_SLACK_NS
        if earliest <= message.started_ns <= message.ended_ns <= now_ns + _STAMP_SLACK_NS:
            record.started_ns, ended_ns = message.started_ns, message.ended_ns
        elif record.released >= 0:
            record.started_ns = int(record.released * 1e9)
        self._end(record, "done", now, ended_ns)

    def _announce(
        self, application: Application, message: wire.Announce, _: socket.socket | None
    ) -> None:
        record = self._record(application, message.request, "ANNOUNCE")
        domain = record.domain
        if domain is None or record.outcome != SENDING:
            return
        if message.bytes_left > domain.early_fin_bytes:
            self.counts.early_announcements += 1  # a hand-over is of so many bytes at most
            return
        now = self._now()
        self._after(domain, domain.gate.announce(record.flow, now=now), now)

    def _cancel(
        self, application: Application, message: wire.Cancel, _: socket.socket | None
    ) -> None:
        record = self._record(application, message.request, "CANCEL")
        self._end(record, "cancelled", self._now())

    def _stats(
        self, application: Application, message: wire.Stats, _: socket.socket | None
    ) -> None:
        if message.domain and message.domain not in self.domains:
            known = ", ".join(sorted(self.domains)) or "none"
            raise ProtocolError(
                wire.E_UNKNOWN,
                "STATS.domain",
                message.domain,
                f"one of this agent's domains ({known})",
                message.request,
            )
        chosen = [d for d in self.domains.values() if message.domain in ("", d.name)]
        application.send(
            wire.encode_stats_reply(
                wire.StatsReply(
                    message.request,
                    arrivals=sum(d.meter.arrivals for d in chosen),
                    finished=sum(d.meter.finished for d in chosen),
                    degraded=sum(d.meter.degraded.total() for d in chosen),
                    waiting=sum(sum(d.gate.queue_lengths()) for d in chosen),
                    active=sum(sum(d.gate.active()) for d in chosen),
                    connections=self.connections(),
                    classes=sum(len(d.policy.classes) for d in chosen),
                )
            )
        )

    # -- marks ------------------------------------------------------------------------------------

    def _mark_flow(
        self, application: Application, message: wire.Mark, passed: socket.socket | None
    ) -> None:
        record = self._record(application, message.request, "MARK")
        if passed is None:
            raise ProtocolError(
                wire.E_SOCKET, "descriptors", 0, "one socket with MARK", message.request
            )
        if not self._mark_socket(record, passed):
            raise ProtocolError(
                wire.E_SOCKET,
                "descriptor",
                "this socket",
                "one this agent may mark (CAP_NET_ADMIN, and a domain)",
                message.request,
            )
        domain = record.domain
        assert domain is not None
        index = record.class_index
        priority, dscp = domain.mark_of(index)
        application.send(wire.encode_marked(wire.Marked(message.request, index, dscp, priority)))

    def _mark_only(
        self,
        application: Application,
        message: wire.Open,
        domain: Domain | None,
        hint: int | None,
        passed: socket.socket | None,
    ) -> None:
        if passed is None or domain is None:
            raise ProtocolError(
                wire.E_SOCKET,
                "OPEN",
                "no socket" if passed is None else "no domain",
                "one socket and a domain to mark it for",
                message.request,
            )
        index = domain.policy.class_of(message.size_bytes) if hint is None else hint
        priority, dscp = domain.mark_of(index)
        if not self._try_mark(passed, priority, dscp):
            raise ProtocolError(
                wire.E_SOCKET,
                "descriptor",
                "this socket",
                "one this agent may mark (CAP_NET_ADMIN)",
                message.request,
            )
        application.send(wire.encode_marked(wire.Marked(message.request, index, dscp, priority)))

    def _mark_socket(self, record: FlowRecord, passed: socket.socket) -> bool:
        domain = record.domain
        if domain is None:
            return False
        wanted = domain.mark_of(record.class_index)
        if not self._try_mark(passed, *wanted):
            return False
        record.mark = wanted
        return True

    def _try_mark(self, passed: socket.socket, priority: int, dscp: int) -> bool:
        """Whether the socket now is in the class; where nothing classifies, it always is."""
        if not priority and not dscp:
            return True
        try:
            marked = self._mark(passed, priority=priority, dscp=dscp)
        except OSError as error:
            self.counts.mark_failures += 1
            log.debug("cannot mark", extra={"reason": str(error)})
            return False
        if not marked.priority:
            self.counts.mark_failures += 1
            return False
        self.counts.marks += 1
        return True

    # -- gate -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Release what has waited too long; call at the time told to ``woken``, or later."""
        now = self._now()
        self._wake_at = None
        if self._claims:
            self._check_claims(now)
            if self._claims:
                fresh = now < max(self._claims.values()) - CLAIM_S + _CLAIM_SPIN_S
                self._wake_at = now if fresh else now + _CLAIM_CHECK_S
                self._woken(self._wake_at)
        for domain in self.domains.values():
            if domain.timer is not None and domain.timer <= now:
                self._after(domain, domain.gate.expire(now=now), now)
        for domain in self.domains.values():
            self._watch(domain)

    def released(self, domain: Domain, releases: list[Release]) -> None:
        """The gate released flows for a reason from outside (a turn, a link that came back)."""
        self._after(domain, releases, self._now())

    def _after(self, domain: Domain, releases: list[Release], now: float) -> None:
        """What follows every call of the gate. The order matters: see the module's docstring.

        The board comes first: who is granted a class must not be seen to leave it free.
        """
        if self._board is not None:
            self._board.show(domain)
        granted = []
        for release in releases:
            record = self.flows.get(release.flow)
            if record is not None:
                self._grant(record, release, now)
                granted.append(record)
        self._changed(domain)
        for record in granted:
            domain.meter.released(record.class_index, now - record.arrived, record.degraded)
        domain.timer = domain.gate.next_timer()
        self._watch(domain)

    def _watch(self, domain: Domain) -> None:
        timer = domain.timer
        if timer is not None and (self._wake_at is None or timer < self._wake_at):
            self._wake_at = timer
            self._woken(timer)

    def _grant(self, record: FlowRecord, release: Release, now: float) -> None:
        """Tell the application; the caller counts it when all who are released have been told."""
        record.class_index = index = release.class_index
        record.released = now
        record.degraded = release.degraded
        record.outcome = SENDING
        application = record.application
        if application is None:
            return
        reason = wire.REASON_CODES.get(release.degraded, wire.REASON_CODES["policy"])
        domain = record.domain
        if domain is None:
            packet = wire.pack_grant(record.request, record.flow, index, 0, reason, 0, 0, 0, 0)
        else:
            mark = domain.mark_of(index)
            priority, dscp = mark
            flags = domain.grant_flags
            if record.mark == mark:
                flags |= wire.GRANT_MARKED
            packet = wire.pack_grant(
                record.request, record.flow, index, dscp, reason, flags, priority,
                domain.early_fin_bytes, domain.rate_bps,
            )  # fmt: skip
        application.send(packet)

    def _end(self, record: FlowRecord, outcome: str, now: float, ended_ns: int = 0) -> None:
        """The flow leaves: DONE, CANCEL or the application's end."""
        application = record.application
        if application is not None:
            application.flows.pop(record.request, None)
        del self.flows[record.flow]
        sent = outcome == "done" and record.outcome == SENDING
        record.application = None
        record.ended = now
        record.outcome = outcome
        domain = record.domain
        if domain is not None:
            leave = domain.gate.finish if sent else domain.gate.cancel
            releases = leave(record.flow, now=now)
            self._after(domain, releases, now)
            for release in releases:
                heir = self.flows.get(release.flow)
                if heir is not None and ended_ns and not release.degraded:
                    heir.previous_end_ns = ended_ns
            self._measure(record, domain.meter, sent)
        self._recent.append(record)
        if not self.flows:
            self.emptied()

    def _measure(self, record: FlowRecord, meter: Meter, sent: bool) -> None:
        if not sent:
            meter.cancelled += 1
            return
        meter.done(record.class_index, record.ended - record.arrived, record.sent_bytes)
        if record.previous_end_ns:
            meter.handed_over((record.started_ns - record.previous_end_ns) / 1e9)

    # -- for people -------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What the controller hears of each domain, without the state of tc."""
        now = self._now()
        body = {}
        for name, domain in self.domains.items():
            part = domain.meter.report(now)
            part["queue"] = domain.gate.queue_lengths()
            part["active"] = domain.gate.active()
            body[name] = part
        return body

    def find(self, flow: int) -> FlowRecord | None:
        """A flow that is open or ended not long ago."""
        record = self.flows.get(flow)
        if record is not None:
            return record
        return next((r for r in reversed(self._recent) if r.flow == flow), None)

    def recent(self, count: int) -> list[FlowRecord]:
        """The newest ended flows, newest first."""
        return [record for _, record in zip(range(count), reversed(self._recent), strict=False)]

    def explain(self, flow: int) -> dict[str, Any]:
        """What was decided for a flow, from which inputs, what else was possible.

        Raises InputError if the flow is not known (any more).
        """
        record = self.find(flow)
        if record is None:
            expected = f"an open flow or one of the last {self._recent.maxlen} that ended here"
            raise InputError("flow", flow, expected)
        return explain(record, self._now())
