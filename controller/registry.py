"""What the controller remembers of its members beyond the link's table.

The link knows who is connected and what each one runs; this adds what happened to them: restarts,
reports lost or bad, and which policies they refused, when and why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.messages import PolicyAck
from intentd.daemons.kit.hub import Member

MAX_RECORDS: Final = 4096
MAX_ERROR: Final = 512


@dataclass(slots=True)
class Refused:
    """A policy a member would not take, and why."""

    era: int
    number: int
    reason: str
    wall_s: float


@dataclass(slots=True)
class Record:
    """The story of one member (role and name), over its restarts.

    States: *present* -> *silent* or *left* or *replaced* (the link's word) -> *present*.
    """

    boot: str = ""
    state: str = "present"
    restarts: int = 0
    reports: int = 0
    lost_reports: int = 0
    bad_reports: int = 0
    last_error: str = ""
    sequence: int = 0
    refused: dict[str, Refused] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "restarts": self.restarts,
            "reports": self.reports,
            "lost_reports": self.lost_reports,
            "bad_reports": self.bad_reports,
            "last_error": self.last_error,
            "refused": {
                name: {
                    "policy": [refused.era, refused.number],
                    "reason": refused.reason,
                    "wall_s": refused.wall_s,
                }
                for name, refused in self.refused.items()
            },
        }


class Registry:
    """Bounded: beyond MAX_RECORDS the record not heard of longest is forgotten."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], Record] = {}

    def record(self, key: tuple[str, str]) -> Record:
        """The record of a member, a new one if it is unknown; it becomes the most recent."""
        record = self._records.pop(key, None) or Record()
        self._records[key] = record
        if len(self._records) > MAX_RECORDS:
            del self._records[next(iter(self._records))]
        return record

    def hello(self, member: Member) -> bool:
        """Take note of a member. True if this is another boot of one known before."""
        record = self.record(member.key)
        again = bool(record.boot) and record.boot != member.boot
        if again:
            record.restarts += 1
        if record.boot != member.boot:
            record.sequence = 0
        record.boot, record.state = member.boot, "present"
        self._forgive(record, member)
        return again

    def report(self, member: Member, sequence: int) -> None:
        record = self.record(member.key)
        if record.sequence:
            record.lost_reports += max(0, sequence - record.sequence - 1)
        record.sequence = sequence
        record.reports += 1
        record.state = "present"
        self._forgive(record, member)

    def bad_report(self, member: Member, error: str) -> None:
        record = self.record(member.key)
        record.bad_reports += 1
        record.last_error = error[:MAX_ERROR]

    def ack(self, member: Member, ack: PolicyAck, *, wall_s: float) -> None:
        """A refusal is kept until the member runs that policy or a later one."""
        record = self.record(member.key)
        if ack.applied:
            self._forgive(record, member)
        else:
            record.refused[ack.application] = Refused(ack.era, ack.number, ack.reason, wall_s)

    def gone(self, member: Member, reason: str) -> None:
        self.record(member.key).state = reason

    @staticmethod
    def _forgive(record: Record, member: Member) -> None:
        for name, (era, number) in member.policies.items():
            refused = record.refused.get(name)
            if refused is not None and (era, number) >= (refused.era, refused.number):
                del record.refused[name]


def member_plain(
    member: Member, record: Record, now: float, newest: dict[str, list[int]]
) -> dict[str, Any]:
    """One row of /api/members. newest: application -> [era, number] in force."""
    plain = member.to_plain(now) | record.to_plain()
    plain["behind"] = sorted(
        name
        for name, number in newest.items()
        if name in member.policies and member.policies[name] < number
    )
    return plain
