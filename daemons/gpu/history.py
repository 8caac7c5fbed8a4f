"""What the scheduler tells the controller about its jobs: who came, how large they were."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import takewhile
from typing import Any, Final

from intentd.core.jobs.history import Arrival, arrivals_to_plain

KEPT: Final = 2000  # newest jobs that a controller who asks anew is told of


class Reporter:
    """Bounded. A job is told when it came and again when its work was measured; after a greeting
    everything kept is told again, and a report repeats the one before, for reports get lost."""

    def __init__(self) -> None:
        self._rows: OrderedDict[int, tuple[int, Arrival]] = OrderedDict()
        self._serial = 0
        self._sent = self._sent_before = 0

    def __len__(self) -> int:
        return len(self._rows)

    def arrived(self, arrival: Arrival) -> None:
        self._serial += 1
        self._rows[arrival.job] = self._serial, arrival
        self._rows.move_to_end(arrival.job)
        if len(self._rows) > KEPT:
            self._rows.popitem(last=False)

    def ended(self, job: int, worked_gpu_s: float) -> None:
        """worked_gpu_s: measured; 0 for a job that never ran, which is then forgotten."""
        known = self._rows.get(job)
        if known is not None:
            self.arrived(replace(known[1], size_gpu_s=max(0.0, worked_gpu_s)))

    def greeted(self) -> None:
        """A controller may know nothing."""
        self._sent = self._sent_before = 0

    def report(self) -> dict[str, Any]:
        """The next piece, as core/jobs/history says."""
        news = takewhile(lambda row: row[0] > self._sent_before, reversed(self._rows.values()))
        rows = list(news)[::-1]
        plain = arrivals_to_plain(arrival for _, arrival in rows)
        told = len(plain["rows"])
        if told < len(rows):  # more to come: go on from here
            self._sent = self._sent_before = rows[told - 1][0] if told else self._sent_before
        else:
            self._sent_before, self._sent = self._sent, rows[-1][0] if rows else self._sent
        return plain
