"""The chapter's figures as numbers, to stand beside ours (dissertation, chapter 2).

Only what its text states: the bars and curves of its figures carry no numbers. Its testbed: 21
Emulab nodes (18 clients, one server) with 10 Gb/s interfaces, unscaled sizes, average of five runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number. value is a factor over 2D unless unit says otherwise."""

    claim: str
    value: float
    unit: str
    source: str


PUBLISHED: Final[dict[str, tuple[Figure, ...]]] = {
    "overall": (
        Figure(
            "p99.5 of 2D over the better of PS and FIFO, worst workload",
            1.09,
            "at most",
            "section 2.6.2",
        ),
        Figure(
            "gain over the better of PS and FIFO at p90, best case", 2.6, "up to", "section 2.6.2"
        ),
        Figure("gain at the mean, best case", 1.7, "up to", "section 2.6.2"),
        Figure("gain at the median, best case", 12.0, "up to", "section 2.6.2"),
        Figure("Aalo over 2D, cache, mean", 3.6, "factor", "section 2.6.2, figure 2.6"),
        Figure("Aalo over 2D, cache, p90", 10.3, "factor", "section 2.6.2, figure 2.6"),
        Figure("Aalo over 2D, cache, p99", 2.7, "factor", "section 2.6.2, figure 2.6"),
        Figure("Aalo over PS, cache, p95", 2.17, "factor", "section 2.6.2, figure 2.8"),
        Figure(
            "Baraat over 2D, data mining, p90 and p99.9", 1.5, "up to", "section 2.6.2, figure 2.7c"
        ),
        Figure("Baraat over 2D, low-variance workloads, p90", 2.3, "factor", "section 2.6.2"),
        Figure("PIAS over 2D, data mining, p90", 1.6, "factor", "section 2.6.2"),
        Figure("PIAS over 2D, web search, p90", 1.8, "factor", "section 2.6.2"),
    ),
    "cluster_reuse": (
        Figure(
            "static thresholds over learned ones, p90", 3.33, "factor", "section 2.6.3, figure 2.9b"
        ),
        Figure(
            "aggregate thresholds over learned ones, p90",
            2.72,
            "factor",
            "section 2.6.3, figure 2.9b",
        ),
        Figure("flows that suffice to learn a distribution", 3000.0, "flows", "section 2.3.4"),
        Figure("workload changes", 2.0, "at 170 s and 350 s", "section 2.6.3"),
    ),
    "mixed": (
        Figure(
            "nodes with the cache workload, and as many with data mining",
            9.0,
            "nodes",
            "section 2.6.3, figure 2.9c",
        ),
    ),
    "load": (
        Figure(
            "2D better than PS at median and p99 at every load",
            1.0,
            "above",
            "section 2.6.3, figure 2.10 (but for the median at low load)",
        ),
    ),
}
