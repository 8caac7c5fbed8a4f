"""The audit log and the alarms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intentd.controller import audit
from intentd.controller.alarms import find_alarms
from intentd.controller.audit import AuditLog, Entry
from intentd.core.errors import InputError
from intentd.daemons.kit.changes import Changes, changes_from_plain
from intentd.daemons.kit.store import Store

CHANGE = {
    "number": 1, "wall_s": 1.0, "who": "", "via": "signal", "action": "reload", "about": "",
    "result": "done",
}  # fmt: skip
MEMBER: dict[str, Any] = {
    "role": "gpu", "name": "g1", "connected": True, "state": "present", "heard_s_ago": 1.0,
    "refused": {}, "bad_reports": 0, "last_error": "", "unready": [],
}  # fmt: skip


async def test_entries_come_back_newest_first_and_stay(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", (audit.MIGRATION,))
    log = AuditLog(store, lambda: 5.0)
    for number in range(5):
        await log.add(Entry("ann", "console", "policy_rollback", f"flows: {number}", "1.4", "1.5"))
    await log.add(Entry("x" * 999, "api", "a" * 999, "b" * 9999, result="refused: " + "c" * 999))
    store.close()
    store = Store(tmp_path / "s", (audit.MIGRATION,))
    rows = AuditLog(store, lambda: 6.0).page(3)
    assert [row["about"][-1] for row in rows] == ["b", "4", "3"]
    assert {key: rows[1][key] for key in ("who", "via", "before", "after", "result", "wall_s")} == {
        "who": "ann", "via": "console", "before": "1.4", "after": "1.5", "result": "done",
        "wall_s": 5.0,
    }  # fmt: skip
    assert len(rows[0]["who"]) == 128
    assert len(AuditLog(store, lambda: 6.0).page(100, rows[2]["id"])) == 3
    store.close()


async def test_a_members_changes_are_written_once_whoever_hears_of_them(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", (audit.MIGRATION, audit.MEMBERS_MIGRATION))
    log = AuditLog(store, lambda: 5.0)
    changes = Changes(lambda: 1.0)
    changes.add("ann", "admin", "reload", "", "generation 2")
    for told in (1, 2):
        for _ in range(told):
            await log.add_of_member("agent/a", "boot", changes_from_plain(changes.to_plain()))
        changes.add("", "signal", "reload", "", "refused: name: got 1")
    await AuditLog(store, lambda: 6.0).add_of_member("agent/a", "boot", [])  # another controller
    fresh = Changes(lambda: 1.0)
    fresh.add("", "start", "start", "/etc/x", "generation 2: name: got 1")
    await log.add_of_member(
        "agent/a", "next boot", changes_from_plain(fresh.to_plain())
    )  # numbers begin anew
    rows = [(row["who"], row["via"], row["about"], row["result"]) for row in log.page()]
    assert rows == [
        ("", "start", "agent/a /etc/x", "generation 2: name: got 1"),
        ("", "signal", "agent/a", "refused: name: got 1"),
        ("ann", "admin", "agent/a", "generation 2"),
    ]
    store.close()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (7, "changes: got 'int'"),
        ([{}], r"changes\[0\]: got 'dict'"),
        ([{**CHANGE, "number": 0}], r"changes\[0\].number: got 0"),
        ([{**CHANGE, "wall_s": None}], r"changes\[0\].wall_s: got None"),
        ([{**CHANGE, "via": "magic"}], r"changes\[0\].via: got 'magic'"),
        ([{**CHANGE, "about": "x" * 501}], r"changes\[0\].about"),
        ([CHANGE] * 65, "changes: got 'list', expected at most 64"),
    ],
)
def test_changes_that_are_none_are_refused(value: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        changes_from_plain(value)


async def test_the_oldest_entries_go(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit, "KEPT", 10)
    store = Store(tmp_path / "s", (audit.MIGRATION,))
    log = AuditLog(store, lambda: 5.0)
    for number in range(25):
        await log.add(Entry("ann", "api", "x", str(number)))
    assert [row["about"] for row in log.page(100)] == [str(n) for n in range(24, 14, -1)]
    store.close()


def alarms(**changed: Any) -> list[tuple[str, str]]:
    told: dict[str, Any] = {
        "unready": [], "members": [MEMBER], "held": {}, "domains": [],
        "jobs": {"search": {"error": ""}, "choice_error": "", "schedulers": []},
        "prompts": {"daily_nano": None, "spent_today_nano": 0},
    }  # fmt: skip
    return [(alarm.severity, alarm.text) for alarm in find_alarms(**{**told, **changed})]


def test_alarms_worst_first() -> None:
    assert alarms() == []
    gone = {**MEMBER, "connected": False, "state": "silent"}
    refuses = {**MEMBER, "refused": {"jobs": {"policy": [7, 3], "reason": "no"}}}
    sick = {**MEMBER, "unready": ["every model cools down"]}
    found = alarms(held={"flows": 3}, members=[gone, refuses, sick], unready=["disk full"])
    assert found == [
        ("critical", "disk full"),
        ("critical", "gone (silent) for 1 s"),
        ("critical", "refuses policy 7.3 of jobs: no"),
        ("critical", "not ready: every model cools down"),
        ("warning", "automatic policies of flows rest since the rollback to 3"),
    ]


def test_alarms_of_jobs_and_prompts() -> None:
    rows = [{"kept_percent": 50.0, "results": 100}, {"kept_percent": None, "results": 0}]
    jobs = {
        "search": {"error": "it broke"}, "choice_error": "",
        "schedulers": [{"name": "g", "coverage": rows}],
    }  # fmt: skip
    assert alarms(jobs=jobs) == [
        ("warning", "search: it broke"),
        ("warning", "50 % of 100 predictions kept their bound"),
    ]
    for spent, severity in ((79, None), (80, "warning"), (100, "critical")):
        found = alarms(prompts={"daily_nano": 100, "spent_today_nano": spent})
        assert [row[0] for row in found] == ([severity] if severity else [])
