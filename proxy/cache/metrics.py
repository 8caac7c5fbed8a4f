"""What the cache counts. Labels are fixed words and the operator's service types."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from intentd.proxy.cache.cache import Cache

SECONDS: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0, 5.0)


class CacheMetrics(Collector):
    """Plain counts; families are built when somebody scrapes."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.lookups: dict[tuple[str, str], int] = {}
        self.avoided_nano = 0
        self.gone: dict[str, int] = {}
        self.failures: dict[str, int] = {}
        self.prefetches: dict[str, int] = {}
        self.feedback: dict[str, int] = {}
        self._searches = [0] * (len(SECONDS) + 1)
        self._searched_s = 0.0

    def looked_up(self, service_type: str, result: str, avoided_nano: int) -> None:
        key = (service_type, result)
        self.lookups[key] = self.lookups.get(key, 0) + 1
        self.avoided_nano += avoided_nano

    def searched(self, seconds: float) -> None:
        self._searches[bisect_left(SECONDS, seconds)] += 1
        self._searched_s += seconds

    def removed(self, reason: str, count: int) -> None:
        if count:
            self.gone[reason] = self.gone.get(reason, 0) + count

    def failed(self, part: str) -> None:
        self.failures[part] = self.failures.get(part, 0) + 1

    def prefetched(self, outcome: str) -> None:
        self.prefetches[outcome] = self.prefetches.get(outcome, 0) + 1

    def judged(self, verdict: str) -> None:
        self.feedback[verdict] = self.feedback.get(verdict, 0) + 1

    def collect(self) -> Iterator[Metric]:
        lookups = CounterMetricFamily(
            "intentd_proxy_cache_lookups", "Requests whose service type has a cache, by what it "
            "did.", labels=("service_type", "result"),
        )  # fmt: skip
        for key, count in self.lookups.items():
            lookups.add_metric(key, count)
        yield lookups
        yield CounterMetricFamily(
            "intentd_proxy_cache_avoided_dollars", "What served items cost when they were made.",
            value=self.avoided_nano / 1e9,
        )  # fmt: skip
        for name, text, label, table in (
            ("removed", "Items that went, by reason.", "reason", self.gone),
            ("failures", "Lookups and writes that failed, by part.", "part", self.failures),
            ("prefetches", "Prefetches, by how they ended.", "outcome", self.prefetches),
            ("feedback", "Marks on served items.", "verdict", self.feedback),
        ):
            family = CounterMetricFamily(f"intentd_proxy_cache_{name}", text, labels=(label,))
            for value, count in table.items():
                family.add_metric((value,), count)
            yield family
        rows, seen = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._searches, strict=True):
            seen += count
            rows.append((bound, float(seen)))
        search = HistogramMetricFamily(
            "intentd_proxy_cache_search_seconds", "Semantic lookups, embedding included."
        )
        search.add_metric((), rows, self._searched_s)
        yield search
        cache = self._cache
        vectors = cache.semantic.vectors if cache.semantic is not None else 0
        for name, text, number in (
            ("items", "Items stored.", len(cache.hot)),
            ("bytes", "What they count for against cache.max_bytes.", cache.hot.size_bytes),
            ("put_items", "Of the items, those put by applications.", cache.hot.put_count),
            ("vectors", "Keys in the vector index.", vectors),
        ):
            yield GaugeMetricFamily(f"intentd_proxy_cache_{name}", text, value=number)
