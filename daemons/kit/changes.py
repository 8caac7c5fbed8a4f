"""What was changed at a daemon by hand or by signal, for the controller's audit log.

A member's newest changes ride on its reports, numbered within its boot, until they are old; so one
lost report loses none, and the controller tells those it has written down by their number.
"""

from __future__ import annotations

import pwd
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from intentd.core.errors import InputError

KEPT: Final = 64
MAX_TEXT: Final = 500
WAYS: Final = ("admin", "api", "signal", "start", "trial")


@dataclass(frozen=True, slots=True)
class Change:
    """number: grows by one within a boot. who: an account, or "" where nobody can be named. via:
    one of WAYS. result: "done", "generation N", or "refused: why"."""

    number: int
    wall_s: float
    who: str
    via: str
    action: str
    about: str
    result: str

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


class Changes:
    """The newest KEPT of one daemon."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._kept: deque[Change] = deque(maxlen=KEPT)
        self._number = 0

    def add(self, who: str, via: str, action: str, about: str, result: str) -> Change:
        self._number += 1
        change = Change(
            self._number, self._wall(), who, via, action, about[:MAX_TEXT], result[:MAX_TEXT]
        )
        self._kept.append(change)
        return change

    def to_plain(self) -> list[dict[str, Any]]:
        return [change.to_plain() for change in self._kept]


def changes_from_plain(value: object) -> list[Change]:
    """What a report brought. Raises InputError."""
    if not isinstance(value, list) or len(value) > KEPT:
        raise InputError("changes", type(value).__name__, f"at most {KEPT} changes")
    return [_change(row, f"changes[{index}]") for index, row in enumerate(value)]


def _change(row: object, where: str) -> Change:
    if not isinstance(row, Mapping) or set(row) != set(Change.__slots__):
        raise InputError(where, type(row).__name__, ", ".join(Change.__slots__))
    number, wall_s = row["number"], row["wall_s"]
    if type(number) is not int or number < 1:
        raise InputError(f"{where}.number", number, "an integer from 1 on")
    if type(wall_s) not in (int, float):
        raise InputError(f"{where}.wall_s", wall_s, "seconds since 1970")
    texts = {name: row[name] for name in ("who", "via", "action", "about", "result")}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise InputError(f"{where}.{name}", f"{text!r:.60}", f"at most {MAX_TEXT} characters")
    if texts["via"] not in WAYS:
        raise InputError(f"{where}.via", texts["via"], f"one of {', '.join(WAYS)}")
    return Change(number, float(wall_s), **texts)


def account_of(uid: int) -> str:
    """The name of a user of this machine."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"uid-{uid}"
