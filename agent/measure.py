"""What an agent measures of one domain, in bounded memory, and reports to the controller."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, Final

from intentd.core.flows.policy import MAX_CLASSES
from intentd.core.stats import LogHistogram

SAMPLE: Final = 2000  # newest arrivals of a report interval; the histogram has them all


class Meter:
    """Counts, histograms and the newest sizes of one domain since the process started.

    Per-class histograms follow the class *index*: they are cleared when a policy changes the
    number of classes or their thresholds, for then an index means something else.
    """

    def __init__(self) -> None:
        self.sizes = LogHistogram()
        self.handover = LogHistogram()
        self.fct: dict[int, LogHistogram] = {}
        self.wait: dict[int, LogHistogram] = {}
        self.degraded: Counter[str] = Counter()
        self.arrivals = 0
        self.arrived_bytes = 0
        self.finished = 0
        self.finished_bytes = 0
        self.cancelled = 0
        self._sample: deque[tuple[float, int]] = deque(maxlen=SAMPLE)

    def arrived(self, size_bytes: int, now: float) -> None:
        self.arrivals += 1
        self.arrived_bytes += size_bytes
        self.sizes.add(size_bytes)
        self._sample.append((now, size_bytes))

    def released(self, class_index: int, waited_s: float, degraded: str) -> None:
        self._of(self.wait, class_index).add(max(0.0, waited_s))
        if degraded:
            self.degraded[degraded] += 1

    def done(self, class_index: int, fct_s: float, sent_bytes: int) -> None:
        """A flow of the class has finished, fct_s after it arrived."""
        self.finished += 1
        self.finished_bytes += sent_bytes
        self._of(self.fct, class_index).add(max(0.0, fct_s))

    def handed_over(self, bubble_s: float) -> None:
        """Seconds from a flow's last byte to the first byte of the flow that waited for it."""
        self.handover.add(max(0.0, bubble_s))

    def forget_classes(self) -> None:
        self.fct.clear()
        self.wait.clear()

    def report(self, now: float) -> dict[str, Any]:
        """The measured part of the domain's report; the sample starts anew with each report."""
        sample = [[round(now - at, 6), size] for at, size in reversed(self._sample)]
        self._sample.clear()
        return {
            "histogram": self.sizes.to_plain(),
            "sample": sample,
            "arrivals": self.arrivals,
            "arrived_bytes": self.arrived_bytes,
            "finished": self.finished,
            "fct": {str(index): h.to_plain() for index, h in sorted(self.fct.items())},
            "wait": {str(index): h.to_plain() for index, h in sorted(self.wait.items())},
            "degraded": dict(self.degraded),
            "handover_s": self.handover.to_plain(),
        }

    def summary(self, index: int) -> dict[str, Any]:
        """FCT and wait of one class in figures for people."""
        return {"fct_s": quantiles(self.fct.get(index)), "wait_s": quantiles(self.wait.get(index))}

    def _of(self, table: dict[int, LogHistogram], index: int) -> LogHistogram:
        histogram = table.get(index)
        if histogram is None:
            assert index < MAX_CLASSES
            histogram = table[index] = LogHistogram()
        return histogram


def quantiles(histogram: LogHistogram | None) -> dict[str, float]:
    if histogram is None or not histogram.count:
        return {"count": 0}
    return {
        "count": histogram.count,
        "mean": histogram.mean,
        "p50": histogram.quantile(0.5),
        "p90": histogram.quantile(0.9),
        "p99": histogram.quantile(0.99),
        "p995": histogram.quantile(0.995),
        "max": histogram.max,
    }
