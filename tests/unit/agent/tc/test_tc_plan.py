"""The plan: trees from policies, and changes that lead there from whatever is seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intentd.agent.tc import plan
from intentd.agent.tc.plan import (
    DropClass,
    DropFilter,
    DscpFilter,
    HtbClass,
    HtbTree,
    InstallRoot,
    PutClass,
    PutFilter,
    PutQueue,
    RemoveRoot,
    SeenClass,
    SeenFilter,
    SeenTree,
)
from intentd.core.errors import InputError, PolicyError
from intentd.core.flows.policy import ClassPolicy, DomainPolicy

GBIT = 10**9
EMPTY = SeenTree("noqueue", 0)


def policy(
    *weights: float, dscps: tuple[int, ...] = (), priorities: tuple[int, ...] = ()
) -> DomainPolicy:
    last = len(weights) - 1
    return DomainPolicy(
        "link",
        float(GBIT),
        tuple(
            ClassPolicy(
                math.inf if index == last else 1000.0 * (index + 1),
                weight,
                dscp=dscps[index] if dscps else 0,
                priority=priorities[index] if priorities else 0,
            )
            for index, weight in enumerate(weights)
        ),
    )


def kernel(seen: SeenTree, changes: list[plan.Change]) -> SeenTree:
    """A naive kernel: what it holds after the changes. Refuses what the real one refuses."""
    classes, filters = dict(seen.classes), list(seen.filters)
    for change in changes:
        match change:
            case RemoveRoot():
                assert seen.ours
                seen, classes, filters = EMPTY, {}, []
            case InstallRoot():
                assert not seen.ours
                assert not seen.foreign
                seen = SeenTree("htb", plan.HANDLE, plan.UNMARKED_MINOR)
            case PutClass(shape, new):
                assert new == (shape.minor not in classes)
                assert shape.parent_minor == 0 or shape.parent_minor in classes
                queue = None if new else classes[shape.minor].queue_packets
                classes[shape.minor] = SeenClass(shape, queue)
            case PutQueue(minor, limit, new):
                assert new == (classes[minor].queue_packets is None)
                classes[minor] = replace(classes[minor], queue_packets=limit)
            case PutFilter(shape):
                assert shape.minor in classes
                handle = 0x800 + len(filters)
                filters.append(SeenFilter(plan.FILTER_PREFS[shape.protocol], handle, shape))
            case DropFilter(_, pref, handle):
                filters = [f for f in filters if (f.pref, f.handle) != (pref, handle)]
            case DropClass(minor):
                assert not any(f.shape and f.shape.minor == minor for f in filters)
                del classes[minor]
    return SeenTree(seen.kind, seen.handle, seen.default_minor, classes, filters)


def weights_of(parts: list[int]) -> list[float]:
    total = sum(parts)
    return [part / total for part in parts]


weight_lists = st.lists(st.integers(1, 10_000), min_size=1, max_size=64).map(weights_of)
policies = st.builds(
    lambda weights, marks, strict: policy(
        *weights,
        dscps=tuple(marks[: len(weights)]) if len(marks) >= len(weights) else (),
        priorities=tuple(index % 8 for index in range(len(weights))) if strict else (),
    ),
    weight_lists,
    st.lists(st.integers(0, 63), unique_by=lambda d: d or object(), max_size=63),
    st.booleans(),
)


def test_rates_are_weights_of_the_link_and_unmarked_has_its_own() -> None:
    tree = plan.tree_for(policy(0.7, 0.3), unmarked_share=0.1)
    assert [cls.minor for cls in tree.classes] == [0x1, 0x8, 0x10, 0x11]
    assert [cls.rate_bps for cls in tree.classes] == [GBIT, GBIT // 10, 630 * 10**6, 270 * 10**6]
    assert {cls.ceil_bps for cls in tree.classes} == {GBIT}
    assert [cls.quantum_bytes for cls in tree.leaves] == [65_536, 233_333, 100_000]
    assert {cls.burst_bytes for cls in tree.classes} == {16_000}
    assert plan.priority_of(1) == 0x2D170011


def test_strict_priorities_get_a_tiny_rate_and_the_whole_link() -> None:
    tree = plan.tree_for(policy(0.5, 0.3, 0.2, priorities=(0, 1, 2)))
    assert [cls.prio for cls in tree.leaves] == [0, 0, 1, 2]
    assert [cls.rate_bps for cls in tree.leaves[1:]] == [GBIT // 1000] * 3
    assert {cls.ceil_bps for cls in tree.leaves} == {GBIT}


def test_bursts_cover_the_timer_at_high_rates() -> None:
    tree = plan.tree_for(policy(1.0), rate_bps=40e9)
    assert tree.classes[0].burst_bytes == 625_000


@given(weight_lists)
def test_rates_keep_the_weights_and_never_exceed_the_link(weights: list[float]) -> None:
    tree = plan.tree_for(policy(*weights))
    leaves = tree.leaves[1:]
    for cls, weight in zip(leaves, weights, strict=True):
        assert cls.rate_bps == pytest.approx(weight * GBIT * 0.99, abs=4)
    assert sum(cls.rate_bps for cls in tree.leaves) <= GBIT + len(weights)


@given(weight_lists)
def test_quanta_follow_the_weights_within_their_bounds(weights: list[float]) -> None:
    quanta = plan.quanta_bytes(weights)
    low, high = min(weights), max(weights)
    assert min(quanta) >= plan.QUANTUM_MIN_BYTES
    assert max(quanta) <= max(plan.QUANTUM_MAX_BYTES, 100_000)
    for (weight, quantum), (other, its) in zip(
        zip(weights, quanta, strict=True), zip(weights[1:], quanta[1:], strict=True), strict=False
    ):
        assert (weight <= other) == (quantum <= its) or quantum == its or weight == other
    if high / low <= plan.QUANTUM_MAX_BYTES / plan.QUANTUM_MIN_BYTES * 0.99:
        for weight, quantum in zip(weights, quanta, strict=True):
            assert quantum / quanta[0] == pytest.approx(weight / weights[0], rel=1e-4)
    else:
        assert max(quanta) == plan.QUANTUM_MAX_BYTES


@given(policies, policies)
def test_plan_leads_there_and_then_is_empty(before: DomainPolicy, after: DomainPolicy) -> None:
    first, second = plan.tree_for(before), plan.tree_for(after)
    held = kernel(EMPTY, plan.changes(first, EMPTY))
    assert plan.changes(first, held) == []
    steps = plan.changes(second, held)
    assert not any(isinstance(step, (InstallRoot, RemoveRoot)) for step in steps)
    held = kernel(held, steps)
    assert plan.changes(second, held) == []
    assert set(held.classes) == {cls.minor for cls in second.classes}
    # a change below the tolerance of reading back is none
    assert all(plan.same_class(cls, held.classes[cls.minor].shape) for cls in second.classes)


@given(policies, st.data())
def test_any_drift_is_repaired(wanted: DomainPolicy, data: st.DataObject) -> None:
    tree = plan.tree_for(wanted)
    held = kernel(EMPTY, plan.changes(tree, EMPTY))
    classes = dict(held.classes)
    victim = data.draw(st.sampled_from([cls.minor for cls in tree.leaves]))
    there = classes[victim].shape
    drifted = data.draw(
        st.sampled_from(
            [
                None,
                replace(classes[victim], queue_packets=None),
                replace(classes[victim], shape=replace(there, prio=(there.prio + 1) % 8)),
                replace(classes[victim], shape=replace(there, quantum_bytes=1)),
                replace(classes[victim], shape=replace(there, rate_bps=1)),
            ]
        )
    )
    filters = [f for f in held.filters if f.shape is None or f.shape.minor != victim]
    if drifted is None:
        del classes[victim]
    else:
        classes[victim] = drifted
    seen = SeenTree("htb", plan.HANDLE, plan.UNMARKED_MINOR, classes, filters)
    steps = plan.changes(tree, seen)
    assert steps
    assert plan.changes(tree, kernel(seen, steps)) == []


def test_a_busy_class_waits_for_the_next_time() -> None:
    held = kernel(
        EMPTY, plan.changes(plan.tree_for(policy(0.5, 0.5)), EMPTY)
    )  # class 0x11 is not wanted next
    busy = dict(held.classes)
    busy[0x11] = replace(busy[0x11], backlog_packets=3)
    one = plan.tree_for(policy(1.0))
    seen = replace(held, classes=busy)
    assert DropClass(0x11) not in plan.changes(one, seen)
    assert DropClass(0x11) in plan.changes(one, held)


def test_what_others_put_below_our_qdisc_stays() -> None:
    tree = plan.tree_for(policy(1.0))
    held = kernel(EMPTY, plan.changes(tree, EMPTY))
    theirs = SeenClass(HtbClass(0x99, 1, 1, 1, 1, 1, 1, 0), None)
    seen = replace(
        held, classes={**held.classes, 0x99: theirs}, filters=[SeenFilter(1, 0x800, None)]
    )
    # a class under our root class that is none of ours changes nothing of ours
    assert plan.changes(tree, seen) == []


def test_a_tree_of_ours_with_another_skeleton_is_built_anew() -> None:
    tree = plan.tree_for(policy(1.0))
    held = kernel(EMPTY, plan.changes(tree, EMPTY))
    other_default = replace(held, default_minor=0x20)
    steps = plan.changes(tree, other_default)
    assert steps[:2] == [RemoveRoot(), InstallRoot()]
    moved = dict(held.classes)
    moved[0x10] = SeenClass(replace(moved[0x10].shape, parent_minor=0x8), 1000)
    assert plan.changes(tree, replace(held, classes=moved))[0] == RemoveRoot()


def test_foreign_root_is_refused() -> None:
    with pytest.raises(InputError, match="htb 1:"):
        plan.changes(plan.tree_for(policy(1.0)), SeenTree("htb", 0x10000))
    for kind in ("noqueue", "mq", "pfifo_fast", "fq_codel", "noop"):
        assert not SeenTree(kind, 0).foreign
    assert not SeenTree("htb", plan.HANDLE).foreign
    assert SeenTree("fq", plan.HANDLE).foreign


def test_filters_for_both_families_move_with_the_marks() -> None:
    tree = plan.tree_for(policy(0.5, 0.5, dscps=(46, 0)))
    assert tree.filters == (DscpFilter("ipv4", 46, 0x10), DscpFilter("ipv6", 46, 0x10))
    held = kernel(EMPTY, plan.changes(tree, EMPTY))
    moved = plan.tree_for(policy(0.5, 0.5, dscps=(0, 46)))
    assert plan.changes(moved, held) == [
        DropFilter("ipv4", 10, 0x800),
        DropFilter("ipv6", 11, 0x801),
        PutFilter(DscpFilter("ipv4", 46, 0x11)),
        PutFilter(DscpFilter("ipv6", 46, 0x11)),
    ]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"rate_bps": 0.0}, "rate_bps"),
        ({"rate_bps": math.nan}, "rate_bps"),
        ({"rate_bps": 1e13}, "rate_bps"),
        ({"unmarked_share": 0.0}, "unmarked_share"),
        ({"unmarked_share": 0.6}, "unmarked_share"),
        ({"queue_packets": 1}, "queue_packets"),
    ],
)
def test_bad_numbers_are_named(changed: dict[str, float], field: str) -> None:
    with pytest.raises(InputError) as caught:
        plan.tree_for(policy(1.0), **changed)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_marks_that_cannot_tell_classes_apart_are_named() -> None:
    with pytest.raises(PolicyError, match=r"classes\[2\].dscp: got 10"):
        plan.tree_for(policy(0.4, 0.3, 0.3, dscps=(10, 0, 10)))
    with pytest.raises(PolicyError, match=r"classes\[1\].dscp: got 0"):
        plan.tree_for(policy(0.5, 0.5, dscps=(10, 0)), by_dscp=True)
    with pytest.raises(InputError, match="class_index"):
        plan.priority_of(64)


def test_commands_say_what_tc_would() -> None:
    tree = HtbTree(
        (HtbClass(0x10, 1, 8 * 10**6, 10**9, 16_000, 16_000, 100_000, 2),),
        1000,
        (DscpFilter("ipv6", 46, 0x10),),
    )
    said = [plan.as_command(step, "eth0") for step in plan.changes(tree, EMPTY)]
    assert said == [
        "tc qdisc add dev eth0 root handle 2d17: htb default 8",
        "tc class add dev eth0 parent 2d17:1 classid 2d17:10 htb rate 8000000bit "
        "ceil 1000000000bit burst 16000 cburst 16000 quantum 100000 prio 2",
        "tc qdisc add dev eth0 parent 2d17:10 handle 2e10: pfifo limit 1000",
        "tc filter add dev eth0 parent 2d17: protocol ipv6 pref 11 u32 "
        "match ip6 priority 0xb8 0xfc flowid 2d17:10",
    ]
    assert plan.as_command(DropClass(0x11), "e") == "tc class del dev e classid 2d17:11"
    assert plan.as_command(RemoveRoot(), "e") == "tc qdisc del dev e root"
    assert plan.as_command(DropFilter("ipv4", 10, 0x80000801), "e") == (
        "tc filter del dev e parent 2d17: protocol ip pref 10 handle 800:0:801 u32"
    )
