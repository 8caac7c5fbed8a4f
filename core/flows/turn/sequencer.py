"""The sequencer's decisions: ids, leases, epochs, and what is over (dissertation, section 2.4.4).

One counter per (domain, class) gives out ids; members hold them; FINs, heartbeats and leases say
when they are over; probes ask. Pure: frames and ``now`` in, an answer out. The request path is
kept short: two dictionary look-ups, two structs. What it holds is in served.py. Every message
changes that one table of members, domains and ids: it stays one module, a little over the usual
length.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from intentd.core.errors import WireError
from intentd.core.flows.fin import Fin
from intentd.core.flows.policy import MAX_CLASSES, MAX_DOMAINS
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.ids import SPAN, Progress
from intentd.core.flows.turn.served import (
    Registered,
    ServedDomain,
    domain_from_plain,
    domain_to_plain,
)

_REQUEST_BYTES: Final = wire.REQUEST_STRUCT.size
_REQUEST_HEAD: Final = bytes((wire.REQUEST, wire.VERSION))
_unpack_request = wire.REQUEST_STRUCT.unpack
_pack_tickets = wire.TICKETS_STRUCT.pack
_BITMAP: Final = (1 << (8 * wire.MAX_BITMAP_BYTES)) - 1


@dataclass(frozen=True, slots=True)
class SequencerSettings:
    """Bounds and periods.

    lease_s: a member unheard for so long is dead. heartbeat_s: how often members say they live.
    recover_s: after a restart, how long members' holdings are collected before ids are given out;
    at least a lease, so that whoever does not come back in time knows that its marks are void.
    doubt_s: how long a start that counts on a lapsed lease is marked so; at least a lease.
    domains: names served; empty: any, up to max_domains.
    """

    lease_s: float = 1.0
    heartbeat_s: float = 0.16
    recover_s: float = 1.0
    doubt_s: float = 1.0
    domains: tuple[str, ...] = ()
    max_domains: int = MAX_DOMAINS
    max_members: int = 4096
    max_in_flight: int = 64


def _settings_to_plain(settings: SequencerSettings) -> dict[str, Any]:
    return {**asdict(settings), "domains": list(settings.domains)}


def _runs(class_index: int, base: int, mask: int, announced: bool) -> list[wire.Run]:
    """The set bits as runs of ids, ascending."""
    runs = []
    while mask:
        low = (mask & -mask).bit_length() - 1
        above = mask >> low
        count = (~above & (above + 1)).bit_length() - 1
        runs.append(wire.Run(class_index, base + 1 + low, count, announced))
        mask = above >> count << (low + count)
    return runs


def _announce(progress: Progress, class_index: int, base: int, mask: int) -> None:
    for run in _runs(class_index, base, mask, True):
        progress.announce(run.first, run.count)


class SequencerCore:
    """Turns of many domains. Everything it keeps is bounded by its settings.

    epoch: larger than any before, made durable by the shell before this object exists.
    previous: the epoch served before, 0 if unknown: only holdings of that one are taken up again.
    For recover_s after the start it collects them, and at least until promised_until, when leases
    that the epoch before gave for a pause end; ids and knowledge are given out afterwards.
    Every frame yields at most one answer, to its sender.
    """

    def __init__(
        self,
        settings: SequencerSettings,
        *,
        epoch: int,
        previous: int,
        now: float,
        promised_until: float = -math.inf,
    ) -> None:
        if settings.recover_s < settings.lease_s or settings.doubt_s < settings.lease_s:
            raise ValueError("recover_s and doubt_s: expected at least lease_s")
        if epoch <= previous:
            raise ValueError(f"epoch: got {epoch}, expected more than the one before ({previous})")
        self.settings = settings
        self.epoch = epoch
        self.previous = previous
        self.recovering = True
        self._recover_until = max(now + settings.recover_s, promised_until)
        self._served = {wire.name_id(name) for name in settings.domains}
        self._domains: dict[int, ServedDomain] = {}
        # by connection; for the shell to read
        self.sessions: dict[bytes, dict[int, Registered]] = {}
        self._members = 0
        self._first_id = 1  # for new domains: above every id of domains forgotten
        self.requests = 0
        self.ids = 0
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "repeated_requests",
                "stale_requests",
                "busy",
                "probes",
                "heartbeats",
                "hellos",
                "malformed",
                "newer_version",
                "unknown_sender",
                "refused",
                "superseded",
                "expired_members",
                "expired_ids",
                "finished_runs",
                "foreign_runs",
                "fins",
                "fins_unknown",
            ),
            0,
        )

    # -- frames --------------------------------------------------------------------------------

    def receive(self, peer: bytes, frame: bytes, now: float) -> bytes | None:
        """The answer to a frame, if any. peer: its connection. Never raises for bytes."""
        if len(frame) == _REQUEST_BYTES and frame[:2] == _REQUEST_HEAD:
            _, _, class_index, count, number, acked, domain_id, epoch = _unpack_request(frame)
            session = self.sessions.get(peer)
            if session is not None and epoch == self.epoch:
                member = session.get(domain_id)
                if member is not None:
                    return self._grant(member, class_index, count, number, acked, now)
            self.counts["unknown_sender"] += 1
            return wire.encode(wire.EpochChange(domain_id, self.epoch))
        try:
            message = wire.decode(frame)
        except WireError:
            return self._undecodable(frame)
        match message:
            case wire.Heartbeat():
                return self._on_heartbeat(peer, message, now)
            case wire.Probe():
                return self._on_probe(peer, message, now)
            case wire.Finished():
                return self._on_finished(peer, message, now)
            case wire.Hello():
                return self._on_hello(peer, message, now)
            case wire.Goodbye():
                return self._on_goodbye(peer, message, now)
            case _:
                self.counts["malformed"] += 1
                return None

    def finished(self, fin: Fin, now: float) -> None:
        """A FIN whose MAC held. Only what its sender holds is over."""
        domain = self._domains.get(fin.domain_id)
        member = domain.members.get(fin.sender) if domain else None
        if member is None or member.boot != fin.boot or fin.epoch != self.epoch:
            self.counts["fins_unknown"] += 1
            return
        self.counts["fins"] += 1
        member.heard = now
        for run in fin.runs:
            self._over(member, run)

    def tick(self, now: float) -> None:
        """Leases, doubts, the end of recovering. To be called every tenth of a lease or so."""
        if self.recovering and now >= self._recover_until:
            self._recovered()
        lease_s = self.settings.lease_s
        for domain in list(self._domains.values()):
            for member in [m for m in domain.members.values() if now > m.lease_until(lease_s)]:
                self._expire(member, now)
            for line in domain.lines:
                while line is not None and line.doubts and line.doubts[0][0] <= now:
                    _, base, mask = line.doubts.popleft()
                    line.progress.finish_mask(base, mask)
            for at in [at for at, until in domain.retired.items() if until <= now]:
                del domain.retired[at]
            idle = not domain.members and now > domain.empty_since + lease_s + self.settings.doubt_s
            if idle and not self.recovering:
                self._forget(domain)

    def status(self) -> dict[str, Any]:
        """For people: members, ids and counters."""
        return {
            "epoch": self.epoch,
            "recovering": self.recovering,
            "requests": self.requests,
            "ids": self.ids,
            "sessions": len(self.sessions),
            "counts": dict(self.counts),
            "domains": {
                domain.name: {
                    "members": sorted(member.name for member in domain.members.values()),
                    "classes": {
                        str(index): {
                            "issued": line.next_id - 1,
                            "floor": line.progress.floor,
                            "outstanding": line.next_id
                            - 1
                            - line.progress.floor
                            - line.progress.done.bit_count(),
                        }
                        for index, line in enumerate(domain.lines)
                        if line is not None
                    },
                }
                for domain in self._domains.values()
            },
        }

    # -- a planned restart ---------------------------------------------------------------------

    def pause(self, now: float, pause_s: float) -> list[tuple[bytes, bytes]]:
        """This process ends, the next one goes on: leases run for pause_s from now. The frames
        that say so, (peer, frame), are to be sent after ``keep`` was made durable."""
        frames = []
        for peer, session in self.sessions.items():
            for member in session.values():
                member.promised = max(member.promised, now + pause_s)
                pause = wire.Pause(
                    member.domain.id, self.epoch, member.sequence, int(pause_s * 1e3)
                )
                frames.append((peer, wire.encode(pause)))
        return frames

    def keep(self) -> dict[str, Any] | None:
        """All that the next process needs to go on in this epoch, JSON-ready; None while holdings
        of the epoch before are still collected. No frame may be answered after it.

        Going on is then as if this process had been stopped for a while (SIGSTOP): ids, answers
        and leases are the same, on the same clock; what was on the network in between is lost.
        """
        if self.recovering:
            return None
        return {
            "settings": _settings_to_plain(self.settings),
            "epoch": self.epoch,
            "previous": self.previous,
            "first_id": self._first_id,
            "domains": [domain_to_plain(domain) for domain in self._domains.values()],
        }

    @classmethod
    def resume(cls, settings: SequencerSettings, kept: dict[str, Any]) -> SequencerCore:
        """Go on where ``keep`` was called, on the same clock. Connections are new: members say
        Hello. Raises ValueError if settings are others, TypeError, KeyError for what keep did not
        write."""
        if kept["settings"] != _settings_to_plain(settings):
            raise ValueError("settings: got others than those the epoch began with")
        core = cls(settings, epoch=kept["epoch"], previous=kept["previous"], now=0.0)
        core.recovering = False
        core._first_id = kept["first_id"]
        for plain in kept["domains"]:
            domain = domain_from_plain(plain)
            core._domains[domain.id] = domain
            core._members += len(domain.members)
        return core

    def promised_until(self) -> float:
        """When the last lease ends that ``pause`` gave; -inf: none was."""
        return max(
            (m.promised for d in self._domains.values() for m in d.members.values()),
            default=-math.inf,
        )

    # -- requests ------------------------------------------------------------------------------

    def _grant(
        self, member: Registered, class_index: int, count: int, number: int, acked: int, now: float
    ) -> bytes | None:
        if class_index >= MAX_CLASSES or not 1 <= count <= wire.MAX_IDS:
            self.counts["malformed"] += 1
            return None
        if self.recovering:
            return None
        member.heard = now
        answered = member.answered
        if acked > member.acked:
            self._ack(member, acked)
        if number in answered:
            self.counts["repeated_requests"] += 1
            return answered[number][3]
        if number <= member.acked:
            self.counts["stale_requests"] += 1
            return None
        domain = member.domain
        line = domain.lines[class_index] or domain.line(class_index)
        progress = line.progress
        first = line.next_id
        held = member.held.get(class_index)
        if held is None:
            held = member.held[class_index] = [progress.floor, 0]
        if first + count - progress.floor > SPAN or len(answered) >= self.settings.max_in_flight:
            self.counts["busy"] += 1
            return wire.encode(
                wire.Error(domain.id, wire.ERROR_BUSY, number, "too many ids outstanding")
            )
        line.next_id = first + count
        shift = first - 1 - held[0]
        if shift > 1024:
            gained = progress.floor - held[0]
            held[0] += gained
            held[1] >>= gained
            shift -= gained
        held[1] |= ((1 << count) - 1) << shift
        answer = _pack_tickets(
            wire.TICKETS,
            wire.VERSION,
            class_index,
            count,
            number,
            domain.id,
            self.epoch,
            first,
            progress.floor,
        )
        answered[number] = (class_index, first, count, answer)
        self.requests += 1
        self.ids += count
        return answer

    def _ack(self, member: Registered, acked: int) -> None:
        member.acked = acked
        answered = member.answered
        if acked in answered and len(answered) == 1:  # one request at a time
            answered.clear()
        else:
            for number in [number for number in answered if number <= acked]:
                del answered[number]

    # -- the other messages --------------------------------------------------------------------

    def _undecodable(self, frame: bytes) -> bytes | None:
        if wire.is_newer(frame):
            self.counts["newer_version"] += 1
            text = f"version {frame[1]} is newer than {wire.VERSION}: upgrade the sequencer"
            return wire.encode(wire.Error(0, wire.ERROR_VERSION, 0, text))
        self.counts["malformed"] += 1
        return None

    def _member(self, peer: bytes, domain_id: int, epoch: int) -> Registered | None:
        session = self.sessions.get(peer)
        member = session.get(domain_id) if session and epoch == self.epoch else None
        if member is None:
            self.counts["unknown_sender"] += 1
        return member

    def _on_heartbeat(self, peer: bytes, message: wire.Heartbeat, now: float) -> bytes:
        member = self._member(peer, message.domain_id, message.epoch)
        if member is None:
            return wire.encode(wire.EpochChange(message.domain_id, self.epoch))
        self.counts["heartbeats"] += 1
        member.heard = now
        self._sync(member, message.sequence, message.acked, message.held)
        return wire.encode(wire.Beat(message.domain_id, self.epoch, message.sequence))

    def _on_probe(self, peer: bytes, message: wire.Probe, now: float) -> bytes | None:
        member = self._member(peer, message.domain_id, message.epoch)
        if member is None:
            return wire.encode(wire.EpochChange(message.domain_id, self.epoch))
        self.counts["probes"] += 1
        member.heard = now
        if self.recovering:
            return None
        line = member.domain.line(message.class_index)
        progress = line.progress
        return wire.encode(
            wire.State(
                message.domain_id,
                self.epoch,
                message.class_index,
                message.number,
                progress.floor,
                line.next_id - 1,
                progress.done & _BITMAP,
                progress.lease & _BITMAP,
                progress.announced & _BITMAP,
            )
        )

    def _on_finished(self, peer: bytes, message: wire.Finished, now: float) -> bytes | None:
        member = self._member(peer, message.domain_id, message.epoch)
        if member is None:
            return wire.encode(wire.EpochChange(message.domain_id, self.epoch))
        member.heard = now
        for run in message.runs:
            self._over(member, run)
        return None

    def _on_goodbye(self, peer: bytes, message: wire.Goodbye, now: float) -> bytes | None:
        member = self._member(peer, message.domain_id, message.epoch)
        if member is not None:
            for class_index, (base, bits) in member.held.items():
                member.domain.line(class_index).progress.finish_mask(base, bits)
            self._remove(member, now)
        return None

    def _on_hello(self, peer: bytes, hello: wire.Hello, now: float) -> bytes:
        self.counts["hellos"] += 1
        sender = wire.name_id(hello.name)
        domain_id = wire.name_id(hello.domain)
        for other in self.sessions.get(peer, {}).values():
            if other.name != hello.name:
                text = "this connection has registered another name"
                return self._refuse(domain_id, wire.ERROR_NAME, hello, text)
        domain = self._domains.get(domain_id)
        member = domain.members.get(sender) if domain else None
        if member is not None and member.boot == hello.boot:
            self._bind(member, peer)
            member.heard = now
            if hello.epoch in (self.epoch, self.previous):
                self._sync(member, hello.sequence, hello.acked, hello.held)
            else:
                self._sync(member, hello.sequence, hello.acked, ())
            return self._welcome(member, hello, now)
        if domain is not None and (sender, hello.boot) in domain.retired:
            self.counts["superseded"] += 1
            text = f"another process registered as {hello.name}"[:50]
            return self._refuse(domain_id, wire.ERROR_SUPERSEDED, hello, text)
        if domain is None:
            if (self._served and domain_id not in self._served) or (
                len(self._domains) >= self.settings.max_domains
            ):
                return self._refuse(
                    domain_id, wire.ERROR_DOMAIN, hello, "domain not served by this sequencer"
                )
            if self._members >= self.settings.max_members:
                return self._refuse(domain_id, wire.ERROR_LIMIT, hello, "too many members")
            domain = self._domains[domain_id] = ServedDomain(
                hello.domain, domain_id, self._first_id, now
            )
        elif member is not None:
            self._expire(member, now)
            self.counts["superseded"] += 1
            # A repeat of the old process's Hello, still on its way, must not win the name back.
            domain.retired[sender, member.boot] = now + self.settings.lease_s
            while len(domain.retired) > self.settings.max_members:
                del domain.retired[next(iter(domain.retired))]
        elif self._members >= self.settings.max_members:
            return self._refuse(domain_id, wire.ERROR_LIMIT, hello, "too many members")
        member = Registered(domain, hello.name, hello.boot, peer, hello.sequence, now)
        member.acked = hello.acked
        domain.members[sender] = member
        self._members += 1
        self._bind(member, peer)
        if self.recovering and self.previous and hello.epoch == self.previous:
            for run in hello.held:
                self._take_up(member, run)
        return self._welcome(member, hello, now)

    def _refuse(self, domain_id: int, code: int, hello: wire.Hello, text: str) -> bytes:
        self.counts["refused"] += 1
        return wire.encode(wire.Error(domain_id, code, hello.sequence, text))

    def _welcome(self, member: Registered, hello: wire.Hello, now: float) -> bytes:
        accepted = []
        for run in hello.held:
            held = member.held.get(run.class_index)
            if held:
                kept = held[1] & self._mask(held, run)
                accepted += _runs(run.class_index, held[0], kept, run.announced)
        settings = self.settings
        recover_s = max(0.0, self._recover_until - now) if self.recovering else 0.0
        return wire.encode(
            wire.Welcome(
                member.domain.id,
                self.epoch,
                hello.sequence,
                max(2, int(settings.lease_s * 1e3)),
                max(1, int(settings.heartbeat_s * 1e3)),
                int(recover_s * 1e3) + 1 if self.recovering else 0,
                tuple(accepted[: wire.MAX_RUNS]),
            )
        )

    # -- what is over --------------------------------------------------------------------------

    def _mask(self, held: list[int], run: wire.Run) -> int:
        """The run's bits relative to the base of what a member holds; 0 if none fit."""
        start = run.first - 1 - held[0]
        end = min(start + run.count, 2 * SPAN)
        if end <= max(start, 0):
            return 0
        return ((1 << end) - 1) if start <= 0 else ((1 << (end - start)) - 1) << start

    def _over(self, member: Registered, run: wire.Run) -> None:
        """Of the run's ids, those this member holds are over (or announced)."""
        held = member.held.get(run.class_index)
        hit = held[1] & self._mask(held, run) if held else 0
        if not held or not hit:
            self.counts["foreign_runs"] += 1  # another's, or said before
            return
        self.counts["finished_runs"] += 1
        progress = member.domain.line(run.class_index).progress
        if run.announced:
            _announce(progress, run.class_index, held[0], hit)
        else:
            held[1] &= ~hit
            progress.finish_mask(held[0], hit)

    def _sync(
        self, member: Registered, sequence: int, acked: int, listed: tuple[wire.Run, ...]
    ) -> None:
        """The member states all it holds: what it no longer lists is over.

        Answers that it may not have seen yet (above acked) are left alone; a statement overtaken
        by a request that acknowledges more is too old to judge by.
        """
        if sequence <= member.sequence or acked < member.acked:
            return
        member.sequence = sequence
        if acked > member.acked:
            self._ack(member, acked)
        kept: dict[int, int] = {}
        for run in listed:
            held = member.held.get(run.class_index)
            if not held:
                continue
            mask = self._mask(held, run) & held[1]
            kept[run.class_index] = kept.get(run.class_index, 0) | mask
            if run.announced and mask:
                line = member.domain.line(run.class_index)
                _announce(line.progress, run.class_index, held[0], mask)
        for class_index, first, count, _ in member.answered.values():
            held = member.held[class_index]
            kept[class_index] = kept.get(class_index, 0) | (
                ((1 << count) - 1) << (first - 1 - held[0])
            )
        for class_index, held in member.held.items():
            over = held[1] & ~kept.get(class_index, 0)
            if over:
                held[1] &= ~over
                member.domain.line(class_index).progress.finish_mask(held[0], over)

    def _take_up(self, member: Registered, run: wire.Run) -> None:
        """While recovering: an id of the epoch before stays with its holder, number and all.

        The first id said in a class fixes a window of SPAN ids; one outside it, or one that
        another member said before, is not taken up.
        """
        line = member.domain.line(run.class_index)
        if not line.claimed:
            line.claim_base = max(0, run.first - 1 - SPAN // 2)
            line.progress = Progress(line.claim_base)
        base = line.claim_base
        shift = run.first - 1 - base
        if shift < 0 or shift + run.count > SPAN:
            return
        mask = ((1 << run.count) - 1) << shift
        if mask & line.claimed:
            return
        line.claimed |= mask
        held = member.held.setdefault(run.class_index, [base, 0])
        held[1] |= mask
        if run.announced:
            line.progress.announce(run.first, run.count)

    def _recovered(self) -> None:
        """The members' holdings are in: all other ids of the last epoch are over."""
        self.recovering = False
        for domain in self._domains.values():
            for line in domain.lines:
                if line is not None and line.claimed:
                    base = line.claim_base
                    top = line.claimed.bit_length()
                    line.next_id = base + top + 1
                    line.progress.finish_mask(base, ((1 << top) - 1) & ~line.claimed)
                    line.claimed = 0

    # -- members -------------------------------------------------------------------------------

    def _bind(self, member: Registered, peer: bytes) -> None:
        if member.peer != peer:
            self._unbind(member)
            member.peer = peer
        self.sessions.setdefault(peer, {})[member.domain.id] = member

    def _unbind(self, member: Registered) -> None:
        session = self.sessions.get(member.peer)
        if session is not None and session.get(member.domain.id) is member:
            del session[member.domain.id]
            if not session:
                del self.sessions[member.peer]

    def _expire(self, member: Registered, now: float) -> None:
        """Its lease ran out, or another process took its name: what it held is over, in doubt."""
        domain = member.domain
        self.counts["expired_members"] += 1
        for class_index, (base, bits) in member.held.items():
            if bits:
                self.counts["expired_ids"] += bits.bit_count()
                line = domain.line(class_index)
                line.progress.expire_mask(base, bits)
                # whoever was promised more may count on it for longer
                settles = max(now + self.settings.doubt_s, member.promised)
                line.doubts.append((settles, base, bits))
        self._remove(member, now)

    def _remove(self, member: Registered, now: float) -> None:
        self._unbind(member)
        domain = member.domain
        del domain.members[wire.name_id(member.name)]
        self._members -= 1
        if not domain.members:
            domain.empty_since = now

    def _forget(self, domain: ServedDomain) -> None:
        """A domain without members goes; its ids do not come back in this epoch."""
        for line in domain.lines:
            if line is not None:
                self._first_id = max(self._first_id, line.next_id)
        del self._domains[domain.id]
