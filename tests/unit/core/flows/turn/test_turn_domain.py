"""A real SequencerCore and DomainGates of several agents on a perfect network."""

from __future__ import annotations

import math

import pytest

from intentd.core.errors import InputError, StateError
from intentd.core.flows.fin import Fin, FinSigner, FinVerifier
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
        self.deaf: set[str] = set()  # whom no datagram reaches

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
            if other in self.deaf:
                continue
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

    def call(self, name: str, what: str, *arguments: object) -> None:
        self.take(name, getattr(self.gates[name], what)(*arguments, now=self.now))
        self.settle()

    def finish(self, name: str, flow: int) -> None:
        self.take(name, self.gates[name].finish(flow, now=self.now))
        self.settle()

    def restart(self) -> None:
        """The sequencer, with a higher epoch; nobody is told."""
        epoch = self.core.epoch
        self.core = SequencerCore(
            SequencerSettings(), epoch=epoch + 1, previous=epoch, now=self.now
        )
        self.verifiers["sequencer"] = FinVerifier(KEY)

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


def test_a_batch_rides_on_one_id() -> None:
    world = World(one_class(batch_bytes=3000), ["a", "b"])
    world.connect()
    world.arrive("b", 1)
    for flow in (1, 2, 3, 4):
        world.arrive("a", flow)
    assert world.core.ids == 3  # b's, a batch of three, the fourth
    world.arrive("b", 2)
    world.finish("b", 1)
    for flow in (1, 2, 3):
        assert world.released[-1] == ("a", flow, "")
        assert world.gates["a"].member.ticket_of(flow) == 2
        world.finish("a", flow)
    assert world.released[-1] == ("a", 4, "")
    world.finish("a", 4)
    assert world.released[-1] == ("b", 2, "")


def test_a_flow_of_a_batch_may_give_up() -> None:
    world = World(one_class(batch_bytes=9000), ["a", "b"])
    world.connect()
    world.arrive("b", 1)
    for flow in (1, 2, 3):
        world.arrive("a", flow)
    world.finish("b", 1)
    assert world.gates["a"].queue_lengths() == [2]
    world.call("a", "cancel", 2)
    world.finish("a", 1)
    assert world.released[-1] == ("a", 3, "")
    assert world.gates["a"].queue_lengths() == [0]


def test_mpl_flows_send_at_a_time() -> None:
    world = World(one_class(mpl=2), ["a", "b"])
    world.connect()
    for flow in (1, 2):
        world.arrive("a", flow)
        world.arrive("b", flow)
    assert world.released == [("a", 1, ""), ("b", 1, "")]
    world.finish("b", 1)
    assert world.released[2:] == [("a", 2, "")]


@pytest.mark.parametrize("mode", ["hybrid", "centralised"])
def test_an_announced_end_hands_the_turn_over_in_order(mode: str) -> None:
    world = World(one_class(early_fin_bytes=100, turn_mode=mode), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.call("a", "announce", 1)
    world.advance(0.1)
    assert world.released[-1] == ("b", 1, "")
    world.call("a", "announce", 1)
    world.arrive("a", 2)
    world.finish("a", 1)
    world.finish("b", 1)
    world.advance(0.1)
    assert world.released[-1] == ("a", 2, "")
    world.arrive("b", 2)
    world.finish("a", 2)
    world.advance(2.0)
    assert sum(gate.handed_over for gate in world.gates.values()) == 1
    assert sum(gate.demoted for gate in world.gates.values()) == 0


def test_no_more_than_mpl_ids_are_in_hand_over_when_a_flow_starts() -> None:
    world = World(one_class(early_fin_bytes=100), ["a", "b"])
    world.connect()
    for flow in (1, 2):
        world.arrive("a", flow)
        world.arrive("b", flow)
    world.call("a", "announce", 1)
    world.call("b", "announce", 1)
    assert world.released == [("a", 1, ""), ("b", 1, "")]
    world.finish("b", 1)
    assert world.released[2:] == [("a", 2, "")]


def test_an_announced_id_that_does_not_end_takes_the_marks_of_those_that_relied_on_it() -> None:
    world = World(one_class(early_fin_bytes=100), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.call("a", "announce", 1)
    heir = world.gates["b"]
    world.advance(1.5 * world.policy.handover_s)  # the sequencer is asked once
    assert (heir.mark_of(1), heir.handed_over) == ("", 1)
    world.advance(world.policy.handover_s)
    assert (heir.mark_of(1), heir.demoted) == ("early_fin", 1)
    world.arrive("b", 2)
    world.finish("b", 1)
    assert world.released[-1] == ("b", 2, "early_fin")
    world.finish("a", 1)
    world.arrive("b", 3)
    world.finish("b", 2)
    assert world.released[-1] == ("b", 3, "")


def test_whose_end_was_announced_and_not_heard_is_asked_about() -> None:
    world = World(one_class(early_fin_bytes=100), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.call("a", "announce", 1)
    world.deaf = {"b"}
    world.finish("a", 1)
    world.advance(3 * world.policy.handover_s)
    heir = world.gates["b"]
    assert (heir.mark_of(1), heir.handed_over, heir.demoted) == ("", 1, 0)


def test_flows_below_the_bandwidth_delay_product_pay_nothing() -> None:
    world = World(one_class(local_below_bytes=1000), ["a", "b"])
    world.connect()
    world.arrive("a", 1, 5000)
    world.arrive("b", 1, 5000)
    world.arrive("b", 2, 1000)
    assert world.released == [("a", 1, ""), ("b", 2, "")]
    assert world.core.ids == 2


def test_decentralised_starts_are_estimates_and_say_so() -> None:
    world = World(one_class(turn_mode="decentralised"), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    assert world.released == [("a", 1, "policy")]
    world.advance(0.1)
    world.finish("a", 1)
    for flow in (1, 2, 3):
        world.arrive("b", flow)
    world.arrive("a", 2)  # id 5, four after the last own one of .1 s
    assert ("a", 2, "policy") not in world.released
    world.advance(0.29)
    assert ("a", 2, "policy") not in world.released
    world.advance(0.02)
    assert ("a", 2, "policy") in world.released


def test_max_wait_releases_as_degraded_and_keeps_the_place() -> None:
    world = World(one_class(max_wait_s=0.7), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.arrive("a", 2)
    world.advance(0.75)
    assert sorted(world.released[1:]) == [("a", 2, "timeout"), ("b", 1, "timeout")]
    world.arrive("b", 2)
    for name, flow in (("a", 1), ("b", 1)):
        world.finish(name, flow)
        assert len(world.released) == 3
    world.finish("a", 2)
    assert world.released[-1] == ("b", 2, "")


def test_a_dead_agents_turn_passes_on_and_its_successor_says_lease() -> None:
    world = World(one_class(), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.arrive("b", 2)
    del world.gates["a"]
    world.advance(1.6)
    assert world.released[1:] == [("b", 1, "lease")]
    world.advance(1.1)  # the doubt is over
    world.finish("b", 1)
    assert world.released[-1] == ("b", 2, "")


def test_a_restarted_sequencer_takes_up_what_is_held() -> None:
    world = World(one_class(), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.restart()
    world.advance(0.3)
    assert world.gates["b"].member.epoch == 8
    assert world.gates["b"].member.held_ids(0) == [2]
    world.arrive("a", 2)
    world.advance(1.0)
    assert len(world.released) == 1
    world.finish("a", 1)
    assert world.released[-1] == ("b", 1, "")
    world.finish("b", 1)
    assert world.released[-1] == ("a", 2, "")
    assert world.gates["a"].member.ticket_of(2) == 3


def test_whoever_comes_back_too_late_loses_its_marks() -> None:
    world = World(one_class(), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("a", 2)
    away = world.gates.pop("a")
    world.restart()
    world.advance(1.5)
    world.arrive("b", 1)
    assert world.released[-1] == ("b", 1, "")
    away.expire(now=world.now)
    assert away.mark_of(1) == "lease"
    assert away.demoted == 1
    assert away.mark_of(2) == "fallback"
    world.gates = {"a": away, **world.gates}
    world.advance(0.3)
    assert away.member.state is MemberState.MEMBER


def test_back_in_contact_the_waiting_take_tickets() -> None:
    world = World(one_class(), ["a"])
    world.arrive("a", 1)
    world.arrive("a", 2)
    world.arrive("a", 3)
    assert world.released == [("a", 1, "fallback")]
    world.connect()
    assert world.released[1:] == [("a", 2, "")]
    world.finish("a", 1)
    world.finish("a", 2)
    assert world.released[2:] == [("a", 3, "")]


def test_a_new_policy_moves_who_waits_and_loses_nobody() -> None:
    small = ClassPolicy(1000, 0.5, sequencing="global")
    large = ClassPolicy(math.inf, 0.5, sequencing="global")
    policy = DomainPolicy("link", 1e9, (small, large))
    world = World(policy, ["a", "b"])
    world.connect()
    for name in ("a", "b"):
        for flow in (1, 2):
            world.arrive(name, flow, 500)
            world.arrive(name, flow + 10, 5000)
    local = DomainPolicy("link", 1e9, (ClassPolicy(math.inf, 1.0),))
    for name in ("a", "b"):
        world.call(name, "set_policy", local)
    running = [(name, flow) for name, flow, _ in world.released]
    for name, flow in running:  # grows while it is walked
        world.finish(name, flow)
        running += [(n, f) for n, f, _ in world.released if (n, f) not in running]
    assert sorted(running) == sorted((n, f) for n in "ab" for f in (1, 2, 11, 12))
    assert [len(gate) for gate in world.gates.values()] == [0, 0]
    world.advance(0.4)
    assert all(
        line["outstanding"] == 0
        for line in world.core.status()["domains"]["link"]["classes"].values()
    )


def test_repeated_and_foreign_messages_change_nothing() -> None:
    world = World(one_class(), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    b = world.gates["b"]
    lie = Fin(b.domain_id, 7, wire.name_id("a"), 1, 99, (wire.Run(0, 2, 1),))
    assert b.handle(lie, now=world.now) == []  # id 2 is b's own
    assert b.member.ignored == 1
    old = Fin(b.domain_id, 6, wire.name_id("a"), 1, 99, (wire.Run(0, 1, 1),))
    assert b.handle(old, now=world.now) == []
    other = wire.Tickets(5, 7, 0, 1, 1, 1, 0)
    assert b.handle(other, now=world.now) == []
    assert b.misdirected == 1
    again = wire.Tickets(b.domain_id, 7, 0, 2, 1, 1, 1)
    assert b.handle(again, now=world.now) == []
    assert b.handle(wire.Probe(b.domain_id, 7, 0, 1), now=world.now) == []
    world.finish("a", 1)
    assert world.released[-1] == ("b", 1, "")


def test_wrong_calls_are_refused() -> None:
    world = World(one_class(), ["a"])
    world.connect()
    gate = world.gates["a"]
    world.arrive("a", 1)
    world.arrive("a", 2)
    with pytest.raises(StateError, match="held already"):
        gate.arrive(1, 5, now=world.now)
    with pytest.raises(InputError, match="size_bytes"):
        gate.arrive(3, -1, now=world.now)
    with pytest.raises(InputError, match="class_index"):
        gate.arrive(3, 1, now=world.now, class_index=1)
    with pytest.raises(StateError, match="it waits"):
        gate.finish(2, now=world.now)
    with pytest.raises(StateError, match="does not hold"):
        gate.finish(9, now=world.now)
    with pytest.raises(StateError, match="not held"):
        gate.cancel(9, now=world.now)
    assert gate.class_index_of(2) == 0
    assert gate.active() == [1]
    assert gate.starts == {"": 1}


def test_goodbye_frees_everything() -> None:
    world = World(one_class(), ["a", "b"])
    world.connect()
    world.arrive("a", 1)
    world.arrive("b", 1)
    world.gates["a"].goodbye(now=world.now)
    world.settle()
    world.advance(0.5)
    assert world.released[-1] == ("b", 1, "")


def test_a_fin_without_a_key_goes_over_the_link() -> None:
    runs = (wire.Run(1, 7, 1), wire.Run(0, 9, 1, announced=True), wire.Run(0, 9, 1))
    message = Broadcast(1, 2, runs).finished()
    assert message.runs == (wire.Run(0, 9, 1), wire.Run(1, 7, 1))
    assert wire.decode(wire.encode(message)) == message
