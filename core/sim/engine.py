"""A virtual clock with a heap of events: the shell that simulations put around the cores."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from intentd.core.errors import StateError


class Event:
    """Something to happen at a time; cancel() forgets it."""

    __slots__ = ("action", "cancelled", "when")

    def __init__(self, when: float, action: Callable[[], None]) -> None:
        self.when = when
        self.action = action
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Engine:
    """Runs events in order of time, those of one time in the order they were asked for."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start
        self._heap: list[tuple[float, int, Event]] = []
        self._count = 0

    def at(self, when: float, action: Callable[[], None]) -> Event:
        """Call action at a time not before now. Raises StateError for the past."""
        if not when >= self.now:
            raise StateError(f"event at {when!r}, but it is {self.now!r} already")
        event = Event(when, action)
        self._count += 1
        heappush(self._heap, (when, self._count, event))
        return event

    def after(self, delay_s: float, action: Callable[[], None]) -> Event:
        return self.at(self.now + delay_s, action)

    def next_time(self) -> float | None:
        """Time of the next event, or None when none is left."""
        while self._heap and self._heap[0][2].cancelled:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Run the next event; False when none is left."""
        if self.next_time() is None:
            return False
        when, _, event = heappop(self._heap)
        self.now = when
        event.action()
        return True

    def run(self, until: float | None = None, max_events: int | None = None) -> int:
        """Run until none is left, `until` is reached (now is then until), or max_events ran.

        Returns how many ran.
        """
        count = 0
        while max_events is None or count < max_events:
            upcoming = self.next_time()
            if upcoming is None or (until is not None and upcoming > until):
                if until is not None:
                    self.now = max(self.now, until)
                break
            self.step()
            count += 1
        return count
