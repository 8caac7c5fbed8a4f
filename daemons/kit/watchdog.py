"""Measures how late the event loop runs, and feeds the service manager only while it runs."""

from __future__ import annotations

from collections import deque
from typing import Final

from intentd.daemons.kit.clock import Clock
from intentd.daemons.kit.metrics import Metrics
from intentd.daemons.kit.systemd import Notifier

INTERVAL_S: Final = 1.0
WINDOW: Final = 120


class Watchdog:
    """A task of the loop itself: if the loop hangs, it hangs, and systemd restarts the daemon."""

    def __init__(self, clock: Clock, metrics: Metrics, notifier: Notifier) -> None:
        self._clock = clock
        self._metrics = metrics
        self._notifier = notifier
        self._lags: deque[float] = deque(maxlen=WINDOW)
        half = notifier.watchdog_s / 2
        self.interval_s = min(INTERVAL_S, half) if half > 0 else INTERVAL_S

    async def run(self) -> None:
        while True:
            due = self._clock.now() + self.interval_s
            await self._clock.sleep(self.interval_s)
            lag = max(0.0, self._clock.now() - due)
            self._lags.append(lag)
            self._metrics.loop_lag.observe(lag)
            if self._notifier.watchdog_s > 0:
                self._notifier.watchdog()

    def summary(self) -> dict[str, float]:
        """Seconds over the last two minutes: mean, p99 and largest."""
        lags = sorted(self._lags)
        if not lags:
            return {"mean": 0.0, "p99": 0.0, "max": 0.0}
        return {
            "mean": sum(lags) / len(lags),
            "p99": lags[min(len(lags) - 1, int(0.99 * len(lags)))],
            "max": lags[-1],
        }
