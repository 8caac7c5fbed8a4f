"""What a daemon can prove of itself when asked (admin command ``prove``, ``intentctl doctor``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement that must be true, looked up at the source, not in what the daemon remembers.

    check: short name of the kind. statement: what must hold. holds: None where it could not be
    looked up. evidence: what was found. cure: what to do when it does not hold.
    """

    check: str
    statement: str
    holds: bool | None
    evidence: str
    cure: str = ""

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)
