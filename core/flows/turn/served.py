"""What a sequencer holds: domains, their classes' ids, their members; and how that is written down
for the process after a planned restart."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from intentd.core.flows.policy import MAX_CLASSES
from intentd.core.flows.turn.ids import Progress


class IdLine:
    """One class of a domain."""

    __slots__ = ("claim_base", "claimed", "doubts", "next_id", "progress")

    def __init__(self, next_id: int) -> None:
        self.next_id = next_id
        self.progress = Progress(next_id - 1)
        self.claim_base = 0
        self.claimed = 0  # while recovering: bit i: a member still holds id claim_base + 1 + i
        self.doubts: deque[tuple[float, int, int]] = deque()  # (settles at, base, mask)


class ServedDomain:
    __slots__ = ("empty_since", "first_id", "id", "lines", "members", "name", "retired")

    def __init__(self, name: str, domain_id: int, first_id: int, now: float) -> None:
        self.name = name
        self.id = domain_id
        self.first_id = first_id
        self.lines: list[IdLine | None] = [None] * MAX_CLASSES
        self.members: dict[int, Registered] = {}  # by sender
        self.retired: dict[tuple[int, int], float] = {}  # (sender, boot) -> until when
        self.empty_since = now

    def line(self, class_index: int) -> IdLine:
        line = self.lines[class_index]
        if line is None:
            line = self.lines[class_index] = IdLine(self.first_id)
        return line


class Registered:
    """One process of one agent in one domain.

    held: class -> [base, bits]; bit i is id base + 1 + i, held and neither over nor given up.
    answered: request number -> (class, first id, count, answer), those above acked.
    promised: a lease given for a pause ends then, whatever is heard.
    """

    __slots__ = (
        "acked", "answered", "boot", "domain", "heard", "held", "name", "peer", "promised",
        "sequence",
    )  # fmt: skip

    def __init__(
        self, domain: ServedDomain, name: str, boot: int, peer: bytes, sequence: int, now: float
    ) -> None:
        self.domain = domain
        self.name = name
        self.boot = boot
        self.peer = peer
        self.sequence = sequence
        self.heard = now
        self.promised = -math.inf
        self.acked = 0
        self.held: dict[int, list[int]] = {}
        self.answered: dict[int, tuple[int, int, int, bytes]] = {}

    def lease_until(self, lease_s: float) -> float:
        return max(self.heard + lease_s, self.promised)


def domain_to_plain(domain: ServedDomain) -> dict[str, Any]:
    """JSON-ready; maps of ids as hexadecimal text. Connections are not written down."""
    return {
        "name": domain.name,
        "id": domain.id,
        "first_id": domain.first_id,
        "empty_since": domain.empty_since,
        "retired": [[sender, boot, until] for (sender, boot), until in domain.retired.items()],
        "lines": [None if line is None else _line_to_plain(line) for line in domain.lines],
        "members": [
            [sender, _member_to_plain(member)] for sender, member in domain.members.items()
        ],
    }


def domain_from_plain(plain: dict[str, Any]) -> ServedDomain:
    """Raises TypeError, KeyError or ValueError for what domain_to_plain did not write."""
    domain = ServedDomain(plain["name"], plain["id"], plain["first_id"], plain["empty_since"])
    domain.retired = {(sender, boot): until for sender, boot, until in plain["retired"]}
    domain.lines = [None if row is None else _line_from_plain(row) for row in plain["lines"]]
    domain.members = {sender: _member_from_plain(domain, row) for sender, row in plain["members"]}
    return domain


def _line_to_plain(line: IdLine) -> dict[str, Any]:
    progress = line.progress
    return {
        "next_id": line.next_id,
        "floor": progress.floor,
        "done": f"{progress.done:x}",
        "lease": f"{progress.lease:x}",
        "announced": f"{progress.announced:x}",
        "doubts": [[settles, base, f"{mask:x}"] for settles, base, mask in line.doubts],
    }


def _line_from_plain(plain: dict[str, Any]) -> IdLine:
    line = IdLine(plain["next_id"])
    line.progress = progress = Progress(plain["floor"])
    progress.done = int(plain["done"], 16)
    progress.lease = int(plain["lease"], 16)
    progress.announced = int(plain["announced"], 16)
    line.doubts = deque((settles, base, int(mask, 16)) for settles, base, mask in plain["doubts"])
    return line


def _member_to_plain(member: Registered) -> dict[str, Any]:
    return {
        "name": member.name,
        "boot": member.boot,
        "sequence": member.sequence,
        "heard": member.heard,
        "promised": None if member.promised == -math.inf else member.promised,
        "acked": member.acked,
        "held": [[index, base, f"{bits:x}"] for index, (base, bits) in member.held.items()],
        "answered": [
            [number, class_index, first, count, answer.hex()]
            for number, (class_index, first, count, answer) in member.answered.items()
        ],
    }


def _member_from_plain(domain: ServedDomain, plain: dict[str, Any]) -> Registered:
    member = Registered(
        domain, plain["name"], plain["boot"], b"", plain["sequence"], plain["heard"]
    )
    if plain["promised"] is not None:
        member.promised = plain["promised"]
    member.acked = plain["acked"]
    member.held = {index: [base, int(bits, 16)] for index, base, bits in plain["held"]}
    member.answered = {
        number: (class_index, first, count, bytes.fromhex(answer))
        for number, class_index, first, count, answer in plain["answered"]
    }
    return member
