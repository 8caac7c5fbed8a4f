"""The virtual processor-sharing scheduler of equation 2.1, exactly: N_k(t) / N(t).

Section 2.3.5 has 2D keep a PS schedule of all jobs in mind and give each class the share of the
jobs that this schedule holds. It is kept here as a mode and a check; the weights in use are job
shares (classes.py). Two things to know, both measured by `python -m benchmarks.simulator`:

- followed at every event, the emulation gives short flows about PS's own median and p90 (four
  times worse than job shares on data mining), for the classes then progress exactly as in PS;
- its *time average* is the share of bytes in each class, for that is how long a PS link is busy
  with them. Used as fixed weights it starves the short flows: the median of data mining gets
  about 27,000 times worse. Never average it.
"""

from __future__ import annotations

import math
from heapq import heappop, heappush

from intentd.core.flows.policy import DomainPolicy


class VirtualPs:
    """A PS link fed with the same arrivals; counts its jobs per class. O(log n) an event."""

    def __init__(self, policy: DomainPolicy) -> None:
        self._policy = policy
        self._rate = policy.rate_bps / 8.0
        self._heap: list[tuple[float, int, int]] = []  # finish tag, sequence, class
        self._counts = [0] * len(policy.classes)
        self._served = 0.0  # bytes each job got since the link was last idle
        self._now = 0.0
        self._sequence = 0

    def arrive(self, size_bytes: float, *, now: float) -> None:
        """A job arrives; departures up to now happen first."""
        self.advance(now)
        self._sequence += 1
        k = self._policy.class_of(size_bytes)
        heappush(self._heap, (self._served + size_bytes, self._sequence, k))
        self._counts[k] += 1

    def next_departure(self) -> float:
        """When N next changes if nothing arrives; inf while idle."""
        if not self._heap:
            return math.inf
        ahead = self._heap[0][0] - self._served
        return self._now + max(0.0, ahead) * len(self._heap) / self._rate

    def advance(self, now: float) -> None:
        """Let departures up to and including now happen."""
        while self._heap:
            when = self.next_departure()
            if when > now:
                break
            self._served = max(self._served, self._heap[0][0])
            self._now = max(self._now, when)
            self._counts[heappop(self._heap)[2]] -= 1
        if self._heap:
            self._served += max(0.0, now - self._now) * self._rate / len(self._heap)
        else:
            self._served = 0.0
        self._now = max(self._now, now)

    def counts(self) -> list[int]:
        """N_k, jobs per class."""
        return list(self._counts)

    def weights(self, floor: float = 1e-9) -> list[float]:
        """N_k / N; a class without virtual jobs has `floor`, for what rounding left in it."""
        total = max(1, len(self._heap))
        return [max(count / total, floor) for count in self._counts]
