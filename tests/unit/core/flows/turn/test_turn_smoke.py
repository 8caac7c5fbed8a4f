"""One sequencer and gates of two agents on a perfect network: order, hand-over, fallback."""

from __future__ import annotations

import math

import pytest

from intentd.core.flows.fin import FinSigner, FinVerifier
from intentd.core.flows.policy import ClassPolicy, DomainPolicy
from intentd.core.flows.turn import wire
from intentd.core.flows.turn.domain import DomainGate
from intentd.core.flows.turn.member import Broadcast, MemberState
from intentd.core.flows.turn.sequencer import SequencerCore, SequencerSettings

KEY = bytes(range(32))


class World:
    """Delivers at once."""

    def __init__(self, policy: DomainPolicy, names: list[str], epoch: int = 7) -> None:
        self.now = 100.0
        self.policy = policy
        self.core = SequencerCore(SequencerSettings(), epoch=epoch, previous=0, now=self.now - 10)
        self.core.tick(self.now)
        self.gates = {n: DomainGate(policy, name=n, boot=i + 1) for i, n in enumerate(names)}
        self.signers = {n: FinSigner.from_domain_key(KEY, n, i + 1) for i, n in enumerate(names)}
        self.verifiers = {n: FinVerifier(KEY) for n in [*names, "sequencer"]}
        self.released: list[tuple[str, int, str]] = []

    def take(self, name: str, releases: list) -> None:
        self.released += [(name, r.flow, r.degraded) for r in releases]

    def settle(self) -> None:
        busy = True
        while busy:
            busy = False
            for name, gate in self.gates.items():
                for item in gate.poll_outbox():
                    busy = True
                    if isinstance(item, Broadcast):
                        self.broadcast(name, item)
                        continue
                    answer = self.core.receive(name.encode(), wire.encode(item), self.now)
                    if answer is not None:
                        self.take(name, gate.handle(wire.decode(answer), now=self.now))

    def broadcast(self, name: str, item: Broadcast) -> None:
        datagram = self.signers[name].sign(item.domain_id, item.epoch, item.runs)
        for other, gate in self.gates.items():
            fin = self.verifiers[other].accept(datagram)
            assert fin is not None
            self.take(other, gate.handle(fin, now=self.now))
        fin = self.verifiers["sequencer"].accept(datagram)
        assert fin is not None
        self.core.finished(fin, self.now)

    def connect(self) -> None:
        for name, gate in self.gates.items():
            self.take(name, gate.connected(True, now=self.now))
        self.settle()

    def arrive(self, name: str, flow: int, size: int = 1000) -> None:
        self.take(name, self.gates[name].arrive(flow, size, now=self.now))
        self.settle()

    def finish(self, name: str, flow: int) -> None:
        self.take(name, self.gates[name].finish(flow, now=self.now))
        self.settle()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            timers = [g.next_timer() for g in self.gates.values()]
            at = min((t for t in timers if t is not None), default=math.inf)
            if at > end:
                break
            self.now = max(self.now, at)
            self.core.tick(self.now)
            for name, gate in self.gates.items():
                self.take(name, gate.expire(now=self.now))
            self.settle()
        self.now = end


def one_class(**more: object) -> DomainPolicy:
    cls = ClassPolicy(math.inf, 1.0, mpl=int(more.pop("mpl", 1)), sequencing="global")
    return DomainPolicy("link", 1e9, (cls,), **more)


@pytest.mark.parametrize("mode", ["hybrid", "centralised"])
def test_flows_of_two_agents_start_in_the_order_of_their_ids(mode: str) -> None:
    world = World(one_class(turn_mode=mode), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.arrive("a", 2)
    world.arrive("b", 2)
    assert world.released == [("a", 1, "")]
    for name, flow, following in (("a", 1, ("b", 1)), ("b", 1, ("a", 2)), ("a", 2, ("b", 2))):
        world.finish(name, flow)
        world.advance(0.05)
        assert world.released[-1] == (*following, "")
    world.finish("b", 2)
    assert len(world.released) == 4


def test_without_a_sequencer_order_is_local_and_says_so() -> None:
    world = World(one_class(), ["a"])
    world.arrive("a", 1)
    world.arrive("a", 2)
    assert world.released == [("a", 1, "fallback")]
    world.finish("a", 1)
    assert world.released[1:] == [("a", 2, "fallback")]


def test_the_lease_runs_out_and_the_waiting_fall_back() -> None:
    world = World(one_class(), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    gate = world.gates["b"]
    world.gates = {"a": world.gates["a"]}  # b is cut off
    world.advance(0.5)
    assert gate.expire(now=world.now) == []
    world.now += 0.6
    [release] = gate.expire(now=world.now)
    assert (release.flow, release.degraded) == (1, "fallback")
    assert gate.member.state is MemberState.AWAY
