"""What the controller remembers of its members."""

from __future__ import annotations

import pytest

from intentd.controller import registry as module
from intentd.controller.registry import Registry, member_plain
from intentd.core.messages import PolicyAck
from intentd.daemons.kit.hub import Member


def member(
    name: str = "a", boot: str = "b1", policies: dict[str, list[int]] | None = None
) -> Member:
    return Member("agent", name, "host", "0.1", boot, b"id", {}, policies or {}, 0.0, 0.0)


def test_another_boot_is_a_restart_and_the_same_is_not() -> None:
    registry = Registry()
    assert [registry.hello(member(boot=boot)) for boot in ("b1", "b1", "b2")] == [
        False,
        False,
        True,
    ]
    assert registry.record(("agent", "a")).restarts == 1


def test_gaps_in_the_sequence_are_lost_reports_of_this_boot_alone() -> None:
    registry = Registry()
    registry.hello(member())
    for sequence in (1, 2, 5, 4):
        registry.report(member(), sequence)
    registry.hello(member(boot="b2"))
    registry.report(member(boot="b2"), 9)
    record = registry.record(("agent", "a"))
    assert (record.reports, record.lost_reports) == (5, 2)


def test_a_refusal_stays_until_that_policy_or_a_later_one_runs() -> None:
    registry = Registry()
    registry.ack(member(), PolicyAck("flows", 1, 7, False, "weights"), wall_s=5.0)
    registry.report(member(policies={"flows": [1, 6]}), 1)
    plain = registry.record(("agent", "a")).to_plain()
    assert plain["refused"] == {"flows": {"policy": [1, 7], "reason": "weights", "wall_s": 5.0}}
    registry.report(member(policies={"flows": [2, 1]}), 2)
    assert registry.record(("agent", "a")).refused == {}


def test_states_and_bad_reports() -> None:
    registry = Registry()
    registry.hello(member())
    registry.bad_report(member(), "x" * 10_000)
    registry.gone(member(), "silent")
    record = registry.record(("agent", "a"))
    assert (record.state, record.bad_reports, len(record.last_error)) == ("silent", 1, 512)
    registry.report(member(), 1)
    assert record.state == "present"


def test_the_record_not_heard_of_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 2)
    registry = Registry()
    for name in ("a", "b", "a", "c"):
        registry.report(member(name), 1)
    assert registry.record(("agent", "a")).reports == 2
    assert registry.record(("agent", "b")).reports == 0


def test_a_member_behind_the_policy_in_force_says_so() -> None:
    one = member(policies={"flows": [1, 3]})
    for newest, behind in (([1, 4], ["flows"]), ([1, 3], []), ([2, 1], ["flows"])):
        plain = member_plain(
            one, Registry().record(one.key), 1.0, {"flows": newest, "jobs": [9, 9]}
        )
        assert plain["behind"] == behind
