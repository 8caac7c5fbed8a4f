"""The turn protocol under faults: real SequencerCore and DomainGates, a virtual clock, one seed.

A run has three parts: calm, in which agents register; faults (loss, kills, pauses, cuts); healed.
Checked at every start that is marked ordered, over all agents whose lease runs by their own
clocks: fewer than mpl earlier ids of the class are held there, with those in hand-over fewer than
2 mpl, and at most mpl flows that started in order are sending. Checked besides: no flow starts
twice, no id is given out twice in an epoch, every flow of a living agent starts within max_wait,
and what arrives more than RECOVERY_S after healing starts in order. A mark is vouched for by a
living agent that holds its lease; what a dead or cut-off agent's applications still send is not
counted (its successor's start is: "lease").
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Final

from intentd.core.flows.fin import FinSigner, FinVerifier
from intentd.core.flows.gate import Release
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.domain import DomainGate
from intentd.core.flows.turn.member import Broadcast
from intentd.core.flows.turn.sequencer import SequencerCore, SequencerSettings
from intentd.core.sim.engine import Engine, Event
from intentd.core.sim.fault_runs import FaultRun, Faults
from intentd.core.sim.mishaps import SEQUENCER, Mishaps
from intentd.core.sim.network import Network

KEY: Final = bytes(32)
RECOVERY_S: Final = 2.0
LATE_S: Final = 0.005  # a timer may run so much after its time
SMALL_BYTES: Final = 10_000
_CALM_UNTIL_S: Final = 1.5
_FAULTS_S: Final = (1.5, 3.0)
_AFTER_S: Final = RECOVERY_S + 1.0
_MAX_WAIT_S: Final = 2.5
_TICK_S: Final = 0.1
_PAUSE_S: Final = 3.0  # of a planned restart; it may end in a crash
_LATE_REASONS: Final = ("lease", "fallback", "timeout")


class Agent:
    """One host: its gate, its flows, its clock; a kill forgets all but the clock."""

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim = sim
        self.name = name
        self.offset = sim.rng.uniform(0, 1000)
        self.rate = 1 + sim.rng.uniform(-0.01, 0.01)
        self.alive = False
        self.paused = False
        self.paused_s = 0.0  # in all
        self.paused_since = 0.0
        self.linked = False
        self.timer: Event | None = None
        self.backlog: deque[Callable[[], None]] = deque()
        self.arrived: dict[int, float] = {}  # waiting flows, on the clock of running_s
        self.sending: dict[int, float] = {}  # started flows

    def clock(self) -> float:
        return self.offset + self.sim.engine.now * self.rate

    def running_s(self) -> float:
        """Time without pauses: a stopped process starts nothing, and is not blamed for it."""
        now = self.sim.engine.now
        return now - self.paused_s - (now - self.paused_since if self.paused else 0.0)

    def pause(self) -> None:
        if not self.paused:
            self.paused = True
            self.paused_since = self.sim.engine.now

    def boot(self) -> None:
        boot = self.sim.rng.getrandbits(64)
        self.gate = DomainGate(self.sim.policy, name=self.name, boot=boot)
        self.signer = FinSigner.from_domain_key(KEY, self.name, boot)
        self.verifier = FinVerifier(KEY)
        self.alive = True
        self.resume()
        self.connect(self.sim.sequencer_up)

    def connect(self, up: bool) -> None:
        self.linked = up
        self.do(lambda: self.gate.connected(up, now=self.clock()))

    def kill(self) -> None:
        self.alive = False
        self.backlog.clear()
        self.arrived.clear()
        self.sending.clear()
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def resume(self) -> None:
        if self.paused:
            self.paused_s += self.sim.engine.now - self.paused_since
        self.paused = False
        while self.backlog and self.alive and not self.paused:
            self.backlog.popleft()()
        if self.alive:
            self.do(lambda: self.gate.expire(now=self.clock()))

    def do(self, call: Callable[[], list[Release]]) -> None:
        """One event for the gate, and everything that follows from it."""
        if not self.alive:
            return
        if self.paused:
            self.backlog.append(lambda: self.do(call))
            return
        for release in call():
            self.sim.started(self, release)
        for item in self.gate.poll_outbox():
            if isinstance(item, Broadcast):
                datagram = self.signer.sign(item.domain_id, item.epoch, item.runs)
                for other in self.sim.agents:
                    if other is not self:
                        self.sim.send_datagram(self, other, datagram)
                self.sim.send_to_sequencer(self, datagram, is_fin=True)
            else:
                self.sim.send_to_sequencer(self, wire.encode(item))
        self.plan()

    def plan(self) -> None:
        at = self.gate.next_timer()
        if at is None:
            if self.timer:
                self.timer.cancel()
                self.timer = None
            return
        when = max(self.sim.engine.now, (at - self.offset) / self.rate + 1e-9)
        if self.timer and not self.timer.cancelled:
            if abs(self.timer.when - when) < 1e-9:
                return
            self.timer.cancel()
        self.timer = self.sim.engine.at(when, self.expire)

    def expire(self) -> None:
        self.timer = None
        self.do(lambda: self.gate.expire(now=self.clock()))

    def frame(self, frame: bytes) -> None:
        message = wire.decode(frame)
        self.do(lambda: self.gate.handle(message, now=self.clock()))

    def datagram(self, datagram: bytes) -> None:
        def call() -> list[Release]:
            fin = self.verifier.accept(datagram)
            return [] if fin is None else self.gate.handle(fin, now=self.clock())

        self.do(call)

    def vouches(self) -> bool:
        """Alive, and by its own clock its lease runs."""
        return self.alive and self.gate.member.lease_left_s(self.clock()) > 0


class Simulation:
    """One seed: a sequencer, its agents, their flows, and the checks at every start."""

    def __init__(self, seed: int, faults: Faults, trace: bool) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.trace = trace
        self.run_ = FaultRun(seed)
        self.engine = Engine()
        self.network = Network(self.engine, random.Random(self.rng.getrandbits(64)))
        self.policy = self._policy()
        self.epoch = self.rng.randrange(0, 3) * 1000
        self.core: SequencerCore | None = None
        self.sequencer_up = False
        self.sequencer_paused = False
        self.queue: deque[Callable[[], None]] = deque()
        self.disk: tuple[str, float] = ("", -math.inf)  # turns that were left, leases promised
        self.granted: dict[tuple[int, int], set[int]] = {}
        self.agents = [Agent(self, f"agent-{i}") for i in range(self.rng.randint(2, 4))]
        wild = faults.any or faults.restart
        self.healed_s = _CALM_UNTIL_S + (self.rng.uniform(*_FAULTS_S) if wild else 0.0)
        self.end_s = self.healed_s + _AFTER_S
        self.next_flow = 0

    def _policy(self) -> DomainPolicy:
        rng = self.rng
        mpl = rng.choice((1, 1, 2, 3))
        classes = (
            ClassPolicy(SMALL_BYTES, 0.6, mpl=mpl, sequencing="global"),
            ClassPolicy(
                math.inf, 0.4, mpl=1, sequencing="global", order=rng.choice(("fifo", "sjf"))
            ),
        )
        early = rng.random() < 0.3
        return DomainPolicy(
            "link",
            1e9,
            classes,
            turn_mode=rng.choice(("hybrid", "hybrid", "centralised")),
            max_wait_s=_MAX_WAIT_S,
            batch_bytes=rng.choice((0, 0, 30_000)),
            early_fin_bytes=1000 if early else 0,
        )

    # -- the nodes -----------------------------------------------------------------------------

    def note(self, text: str) -> None:
        if self.trace:
            self.run_.story.append(f"{self.engine.now:.6f} {text}")

    def violate(self, text: str) -> None:
        self.run_.violations.append(f"{self.engine.now:.6f} {text}")
        self.note("VIOLATION " + text)

    def start_sequencer(self) -> None:
        (left, promised_until), now = self.disk, self.engine.now
        self.disk = ("", promised_until)
        if left:
            self.core = SequencerCore.resume(SequencerSettings(), json.loads(left))
        else:
            previous, self.epoch = self.epoch, self.epoch + 1 + self.rng.randrange(3)
            self.core = SequencerCore(
                SequencerSettings(),
                epoch=self.epoch,
                previous=previous,
                now=now,
                promised_until=promised_until,
            )
        self.verifier = FinVerifier(KEY)
        self.sequencer_up = True
        self.sequencer_paused = False
        self.queue.clear()
        self.note(f"sequencer up, epoch {self.epoch}{', resumed' if left else ''}")
        for agent in self.agents:
            if agent.alive and not agent.linked:
                agent.connect(True)

    def kill_sequencer(self) -> None:
        self.core = None
        self.sequencer_up = False
        self.note("sequencer killed")
        for agent in self.agents:
            if agent.alive and self.rng.random() < 0.5:  # the others do not notice
                agent.connect(False)

    def stop_sequencer(self) -> None:
        """In order: it leaves its turns to the next process and asks agents to wait for it."""
        core = self.core
        if core is None or self.sequencer_paused:
            return
        frames = [] if core.recovering else core.pause(self.engine.now, _PAUSE_S)
        kept = core.keep()
        if kept is not None:
            self.disk = (json.dumps(kept), core.promised_until())
        self.core = None
        self.sequencer_up = False
        self.note("sequencer stops in order")
        for peer, frame in frames:
            self.tell_last(peer.decode(), frame)
        for agent in self.agents:
            if agent.alive:
                agent.connect(False)

    def tell_last(self, name: str, frame: bytes) -> None:
        agent = next(one for one in self.agents if one.name == name)
        self.network.send(SEQUENCER, name, lambda: agent.frame(frame))

    def tick(self) -> None:
        if self.core is not None and not self.sequencer_paused:
            self.core.tick(self.engine.now)
        if self.engine.now < self.end_s + _MAX_WAIT_S + 1:
            self.engine.after(_TICK_S, self.tick)

    def resume_sequencer(self) -> None:
        self.sequencer_paused = False
        while self.queue:
            self.queue.popleft()()

    def send_to_sequencer(self, agent: Agent, data: bytes, *, is_fin: bool = False) -> None:
        def deliver() -> None:
            if self.core is None:
                return
            if self.sequencer_paused:
                self.queue.append(deliver)
                return
            if is_fin:
                fin = self.verifier.accept(data)
                if fin is not None:
                    self.core.finished(fin, self.engine.now)
                return
            before = self.core.ids
            answer = self.core.receive(agent.name.encode(), data, self.engine.now)
            if answer is not None:
                if self.core.ids != before:
                    self.check_ids(answer)
                self.network.send(SEQUENCER, agent.name, lambda: agent.frame(answer))

        self.network.send(agent.name, SEQUENCER, deliver)

    def send_datagram(self, source: Agent, target: Agent, datagram: bytes) -> None:
        self.network.send(source.name, target.name, lambda: target.datagram(datagram))

    # -- flows ---------------------------------------------------------------------------------

    def arrivals(self, agent: Agent) -> None:
        """Poisson arrivals, about half the classes' capacity over all agents."""
        rng = self.rng
        if self.engine.now < self.end_s:
            gap_s = rng.expovariate(16.0 / len(self.agents))
            self.engine.after(gap_s, lambda: self.arrivals(agent))
        if not agent.alive or self.engine.now < _CALM_UNTIL_S - 0.2:
            return
        self.next_flow += 1
        flow = self.next_flow
        size = rng.randrange(100, 20_000)
        agent.arrived[flow] = agent.running_s()
        self.note(f"{agent.name} flow {flow} of {size} B arrives")
        self.run_.flows += 1
        agent.do(lambda: agent.gate.arrive(flow, size, now=agent.clock()))
        if rng.random() < 0.03:
            gate = agent.gate
            self.engine.after(rng.random() * 0.1, lambda: self.give_up(agent, gate, flow))

    def give_up(self, agent: Agent, gate: DomainGate, flow: int) -> None:
        held = flow in agent.arrived or flow in agent.sending
        if agent.alive and not agent.paused and agent.gate is gate and held:
            self.note(f"{agent.name} flow {flow} gives up")
            agent.arrived.pop(flow, None)
            agent.sending.pop(flow, None)
            agent.do(lambda: gate.cancel(flow, now=agent.clock()))

    def started(self, agent: Agent, release: Release) -> None:
        flow, now = release.flow, self.engine.now
        arrived = agent.arrived.pop(flow, None)
        run = self.run_
        if arrived is None:
            run.double_starts += 1
            self.violate(f"{agent.name} flow {flow} starts twice")
            return
        wait_s = agent.running_s() - arrived
        run.max_wait_s = max(run.max_wait_s, wait_s)
        ticket = agent.gate.member.ticket_of(flow)
        self.note(
            f"{agent.name} flow {flow} starts in class {release.class_index} on "
            f"({agent.gate.member.epoch}, {ticket}), {release.degraded or 'ordered'}"
        )
        if release.degraded:
            counts = run.degraded_starts
            counts[release.degraded] = counts.get(release.degraded, 0) + 1
            if now - wait_s > self.healed_s + RECOVERY_S and release.degraded in _LATE_REASONS:
                run.late_starts += 1
                self.violate(f"flow {flow} arrived after recovery, starts {release.degraded}")
            if not self.faults.any:
                run.late_starts += 1
                self.violate(f"flow {flow} starts {release.degraded} although nothing went wrong")
        else:
            run.ordered_starts += 1
            self.check_order(agent, release.class_index, ticket, flow)
        agent.sending[flow] = now
        gate = agent.gate
        took_s = self.rng.expovariate(1 / 0.02) + 0.001
        if self.rng.random() < 0.02:
            took_s += 0.5
        if self.policy.early_fin_bytes:
            self.engine.after(took_s * 0.8, lambda: self.announce(agent, gate, flow))
        self.engine.after(took_s, lambda: self.end(agent, gate, flow))

    def announce(self, agent: Agent, gate: DomainGate, flow: int) -> None:
        if agent.alive and not agent.paused and agent.gate is gate and flow in agent.sending:
            agent.do(lambda: gate.announce(flow, now=agent.clock()))

    def end(self, agent: Agent, gate: DomainGate, flow: int) -> None:
        if agent.paused and agent.alive:  # the application waits for the agent, too
            agent.backlog.append(lambda: self.end(agent, gate, flow))
            return
        if agent.alive and agent.gate is gate and agent.sending.pop(flow, None) is not None:
            self.note(f"{agent.name} flow {flow} ends")
            agent.do(lambda: gate.finish(flow, now=agent.clock()))

    # -- what must hold ------------------------------------------------------------------------

    def check_order(self, agent: Agent, class_index: int, ticket: int, flow: int) -> None:
        member = agent.gate.member
        mpl = agent.gate.policy.classes[class_index].mpl
        if not agent.vouches() or not ticket:
            self.run_.order_violations += 1
            self.violate(f"{agent.name} flow {flow} starts in order without lease or ticket")
            return
        earlier = sending = handovers = 0
        ours = self.given_out(member.epoch, class_index, ticket)
        for other in self.agents:
            if not other.vouches():
                continue
            them = other.gate.member
            sending += len(them.ordered_sending(class_index))
            for held in them.held_ids(class_index):
                theirs = self.given_out(them.epoch, class_index, held)
                earlier += theirs < ours and not (other is agent and held == ticket)
            for held in them.announced_ids(class_index):
                handovers += self.given_out(them.epoch, class_index, held) < ours
        if earlier >= mpl or sending > mpl or earlier + handovers >= 2 * mpl:
            self.run_.order_violations += 1
            self.violate(
                f"{agent.name} flow {flow} starts on ({member.epoch}, {ticket}) in class "
                f"{class_index}: {earlier} earlier ids are held, {handovers} in hand-over, "
                f"{sending} send in order, mpl {mpl}"
            )

    def given_out(self, epoch: int, class_index: int, ticket: int) -> tuple[int, int]:
        """(epoch, id) as first given out; a restarted sequencer takes ids up under their number."""
        epochs = [
            given
            for (given, index), ids in self.granted.items()
            if given <= epoch and index == class_index and ticket in ids
        ]
        return max(epochs), ticket

    def check_ids(self, answer: bytes) -> None:
        """The answer gives new ids out."""
        message = wire.decode(answer)
        assert isinstance(message, wire.Tickets)
        given = self.granted.setdefault((message.epoch, message.class_index), set())
        ids = set(range(message.first, message.first + message.count))
        if given & ids:
            self.run_.repeated_ids += 1
            self.violate(f"ids {sorted(given & ids)} given twice in epoch {message.epoch}")
        given |= ids

    def change_policy(self) -> None:
        """Another first threshold, at each agent at a slightly different time."""
        classes = self.policy.classes
        first = dataclasses.replace(classes[0], threshold_bytes=SMALL_BYTES / 2)
        changed = dataclasses.replace(self.policy, classes=(first, *classes[1:]))
        self.policy = changed
        for agent in self.agents:
            self.engine.after(
                self.rng.random() * 0.05,
                lambda agent=agent: agent.do(  # type: ignore[misc]  # bound now, not later
                    lambda: agent.gate.set_policy(changed, now=agent.clock())
                ),
            )

    def run(self) -> FaultRun:
        self.start_sequencer()
        self.engine.after(_TICK_S, self.tick)
        for agent in self.agents:
            agent.boot()
            self.engine.after(self.rng.random() * 0.1, lambda agent=agent: self.arrivals(agent))  # type: ignore[misc]  # bound now, not later
        if self.faults.any or self.faults.restart:
            mishaps = Mishaps(self, _MAX_WAIT_S - 0.5)
            mishaps.plan(_CALM_UNTIL_S, self.healed_s)
        if self.rng.random() < 0.2:
            self.engine.at(self.rng.uniform(_CALM_UNTIL_S, self.end_s), self.change_policy)
        self.engine.run(until=self.end_s + _MAX_WAIT_S + 0.5)
        run = self.run_
        for agent in self.agents:
            for flow, arrived in agent.arrived.items():
                run.stalls += 1
                self.violate(f"{agent.name} flow {flow} of {arrived:.3f} never starts")
            run.demoted += agent.gate.demoted
        slowest = _MAX_WAIT_S * 1.011 + LATE_S
        if run.max_wait_s > slowest:
            run.stalls += 1
            self.violate(f"a flow waited {run.max_wait_s:.3f} s, more than max_wait")
        return run


def run_seed(seed: int, faults: Faults, *, trace: bool = False) -> FaultRun:
    """One seed, alone and reproducible; with trace its story is told."""
    simulation = Simulation(seed, faults, trace)
    try:
        return simulation.run()
    except Exception as error:  # a crash is a finding
        simulation.run_.violations.append(f"crash: {type(error).__name__}: {error}")
        if trace:
            raise
        return simulation.run_
