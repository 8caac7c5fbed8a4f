"""A fluid link: weighted sharing among busy classes, equal sharing inside a class.

What HTB with rates and quanta in proportion to the weights does, without packets: the share of an
idle class goes to the busy ones by weight. Classes with priorities are served strictly in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from intentd.core.errors import StateError
from intentd.core.flows.policy import DomainPolicy

_INF = math.inf


class FluidLink:
    """Generalised processor sharing with two levels of virtual time, O(classes + log n) an event.

    One level per priority has a virtual clock G that moves at rate / (weight of the busy classes);
    a class serves each of its n flows weight / n bytes per unit of G. So a class's next
    completion, told in G, moves only when the class itself changes.
    """

    def __init__(self, policy: DomainPolicy) -> None:
        self._rate = policy.rate_bps / 8.0
        self._weight = [cls.weight for cls in policy.classes]
        count = len(policy.classes)
        priorities = sorted({cls.priority for cls in policy.classes})
        self._level = [priorities.index(cls.priority) for cls in policy.classes]
        levels = len(priorities)
        self._clock = [0.0] * levels  # G of each level
        self._busy = [0.0] * levels  # weight of its busy classes
        self._finish = [[_INF] * count for _ in range(levels)]  # in G, per class
        self._heaps: list[list[tuple[float, int, int]]] = [[] for _ in range(count)]
        self._active = [0] * count
        self._served = [0.0] * count  # bytes each flow of the class got since it became busy
        self._mark = [0.0] * count  # G at which _served was taken
        self._tags: dict[int, tuple[int, float]] = {}  # flow -> class, finish tag
        self._now = 0.0
        self._serving = 0  # level in service; levels when idle
        self._sequence = 0
        self._find_level()

    def start(self, flow: int, class_index: int, size_bytes: float, *, now: float) -> None:
        """A flow begins to send size_bytes."""
        if flow in self._tags:
            raise StateError(f"flow {flow} is on the link already")
        self._advance(now)
        k = class_index
        if not self._active[k]:
            self._served[k] = 0.0
            self._mark[k] = self._clock[self._level[k]]
        else:
            self._settle(k)
        tag = self._served[k] + size_bytes
        self._sequence += 1
        heappush(self._heaps[k], (tag, self._sequence, flow))
        self._tags[flow] = (k, tag)
        self._active[k] += 1
        if self._active[k] == 1:
            self._weigh(self._level[k])
        self._schedule(k)

    def next_finish(self) -> float:
        """When the next flow ends if nothing else happens; inf while idle."""
        level = self._serving
        if level == len(self._clock):
            return _INF
        ahead = min(self._finish[level]) - self._clock[level]
        if ahead <= 0.0:
            return self._now
        return self._now + ahead * self._busy[level] / self._rate

    def finish(self) -> tuple[float, int]:
        """Go to next_finish and take that flow off the link: (time, flow)."""
        when = self.next_finish()
        if when == _INF:
            raise StateError("no flow is on the link")
        level = self._serving
        finish = self._finish[level]
        tip = min(finish)
        k = finish.index(tip)
        self._now = when
        self._clock[level] = max(self._clock[level], tip)
        tag, _, flow = heappop(self._heaps[k])
        del self._tags[flow]
        # Exactly at its tag: no rounding of the clock is left in the class.
        self._served[k] = tag
        self._mark[k] = self._clock[level]
        self._left(k)
        return when, flow

    def remove(self, flow: int, *, now: float) -> float:
        """Take a flow off before its end (its sender died); returns the bytes it still had."""
        self._advance(now)
        k, tag = self._tags.pop(flow)
        self._settle(k)
        heap = self._heaps[k]
        heap[:] = [row for row in heap if row[2] != flow]
        heapify(heap)
        self._left(k)
        return max(0.0, tag - self._served[k])

    def remaining(self, flow: int, *, now: float) -> float:
        """Bytes a flow on the link still has to send."""
        self._advance(now)
        k, tag = self._tags[flow]
        self._settle(k)
        self._schedule(k)
        return max(0.0, tag - self._served[k])

    def set_weights(self, weights: Sequence[float], *, now: float) -> None:
        """Other shares from now on (the virtual-PS mode changes them at every event)."""
        self._advance(now)
        for k, active in enumerate(self._active):
            if active:
                self._settle(k)
        self._weight = list(weights)
        for level in range(len(self._clock)):
            self._weigh(level)
        for k, active in enumerate(self._active):
            if active:
                self._schedule(k)

    def active(self) -> list[int]:
        """Flows on the link, per class."""
        return list(self._active)

    def _advance(self, now: float) -> None:
        if now <= self._now:
            return
        level = self._serving
        if level < len(self._clock):
            self._clock[level] += (now - self._now) * self._rate / self._busy[level]
        self._now = now

    def _settle(self, k: int) -> None:
        clock = self._clock[self._level[k]]
        self._served[k] += (clock - self._mark[k]) * self._weight[k] / self._active_before(k)
        self._mark[k] = clock

    def _active_before(self, k: int) -> int:
        return self._active[k] or 1

    def _schedule(self, k: int) -> None:
        ahead = self._heaps[k][0][0] - self._served[k]
        self._finish[self._level[k]][k] = self._mark[k] + ahead * self._active[k] / self._weight[k]

    def _left(self, k: int) -> None:
        self._active[k] -= 1
        if self._active[k]:
            self._schedule(k)
            return
        level = self._level[k]
        self._finish[level][k] = _INF
        self._weigh(level)

    def _weigh(self, level: int) -> None:
        """The busy weight of a level anew; its clock restarts whenever the level is idle."""
        total = 0.0
        for k, active in enumerate(self._active):
            if active and self._level[k] == level:
                total += self._weight[k]
        self._busy[level] = total
        if total == 0.0:
            self._clock[level] = 0.0
        self._find_level()

    def _find_level(self) -> None:
        for level, weight in enumerate(self._busy):
            if weight > 0.0:
                self._serving = level
                return
        self._serving = len(self._busy)


class SrptLink:
    """Shortest remaining processing time, preemptive: for simulation only."""

    def __init__(self, rate_bps: float) -> None:
        self._rate = rate_bps / 8.0
        self._heap: list[tuple[float, int, int]] = []  # remaining bytes, sequence, flow
        self._now = 0.0
        self._sequence = 0

    def start(self, flow: int, class_index: int, size_bytes: float, *, now: float) -> None:
        """A flow begins, or waits for shorter ones. The class plays no part."""
        heap = self._heap
        if heap and now > self._now:
            left, sequence, first = heap[0]
            # Serving shrinks the least entry, so the heap stays a heap.
            heap[0] = (max(0.0, left - (now - self._now) * self._rate), sequence, first)
        self._now = max(self._now, now)
        self._sequence += 1
        heappush(heap, (size_bytes, self._sequence, flow))

    def next_finish(self) -> float:
        return self._now + self._heap[0][0] / self._rate if self._heap else _INF

    def finish(self) -> tuple[float, int]:
        """Go to next_finish and take that flow off the link: (time, flow)."""
        if not self._heap:
            raise StateError("no flow is on the link")
        self._now = self.next_finish()
        return self._now, heappop(self._heap)[2]
