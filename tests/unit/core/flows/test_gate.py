"""The flow gate: examples of each rule; its property test is test_gate_model.py."""

import math

import pytest

from intentd.core.errors import InputError, StateError
from intentd.core.flows.gate import FlowGate, FlowState, GateFullError, Release
from intentd.core.flows.policy import ClassPolicy, DomainPolicy


def policy(*classes: ClassPolicy, **more: object) -> DomainPolicy:
    return DomainPolicy("eth0", 8e6, tuple(classes), **more)  # type: ignore[arg-type]


def single(**more: object) -> ClassPolicy:
    return ClassPolicy(math.inf, 1.0, **more)  # type: ignore[arg-type]


def two(**more: object) -> DomainPolicy:
    return policy(ClassPolicy(100, 0.5), ClassPolicy(math.inf, 0.5), **more)


def test_one_at_a_time_in_order_of_arrival() -> None:
    gate = FlowGate(policy(single()))
    assert gate.arrive(1, 50, now=0.0) == [Release(1, 0)]
    assert gate.arrive(2, 10, now=1.0) == []
    assert gate.arrive(3, 5, now=2.0) == []
    assert (gate.queue_lengths(), gate.active()) == ([2], [1])
    assert gate.finish(1, now=3.0) == [Release(2, 0)]
    assert gate.finish(2, now=4.0) == [Release(3, 0)]
    assert gate.finish(3, now=5.0) == []
    assert len(gate) == 0
    assert gate.class_index_of(3) is None


def test_classes_do_not_wait_for_each_other() -> None:
    gate = FlowGate(two())
    assert gate.arrive(1, 1000, now=0.0) == [Release(1, 1)]
    assert gate.arrive(2, 100, now=0.0) == [Release(2, 0)]
    assert gate.arrive(3, 101, now=0.0) == []
    assert gate.class_index_of(3) == 1
    assert gate.state_of(3) is FlowState.WAITING


def test_multiplexing_level_and_no_gate() -> None:
    gate = FlowGate(policy(single(mpl=2)))
    assert [len(gate.arrive(i, 1, now=0.0)) for i in range(4)] == [1, 1, 0, 0]
    gate = FlowGate(policy(single(mpl=0)))
    assert all(gate.arrive(i, 1, now=0.0) for i in range(100))
    assert gate.active() == [100]


def test_shortest_first_breaks_ties_by_arrival() -> None:
    gate = FlowGate(policy(single(order="sjf")))
    gate.arrive(0, 9, now=0.0)
    for flow, size in ((1, 30), (2, 10), (3, 10)):
        gate.arrive(flow, size, now=float(flow))
    order = []
    released = gate.finish(0, now=9.0)
    while released:
        order.append(released[0].flow)
        released = gate.finish(released[0].flow, now=9.0)
    assert order == [2, 3, 1]


def test_boost_moves_a_short_flow_ahead_only_by_a_bounded_time() -> None:
    # 1 s of link is 1e6 bytes here; with g = 1/s the boost of 1e4 bytes (10 ms) is 4.6 s,
    # that of 3e6 bytes (3 s) is 51 ms.
    gate = FlowGate(policy(single(order="boost", boost_gamma_per_s=1.0)))
    gate.arrive(0, 1, now=0.0)
    gate.arrive(1, 3_000_000, now=0.0)
    gate.arrive(2, 10_000, now=4.0)
    gate.arrive(3, 10_000, now=5.0)
    assert gate.finish(0, now=6.0) == [Release(2, 0)]
    assert gate.finish(2, now=6.0) == [Release(1, 0)]
    assert gate.finish(1, now=6.0) == [Release(3, 0)]


def test_announce_hands_the_turn_over_in_order() -> None:
    gate = FlowGate(policy(single()))
    gate.arrive(1, 1, now=0.0)
    gate.arrive(2, 1, now=0.0)
    gate.arrive(3, 1, now=0.0)
    assert gate.announce(1, now=1.0) == [Release(2, 0)]
    assert gate.announce(1, now=1.0) == []
    assert gate.active() == [2]
    assert gate.finish(1, now=1.2) == []
    assert gate.finish(2, now=3.0) == [Release(3, 0)]
    assert gate.announce(3, now=4.0) == []
    assert gate.admits() == [1]
    assert gate.arrive(4, 1, now=4.0) == [Release(4, 0)]
    assert gate.handed_over == 2
    assert gate.demoted == 0


@pytest.mark.parametrize("mpl", [1, 2])
def test_no_more_than_mpl_flows_are_in_hand_over_when_one_starts(mpl: int) -> None:
    gate = FlowGate(policy(single(mpl=mpl)))
    sending = []
    for flow in range(20):
        sending += [release.flow for release in gate.arrive(flow, 1, now=0.0)]
    most = 0
    announced = []
    while sending or announced:
        most = max(most, sum(gate.active()))
        if sending:
            announced.append(sending.pop(0))
            released = gate.announce(announced[-1], now=0.1)
        else:
            released = gate.finish(announced.pop(0), now=0.1)
        sending += [release.flow for release in released]
        assert {release.degraded for release in released} <= {""}
    assert most == 2 * mpl
    assert gate.queue_lengths() == [0]


def test_small_flows_are_in_hand_over_together_up_to_the_announced_bytes() -> None:
    gate = FlowGate(policy(single(), early_fin_bytes=1000))
    for flow in range(6):
        gate.arrive(flow, 400, now=0.0)
    for flow in range(2):
        assert gate.announce(flow, now=0.1) == [Release(flow + 1, 0)]
    assert gate.announce(2, now=0.1) == []  # 1,200 bytes
    assert gate.finish(0, now=0.2) == [Release(3, 0)]
    assert gate.active() == [3]
    assert (gate.handed_over, gate.demoted) == (3, 0)


def test_a_flow_that_announced_its_end_and_goes_on_is_overdue() -> None:
    gate = FlowGate(policy(single(), early_fin_bytes=1000))
    bound = gate.policy.handover_s
    assert bound == 0.25 + 1e-3  # 1000 bytes at 8 Mb/s
    for flow in (1, 2, 3, 4, 5):
        gate.arrive(flow, 1000, now=0.0)
    assert gate.announce(1, now=1.0) == [Release(2, 0)]
    assert gate.announce(2, now=1.1) == []  # two hand-overs under way
    assert gate.next_timer() == 1.0 + bound
    assert gate.expire(now=1.0 + bound) == [Release(3, 0, "early_fin")]
    assert gate.state_of(1) is FlowState.OVERDUE
    assert (gate.mark_of(2), gate.mark_of(3), gate.demoted) == ("early_fin", "early_fin", 1)
    assert gate.active() == [3]
    assert gate.announce(1, now=1.3) == []
    assert gate.finish(2, now=1.3) == []
    assert gate.finish(1, now=1.3) == []
    assert gate.finish(3, now=1.3) == [Release(4, 0)]
    assert gate.finish(4, now=1.3) == [Release(5, 0)]
    assert (gate.mark_of(5), gate.demoted, gate.handed_over) == ("", 1, 1)


def test_who_has_started_by_the_board_keeps_the_place_until_it_arrives() -> None:
    gate = FlowGate(policy(single()))
    gate.expect(0, now=0.0)
    assert gate.admits() == [0]
    assert gate.arrive(1, 1, now=0.0) == []
    assert gate.arrive(2, 1, now=0.1, started=True) == [Release(2, 0)]
    assert gate.forgo(0, now=0.2) == []
    assert gate.finish(2, now=0.3) == [Release(1, 0)]
    gate.expect(0, now=0.4)
    assert gate.finish(1, now=0.5) == []
    assert gate.arrive(3, 1, now=0.5) == []
    assert gate.forgo(0, now=0.6) == [Release(3, 0)]
    assert gate.forgo(7, now=0.6) == []


def test_nobody_waits_for_ever() -> None:
    gate = FlowGate(policy(single(), max_wait_s=10.0))
    assert gate.next_timer() is None
    gate.arrive(1, 1, now=0.0)
    assert gate.next_timer() is None
    gate.arrive(2, 1, now=1.0)
    gate.arrive(3, 1, now=2.0)
    gate.arrive(4, 1, now=5.0)
    assert gate.next_timer() == 11.0
    assert gate.expire(now=10.9) == []
    assert gate.expire(now=12.0) == [Release(2, 0, "timeout"), Release(3, 0, "timeout")]
    assert gate.next_timer() == 15.0
    # Three send where one may: the next waits until they are fewer than one.
    assert gate.finish(1, now=13.0) == []
    assert gate.finish(2, now=13.0) == []
    assert gate.finish(3, now=13.0) == [Release(4, 0)]


def test_cancel_in_every_state() -> None:
    gate = FlowGate(policy(single()))
    for flow in (1, 2, 3, 4):
        gate.arrive(flow, 1, now=0.0)
    assert gate.cancel(2, now=1.0) == []
    assert gate.cancel(1, now=1.0) == [Release(3, 0)]
    assert gate.announce(3, now=1.0) == [Release(4, 0)]
    assert gate.cancel(3, now=1.0) == []
    assert gate.cancel(4, now=1.0) == []
    assert len(gate) == 0


def test_baraat_gives_each_large_flow_an_empty_class() -> None:
    third = 1 / 3
    lm = policy(
        ClassPolicy(100, third),
        ClassPolicy(math.inf, third),
        ClassPolicy(math.inf, third),
        dispatch="empty_class",
    )
    gate = FlowGate(lm)
    assert gate.arrive(1, 500, now=0.0) == [Release(1, 1)]
    assert gate.arrive(2, 500, now=0.0) == [Release(2, 2)]
    assert gate.arrive(3, 50, now=0.0) == [Release(3, 0)]
    assert gate.arrive(4, 50, now=0.0) == []
    assert gate.arrive(5, 500, now=0.0) == []
    assert gate.class_index_of(5) == 1
    assert gate.finish(2, now=1.0) == []
    assert gate.arrive(6, 500, now=1.0) == [Release(6, 2)]


def test_policy_change_loses_nobody_and_keeps_ages() -> None:
    gate = FlowGate(policy(single()))
    gate.arrive(1, 1000, now=0.0)
    for flow, size in ((2, 50), (3, 2000), (4, 60)):
        gate.arrive(flow, size, now=float(flow))
    assert gate.set_policy(two(max_wait_s=5.0), now=4.5) == [Release(2, 0)]
    assert (gate.queue_lengths(), gate.active()) == ([1, 1], [1, 1])
    assert gate.next_timer() == 8.0
    assert gate.finish(1, now=5.0) == [Release(3, 1)]
    assert gate.set_policy(policy(single()), now=5.0) == []
    assert gate.finish(2, now=6.0) == []
    assert gate.finish(3, now=6.0) == [Release(4, 0)]


def test_same_policy_again_changes_nothing() -> None:
    gate = FlowGate(two())
    gate.arrive(1, 1, now=0.0)
    gate.arrive(2, 1, now=0.0)
    assert gate.set_policy(two(), now=1.0) == []
    assert gate.finish(1, now=1.0) == [Release(2, 0)]


def test_named_class_survives_a_policy_that_still_has_it() -> None:
    gate = FlowGate(two())
    assert gate.arrive(1, 1, now=0.0, class_index=1) == [Release(1, 1)]
    gate.set_policy(two(max_wait_s=1.0), now=0.0)
    assert gate.class_index_of(1) == 1
    gate.set_policy(policy(single()), now=0.0)
    assert gate.class_index_of(1) == 0
    gate.set_policy(two(), now=0.0)
    assert gate.class_index_of(1) == 0  # by size: the name went with the policy


def test_full_gate_refuses_and_changes_nothing() -> None:
    gate = FlowGate(policy(single()), max_flows=2)
    gate.arrive(1, 1, now=0.0)
    gate.arrive(2, 1, now=0.0)
    with pytest.raises(GateFullError, match=r"eth0: 2 flows"):
        gate.arrive(3, 1, now=0.0)
    assert len(gate) == 2
    gate.cancel(2, now=0.0)
    assert gate.arrive(3, 1, now=0.0) == []


@pytest.mark.parametrize("size", [-1, math.nan, 2**63])
def test_bad_sizes_are_refused(size: int) -> None:
    gate = FlowGate(policy(single()))
    with pytest.raises(InputError, match="size_bytes"):
        gate.arrive(1, size, now=0.0)
    assert len(gate) == 0


@pytest.mark.parametrize("index", [-1, 2])
def test_class_numbers_out_of_range_are_refused(index: int) -> None:
    gate = FlowGate(two())
    with pytest.raises(InputError, match="class_index"):
        gate.arrive(1, 1, now=0.0, class_index=index)


def test_forbidden_transitions_tell_the_story() -> None:
    gate = FlowGate(policy(single()))
    gate.arrive(1, 1, now=0.0)
    gate.arrive(2, 1, now=0.0)
    with pytest.raises(StateError, match="flow 1 arrives, but is sending"):
        gate.arrive(1, 1, now=0.0)
    with pytest.raises(StateError, match="flow 2 finishes, but is waiting"):
        gate.finish(2, now=0.0)
    with pytest.raises(StateError, match="flow 2 announces"):
        gate.announce(2, now=0.0)
    with pytest.raises(StateError, match="does not hold"):
        gate.finish(9, now=0.0)


def test_clock_that_steps_back_is_held() -> None:
    gate = FlowGate(policy(single(), max_wait_s=1.0))
    gate.arrive(1, 1, now=5.0)
    gate.arrive(2, 1, now=3.0)
    assert gate.next_timer() == 6.0


def test_abandoned_entries_do_not_pile_up() -> None:
    gate = FlowGate(policy(single()))
    gate.arrive(0, 1, now=0.0)
    for flow in range(1, 20_000):
        gate.arrive(flow, 1, now=0.0)
        gate.cancel(flow, now=0.0)
    assert len(gate._classes[0].queue) <= 65
