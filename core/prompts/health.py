"""When a model is asked again after it failed: cooldown, probes, and a budget of retries."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from intentd.core.errors import InputError

MAX_DOUBLINGS: Final = 4
MAX_COOLDOWN_FACTOR: Final = 12.0
RATE_LIMITED: Final = "rate_limited"
MAX_RETRY_AFTER_S: Final = 3600.0


class HealthState(enum.Enum):
    """CLOSED -> OPEN after failures in a row -> HALF_OPEN when the cooldown is over -> CLOSED when
    the probe succeeds, OPEN (longer) when it fails."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class ModelHealth:
    """Circuit of one model. now: monotonic seconds.

    failures: in a row before it opens. cooldown_s: first wait; doubles with each failed probe up
    to MAX_COOLDOWN_FACTOR times. A provider's own retry-after prevails when it is longer.

    A provider that limits the rate and says for how long is not failing: it is left alone for just
    that (MAX_RETRY_AFTER_S at most), however often it says so, and then asked as before.
    """

    failures: int = 5
    cooldown_s: float = 5.0
    state: HealthState = HealthState.CLOSED
    reason: str = ""
    in_a_row: int = 0
    open_until: float = 0.0
    _opened: int = 0
    _probing_since: float | None = None

    def admit(self, now: float) -> bool:
        """Whether a call may be made. In HALF_OPEN only one at a time: the probe.

        A probe whose outcome was never told (its client left) is forgotten after a cooldown.
        """
        if self.state is HealthState.CLOSED:
            return True
        if self.state is HealthState.OPEN:
            if now < self.open_until:
                return False
            if self.reason == RATE_LIMITED and not self._opened:
                self.state = HealthState.CLOSED
                self.reason = ""
                return True
            self.state = HealthState.HALF_OPEN
            self._probing_since = None
        if self._probing_since is not None and now - self._probing_since < self.cooldown_s:
            return False
        self._probing_since = now
        return True

    def wait_s(self, now: float) -> float:
        """Seconds until a call may be tried; 0 when one may now."""
        if self.state is HealthState.OPEN:
            return max(0.0, self.open_until - now)
        if self.state is HealthState.HALF_OPEN and self._probing_since is not None:
            return max(0.0, self._probing_since + self.cooldown_s - now)
        return 0.0

    def succeeded(self) -> None:
        self.state = HealthState.CLOSED
        self.in_a_row = 0
        self.reason = ""
        self._opened = 0
        self._probing_since = None

    def failed(self, now: float, reason: str, retry_after_s: float = 0.0) -> bool:
        """Count a failure; True when this one opened the circuit."""
        retry_after_s = min(retry_after_s, MAX_RETRY_AFTER_S)
        was = self.state
        if reason == RATE_LIMITED and retry_after_s > 0:
            return self._limited(now, retry_after_s)
        self.in_a_row += 1
        self.reason = reason
        if was is HealthState.OPEN:  # a call that was under way when it opened
            self.open_until = max(self.open_until, now + retry_after_s)
            return False
        if was is HealthState.CLOSED and self.in_a_row < self.failures and retry_after_s <= 0:
            return False
        factor = min(2.0 ** min(self._opened, MAX_DOUBLINGS), MAX_COOLDOWN_FACTOR)
        pause_s = self.cooldown_s * factor
        if was is HealthState.CLOSED and self.in_a_row < self.failures:
            pause_s = 0.0  # only what the provider asked for
        self.open_until = now + max(pause_s, retry_after_s)
        self.state = HealthState.OPEN
        self._opened += 1
        self._probing_since = None
        return True

    def _limited(self, now: float, retry_after_s: float) -> bool:
        was = self.state
        if was is HealthState.OPEN:
            self.open_until = max(self.open_until, now + retry_after_s)
            return False
        self.open_until = now + retry_after_s
        self.state = HealthState.OPEN
        self.reason = RATE_LIMITED
        self.in_a_row = self._opened = 0  # it answered: whatever it failed by before is over
        self._probing_since = None
        return True


@dataclass(slots=True)
class RetryBudget:
    """Retries are at most `share` of requests in the long run, and `burst` at once.

    Without it every client's retries multiply the load on a provider that fails from load.
    """

    share: float = 0.2
    burst: float = 10.0
    _level: float = field(default=-1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError("share", self.share, "0 to 1")
        if self.burst < 0:
            raise InputError("burst", self.burst, "a number >= 0")
        self._level = self.burst if self.share > 0 else 0.0

    def request(self) -> None:
        self._level = min(self.burst, self._level + self.share)

    def take(self) -> bool:
        if self._level < 1:
            return False
        self._level -= 1
        return True
