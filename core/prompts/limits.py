"""Request rates: a token bucket that says how long to wait, instead of only no."""

from __future__ import annotations

from dataclasses import dataclass

from intentd.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `burst` at once and `per_second` in the long run."""

    per_second: float
    burst: float

    def __post_init__(self) -> None:
        if not 0 < self.per_second < float("inf"):
            raise InputError("per_second", self.per_second, "a finite number > 0")
        if not 1 <= self.burst < float("inf"):
            raise InputError("burst", self.burst, "a finite number >= 1")


def take(
    rate: Rate, level: float, since: float, *, now: float, count: float = 1.0
) -> tuple[float, float, float]:
    """(level, since, seconds to wait) of a bucket that had `level` at `since`, after asking.

    0 seconds: taken; a refused request takes nothing. A clock that goes back adds nothing.
    """
    level = min(rate.burst, level + max(0.0, now - since) * rate.per_second)
    wait_s = 0.0
    if count > rate.burst:
        wait_s = float("inf")
    elif level >= count:
        level -= count
    else:
        wait_s = (count - level) / rate.per_second
    return level, max(now, since), wait_s


class RateLimiter:
    """Token buckets by scope; scopes that are full again are forgotten, so memory is bounded.

    max_scopes: past it the scope idle for longest is forgotten (it starts full again: an
    attacker who makes up scopes gains a burst each, never more than the keys it holds).
    """

    def __init__(self, rate: Rate, *, max_scopes: int = 10_000) -> None:
        self.rate = rate
        self.max_scopes = max_scopes
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, scope: str, *, now: float, count: float = 1.0) -> float:
        """0 when the request may go on, else the seconds after which it could (Retry-After).

        now: monotonic seconds; a refused request takes nothing.
        """
        level, since = self._buckets.pop(scope, (self.rate.burst, now))
        level, since, wait_s = take(self.rate, level, since, now=now, count=count)
        self._buckets[scope] = (level, since)
        if len(self._buckets) > self.max_scopes:
            del self._buckets[next(iter(self._buckets))]
        return wait_s

    def __len__(self) -> int:
        return len(self._buckets)
