"""What an operator should look at, worst first: derived from what the controller knows anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

MAX_ALARMS: Final = 200
COVERAGE_TARGET_PERCENT: Final = 90.0
COVERAGE_SLACK_PERCENT: Final = 5.0
COVERAGE_RESULTS: Final = 50  # below that a share says little
BUDGET_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True)
class Alarm:
    """severity: critical (something does not work), warning (it does, worse than it could)."""

    severity: str
    about: str
    text: str
    page: str

    def to_plain(self) -> dict[str, str]:
        return {
            "severity": self.severity,
            "about": self.about,
            "text": self.text,
            "page": self.page,
        }


def find_alarms(
    *,
    unready: Sequence[str],
    members: Sequence[Mapping[str, Any]],
    held: Mapping[str, int],
    domains: Sequence[Mapping[str, Any]],
    jobs: Mapping[str, Any],
    prompts: Mapping[str, Any],
) -> list[Alarm]:
    """held: application -> number held at. The other arguments: as the API shows them."""
    found = [Alarm("critical", "controller", reason, "") for reason in unready]
    for member in members:
        found += _of_member(member)
    for name, number in held.items():
        text = f"automatic policies of {name} rest since the rollback to {number}"
        found.append(Alarm("warning", name, text, f"policies?application={name}"))
    for domain in domains:
        for agent, row in domain["agents"].items():
            if row["shaping"] == "foreign":
                text = f"not shaped on {agent}: {row['reason']}"
                found.append(Alarm("warning", domain["domain"], text, "flows"))
        if domain["dropped_flows"]:
            text = f"{domain['dropped_flows']} flows were not learned from: too many at once"
            found.append(Alarm("warning", domain["domain"], text, "flows"))
    found += _of_jobs(jobs) + _of_prompts(prompts)
    found.sort(key=lambda alarm: alarm.severity != "critical")
    return found[:MAX_ALARMS]


def _of_member(member: Mapping[str, Any]) -> list[Alarm]:
    name = f"{member['role']}/{member['name']}"
    found = []
    if not member["connected"]:
        text = f"gone ({member['state']}) for {member['heard_s_ago']:.0f} s"
        severity = "warning" if member["state"] == "goodbye" else "critical"
        found.append(Alarm(severity, name, text, ""))
    else:
        for reason in member["unready"]:
            found.append(Alarm("critical", name, f"not ready: {reason}", ""))
    for application, refused in member["refused"].items():
        number = ".".join(map(str, refused["policy"]))
        text = f"refuses policy {number} of {application}: {refused['reason']}"
        found.append(Alarm("critical", name, text, f"policies?application={application}"))
    if member["bad_reports"]:
        text = f"{member['bad_reports']} bad reports, last: {member['last_error']}"
        found.append(Alarm("warning", name, text, ""))
    return found


def _of_jobs(jobs: Mapping[str, Any]) -> list[Alarm]:
    found = []
    if jobs["search"]["error"]:
        found.append(Alarm("warning", "jobs", f"search: {jobs['search']['error']}", "jobs"))
    if jobs["choice_error"]:
        found.append(Alarm("warning", "jobs", f"rule: {jobs['choice_error']}", "jobs"))
    for scheduler in jobs["schedulers"]:
        name = f"gpu/{scheduler['name']}"
        kept = results = 0.0
        for row in scheduler["coverage"]:
            if isinstance(row, Mapping) and row.get("kept_percent") is not None:
                results += row.get("results", 0)
                kept += row["kept_percent"] / 100 * row.get("results", 0)
        least = COVERAGE_TARGET_PERCENT - COVERAGE_SLACK_PERCENT
        if results >= COVERAGE_RESULTS and 100 * kept / results < least:
            text = f"{100 * kept / results:.0f} % of {results:.0f} predictions kept their bound"
            found.append(Alarm("warning", name, text, "jobs"))
    return found


def _of_prompts(prompts: Mapping[str, Any]) -> list[Alarm]:
    daily, spent = prompts["daily_nano"], prompts["spent_today_nano"]
    if daily is None or spent < BUDGET_SHARE * daily:
        return []
    share = 100 * spent / daily if daily else 100.0
    severity = "critical" if spent >= daily else "warning"
    return [Alarm(severity, "prompts", f"{share:.0f} % of the day's budget is spent", "prompts")]
