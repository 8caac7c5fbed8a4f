"""An operator's choice among Pareto-optimal configurations (sections 3.3.2 and 3.7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.core.units import is_finite

BALANCED: Final = "balanced"


@dataclass(frozen=True, slots=True)
class Choice:
    """A point by its index, or by a rule that outlives the front.

    prefer: the objective to be best in, or "balanced": nearest to the ideal, each objective scaled
    to its range on the front. at_most: bounds that come first. follow: choose again by the same
    rule whenever there is a new front.
    """

    index: int | None = None
    prefer: str = ""
    at_most: Mapping[str, float] = field(default_factory=dict)
    follow: bool = False

    def to_plain(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "prefer": self.prefer,
            "at_most": dict(self.at_most),
            "follow": self.follow,
        }


def choice_from_plain(plain: object) -> Choice:
    """For untrusted input. Raises InputError."""
    if not isinstance(plain, Mapping):
        raise InputError("choice", f"{plain!r:.60}", "a table")
    for name in plain:
        if name not in Choice.__slots__:
            known = ", ".join(Choice.__slots__)
            raise InputError(f"choice.{name!s:.40}", plain[name], f"one of {known}")
    index, prefer = plain.get("index"), plain.get("prefer") or ""
    if index is not None and (type(index) is not int or index < 0):
        raise InputError("choice.index", index, "a number >= 0")
    if not isinstance(prefer, str):
        raise InputError("choice.prefer", f"{prefer!r:.60}", f"an objective, or {BALANCED}")
    bounds = plain.get("at_most") or {}
    if not isinstance(bounds, Mapping):
        raise InputError("choice.at_most", f"{bounds!r:.60}", "a table of objectives")
    for name, value in bounds.items():
        if not (is_finite(value) and value >= 0):
            raise InputError(f"choice.at_most.{name!s:.40}", value, "a finite number >= 0")
    follow = plain.get("follow", False)
    if not isinstance(follow, bool):
        raise InputError("choice.follow", follow, "true or false")
    by_rule = bool(prefer or bounds)
    if by_rule == (index is not None):
        raise InputError("choice", dict(plain), "an index, or prefer and at_most, not both")
    if follow and not by_rule:
        raise InputError(
            "choice.follow", follow, "a rule: an index means nothing on the next front"
        )
    return Choice(index, prefer, {str(k): float(v) for k, v in bounds.items()}, follow)


def pick(front: Sequence[Mapping[str, float]], choice: Choice) -> int:
    """Index of the chosen point. front: objectives of each point; smaller is better.

    Raises InputError for an index or objective that is not there, and bounds nothing meets.
    """
    if not front:
        raise InputError("front", 0, "at least one point: none was searched yet")
    if choice.index is not None:
        if choice.index >= len(front):
            raise InputError("index", choice.index, f"0 to {len(front) - 1}")
        return choice.index
    names = list(front[0])
    for name in [
        *choice.at_most,
        *([choice.prefer] if choice.prefer not in ("", BALANCED) else []),
    ]:
        if name not in names:
            raise InputError("objective", name, f"one of {', '.join(names)}")
    able = [
        at
        for at, point in enumerate(front)
        if all(point[name] <= limit for name, limit in choice.at_most.items())
    ]
    if not able:
        least = ", ".join(f"{name} {min(p[name] for p in front):g}" for name in choice.at_most)
        raise InputError("at_most", dict(choice.at_most), f"bounds a point meets (least: {least})")
    if choice.prefer == BALANCED:
        return min(able, key=lambda at: _distance(front, at, names))
    best = choice.prefer or next((n for n in names if n not in choice.at_most), names[0])
    return min(able, key=lambda at: front[at][best])


def _distance(front: Sequence[Mapping[str, float]], at: int, names: Sequence[str]) -> float:
    total = 0.0
    for name in names:
        values = [point[name] for point in front]
        low, high = min(values), max(values)
        total += ((front[at][name] - low) / (high - low)) ** 2 if high > low else 0.0
    return math.sqrt(total)
