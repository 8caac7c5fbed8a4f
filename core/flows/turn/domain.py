"""The gate of one link domain at an agent: local order and global turns behind one object.

Flows of locally ordered classes, and flows below one bandwidth-delay product (local sequencing,
dissertation, section 2.4.5), go through the FlowGate. Flows of globally ordered classes wait for
their turn with the TurnMember. Without a lease from the sequencer the latter go through the
FlowGate too, marked "fallback". The daemon and the simulator drive this same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from intentd.core.errors import InputError, StateError
from intentd.core.flows.fin import Fin
from intentd.core.flows.gate import (
    MAX_FLOWS,
    MAX_SIZE_BYTES,
    RACED,
    FlowGate,
    GateFullError,
    Release,
)
from intentd.core.flows.policy import UNLIMITED, ClassPolicy, DomainPolicy
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.member import (
    TIMEOUT,
    MemberState,
    Outgoing,
    TurnMember,
    TurnTiming,
)

FALLBACK: Final = "fallback"  # no sequencer: local order only

_GATE: Final = 0  # ordered here alone, as the policy has it
_TURN: Final = 1  # waits for, or has, a turn
_FALLBACK: Final = 2  # should have a turn, but there is no lease
_LOOSE: Final = 3  # let go after max_wait, in nobody's queue any more

_AWAY: Final = MemberState.AWAY  # as in gate.py: cheaper to read than a member of its class
_MEMBER: Final = MemberState.MEMBER


@dataclass(slots=True)
class _Flow:
    size_bytes: int
    arrived: float
    named: int | None  # the class the application named
    where: int
    mark: str | None = None  # None: waiting
    announced: bool = False


class DomainGate:
    """Which flows of one domain may send now, and what must be told to whom.

    The same calls as FlowGate, with the same errors, and besides: ``handle`` for messages of the
    sequencer and verified FINs, ``connected`` for the link, ``poll_outbox`` for what to send. A
    flow is waiting, then sending (some call returned its Release), then gone. Every start is
    marked ordered ("") or degraded with a reason; ``starts`` counts them by mark. A mark holds as
    long as the lease: when it runs out the running flows' marks become "lease" (``demoted``).

    name: the agent's, unique among the domain's agents; boot: 64 random bits of this process.
    """

    def __init__(
        self,
        policy: DomainPolicy,
        *,
        name: str,
        boot: int,
        timing: TurnTiming | None = None,
        max_flows: int = MAX_FLOWS,
    ) -> None:
        self.policy = policy
        self.max_flows = max_flows
        self.domain_id = wire.name_id(policy.domain)
        self.starts: dict[str, int] = {}
        self.misdirected = 0  # messages of another domain, or of a type that agents do not get
        self._gate = FlowGate(policy, max_flows=max_flows)
        self._turn = TurnMember(policy, name=name, boot=boot, timing=timing)
        self._flows: dict[int, _Flow] = {}
        self._deadlines: list[tuple[float, int]] = []  # (arrived, flow) of those moved to the gate
        self._fallen_back = True  # flows may wait in the gate that should have a turn
        self._all_local = _all_local(policy)

    # -- flows ---------------------------------------------------------------------------------

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

        started: it sends already, because ``admits`` told its class was free.
        Raises InputError for a bad size or class, GateFullError, StateError for an id in use.
        """
        if not 0 <= size_bytes <= MAX_SIZE_BYTES:  # NaN fails too
            raise InputError("size_bytes", size_bytes, f"a size in 0 to {MAX_SIZE_BYTES}")
        if class_index is not None and not 0 <= class_index < len(self.policy.classes):
            raise InputError("class_index", class_index, f"0 to {len(self.policy.classes) - 1}")
        if flow in self._flows:
            raise StateError(f"flow {flow} arrives, but is held already")
        if len(self._flows) >= self.max_flows:
            raise GateFullError(self.policy.domain, self.max_flows)
        entry = _Flow(size_bytes, now, class_index, _GATE)
        self._flows[flow] = entry
        if self._all_local:  # not _route and _out: this is every flow's way where no host asks
            released = self._gate.arrive(
                flow, size_bytes, now=now, class_index=class_index, started=started
            )
            return self._marked(released)
        if started:
            return self._out([self._started(flow, entry, now)], now)
        return self._out(self._route(flow, entry, now), now)

    def finish(self, flow: int, *, now: float) -> list[Release]:
        """A sending flow has sent everything."""
        entry = self._sending(flow, "finishes")
        del self._flows[flow]
        if entry.where == _TURN:
            return self._out(self._turn.finish(flow, now=now), now)
        if entry.where == _LOOSE:
            return self._out([], now)
        released = self._gate.finish(flow, now=now)
        return self._marked(released) if self._all_local else self._out(released, now)

    def cancel(self, flow: int, *, now: float) -> list[Release]:
        """The application gave up, or died, in any state."""
        entry = self._flows.pop(flow, None)
        if entry is None:
            raise StateError(f"flow {flow} is cancelled, but is not held")
        if entry.where == _TURN:
            return self._out(self._turn.cancel(flow, now=now), now)
        if entry.where == _LOOSE:
            return self._out([], now)
        return self._out(self._gate.cancel(flow, now=now), now)

    def announce(self, flow: int, *, now: float) -> list[Release]:
        """Early FIN: the turn passes on though the flow still sends. Again: nothing."""
        entry = self._sending(flow, "announces its end")
        entry.announced = True
        if entry.where == _TURN:
            return self._out(self._turn.announce(flow, now=now), now)
        if entry.where == _LOOSE:
            return self._out([], now)
        return self._out(self._gate.announce(flow, now=now), now)

    def expect(self, class_index: int, *, now: float) -> None:
        """A flow has started by ``admits`` and will arrive: until then nobody gets its place."""
        self._gate.expect(class_index, now=now)

    def forgo(self, class_index: int, *, now: float) -> list[Release]:
        """It will not arrive."""
        return self._out(self._gate.forgo(class_index, now=now), now)

    def expire(self, *, now: float) -> list[Release]:
        """Serve every timer that is due: max_wait, heartbeats, probes, repeats, the lease."""
        released = self._turn.expire(now=now)
        while self._deadlines and now >= self._deadlines[0][0] + self.policy.max_wait_s:
            _, flow = heappop(self._deadlines)
            entry = self._flows.get(flow)
            if entry is None or entry.mark is not None or entry.where == _TURN:
                continue
            index = self._gate.class_index_of(flow)
            released += self._gate.cancel(flow, now=now)
            entry.where = _LOOSE
            released.append(Release(flow, index or 0, TIMEOUT))
        released += self._gate.expire(now=now)
        return self._out(released, now)

    def next_timer(self) -> float | None:
        """When expire has something to do, on the clock of `now`."""
        earliest = self._turn.next_timer()
        local = self._gate.next_timer()
        if earliest is None or (local is not None and local < earliest):
            earliest = local
        if self._deadlines:
            moved = self._deadlines[0][0] + self.policy.max_wait_s
            if earliest is None or moved < earliest:
                earliest = moved
        return earliest

    def set_policy(self, policy: DomainPolicy, *, now: float) -> list[Release]:
        """Follow another policy of this domain; nothing waiting is lost, running flows go on."""
        if policy.domain != self.policy.domain:
            raise InputError("domain", policy.domain, f"this gate's domain ({self.policy.domain})")
        if policy == self.policy:
            return self._out([], now)
        moved: list[tuple[float, int, _Flow]] = []
        withdrawn = []
        released: list[Release] = []
        self.policy = policy
        self._all_local = _all_local(policy)
        waits_for_turn = set(self._turn.waiting_flows())
        for flow, entry in self._flows.items():
            if entry.mark is not None:
                continue
            if entry.named is not None and entry.named >= len(policy.classes):
                entry.named = None
            index = self._class_of(entry)
            turns = self._needs_turn(entry, index)
            if entry.where == _TURN:
                if flow not in waits_for_turn:
                    continue  # in a batch whose turn has come
                if not turns or self._turn.class_index_of(flow) != index:
                    withdrawn.append(flow)
                    moved.append((entry.arrived, flow, entry))
            elif turns != (entry.where == _FALLBACK):
                released += self._gate.cancel(flow, now=now)
                moved.append((entry.arrived, flow, entry))
        self._turn.withdraw(withdrawn, now=now)
        released += self._gate.set_policy(policy, now=now)
        released += self._turn.set_policy(policy, now=now)
        for _, flow, entry in sorted(moved, key=lambda row: row[:2]):
            released += self._route(flow, entry, now)
        return self._out(released, now)

    # -- the network ---------------------------------------------------------------------------

    def connected(self, up: bool, *, now: float) -> list[Release]:
        """The link to the sequencer came up or went down."""
        self._turn.connected(up, now=now)
        return self._out([], now)

    def handle(self, message: wire.Message | Fin, *, now: float) -> list[Release]:
        """A decoded message of the sequencer, or a FIN that FinVerifier let through."""
        if message_domain(message) != self.domain_id:
            self.misdirected += 1
            return self._out([], now)
        if isinstance(message, Fin):
            released = self._turn.handle_fin(message.sender, message.epoch, message.runs, now=now)
        else:
            released = self._turn.handle(message, now=now)
        return self._out(released, now)

    def poll_outbox(self) -> list[Outgoing]:
        """What to send, once: wire messages for the sequencer, Broadcasts to sign as FINs."""
        return self._turn.poll_outbox()

    def goodbye(self, *, now: float) -> list[Release]:
        """The agent stops on purpose: what it holds is over; the sequencer is told."""
        self._turn.goodbye(now=now)
        return self._out([], now)

    # -- looking -------------------------------------------------------------------------------

    @property
    def member(self) -> TurnMember:
        """For status and the simulator: state, epoch, tickets."""
        return self._turn

    @property
    def demoted(self) -> int:
        """Flows that started in order and whose mark was withdrawn."""
        return self._turn.demoted + self._gate.demoted

    @property
    def handed_over(self) -> int:
        """Flows that started in order while the one before sent its announced last bytes."""
        return self._turn.handed_over + self._gate.handed_over

    def class_index_of(self, flow: int) -> int | None:
        """Class of a flow held here, else None."""
        entry = self._flows.get(flow)
        if entry is None:
            return None
        holder = self._turn if entry.where == _TURN else self._gate
        index = holder.class_index_of(flow)
        return self._class_of(entry) if index is None else index

    def mark_of(self, flow: int) -> str | None:
        """The mark of a sending flow as it stands now; None while it waits."""
        entry = self._flows.get(flow)
        if entry is None:
            return None
        if entry.where == _TURN:
            return self._turn.mark_of(flow)
        if entry.where == _GATE and entry.mark == "":
            return self._gate.mark_of(flow)
        return entry.mark

    def queue_lengths(self) -> list[int]:
        """Flows waiting, per class."""
        return [
            length + self._turn.queue_length(index)
            for index, length in enumerate(self._gate.queue_lengths())
        ]

    def admits(self) -> list[int]:
        """Per class, 1 if the next arrival starts at once, 2 if only one up to local_below_bytes.

        The latter are the classes in which hosts take turns: what is larger waits for one.
        """
        free = self._gate.admits()
        if not self._all_local:
            small = 2 if self.policy.local_below_bytes else 0
            for index, cls in enumerate(self.policy.classes):
                if free[index] and _takes_turns(cls):
                    free[index] = small
        return free

    def active(self) -> list[int]:
        """Flows sending, announced ones too, per class."""
        counts = self._gate.active()
        for index, more in enumerate(self._turn.active(len(counts))):
            counts[index] += more
        return counts

    def __len__(self) -> int:
        return len(self._flows)

    # -- inside --------------------------------------------------------------------------------

    def _class_of(self, entry: _Flow) -> int:
        if entry.named is not None:
            return entry.named
        return self.policy.class_of(entry.size_bytes)

    def _needs_turn(self, entry: _Flow, index: int) -> bool:
        """Dispatch to the first empty class (Baraat) knows only this agent's classes: local."""
        cls = self.policy.classes[index]
        return (
            _takes_turns(cls)
            and entry.size_bytes > self.policy.local_below_bytes
            and (self.policy.dispatch == "size" or entry.named is not None)
        )

    def _route(self, flow: int, entry: _Flow, now: float) -> list[Release]:
        index = self._class_of(entry)
        if not self._needs_turn(entry, index):
            entry.where = _GATE
        elif self._turn.state is _AWAY:
            entry.where = _FALLBACK
        else:
            entry.where = _TURN
            return self._turn.arrive(
                flow, entry.size_bytes, class_index=index, now=now, arrived=entry.arrived
            )
        if entry.arrived < now:
            heappush(self._deadlines, (entry.arrived, flow))
        return self._gate.arrive(flow, entry.size_bytes, now=now, class_index=entry.named)

    def _started(self, flow: int, entry: _Flow, now: float) -> Release:
        """A flow that did not wait. Where it should have, for a turn, it stands beside the order:
        that class was not offered, so only a change of policy on its way brings it here."""
        index = self._class_of(entry)
        if self._needs_turn(entry, index):
            entry.where = _LOOSE
            return Release(flow, index, RACED)
        (release,) = self._gate.arrive(
            flow, entry.size_bytes, now=now, class_index=entry.named, started=True
        )
        return release

    def _out(self, released: list[Release], now: float) -> list[Release]:
        """After every call: move flows if the lease came or went, then mark and count."""
        marked = self._marked(released)
        if self._turn.state is _AWAY:
            flows = self._turn.waiting_flows()
            if flows:
                self._turn.withdraw(flows, now=now)
                for flow in flows:
                    marked += self._marked(self._route(flow, self._flows[flow], now))
            self._fallen_back = True
        elif self._turn.state is _MEMBER and self._fallen_back:
            self._fallen_back = False
            waiting = [
                (entry.arrived, flow, entry)
                for flow, entry in self._flows.items()
                if entry.where == _FALLBACK and entry.mark is None
            ]
            for _, flow, entry in sorted(waiting, key=lambda row: row[:2]):
                marked += self._marked(self._gate.cancel(flow, now=now))
                marked += self._marked(self._route(flow, entry, now))
        return marked

    def _marked(self, released: list[Release]) -> list[Release]:
        """Put the marks on, in place, and count them."""
        for place, release in enumerate(released):
            entry = self._flows[release.flow]
            if entry.where == _FALLBACK and not release.degraded:
                release = released[place] = release._replace(degraded=FALLBACK)
            entry.mark = release.degraded
            self.starts[release.degraded] = self.starts.get(release.degraded, 0) + 1
        return released

    def _sending(self, flow: int, does: str) -> _Flow:
        entry = self._flows.get(flow)
        if entry is None or entry.mark is None:
            what = "the gate does not hold it" if entry is None else "it waits"
            raise StateError(f"flow {flow} {does}, but {what}; {self._turn.story()}")
        return entry


def _takes_turns(cls: ClassPolicy) -> bool:
    return cls.sequencing == "global" and cls.mpl != UNLIMITED


def _all_local(policy: DomainPolicy) -> bool:
    return not any(_takes_turns(cls) for cls in policy.classes)


def message_domain(message: wire.Message | Fin) -> int:
    """The id of the domain a message is about, for the shell to find its gate."""
    return wire.name_id(message.domain) if isinstance(message, wire.Hello) else message.domain_id
