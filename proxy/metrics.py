"""What the proxy counts, under labels whose values the operator chose, never a client."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
MAX_SERIES: Final = 2000  # more would be a mistake of ours: reloads leave old names behind


class _Buckets:
    """A histogram that costs one bisect an observation."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def rows(self) -> list[tuple[str, float]]:
        rows, seen = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            seen += count
            rows.append((bound, float(seen)))
        return rows


class ProxyMetrics(Collector):
    """Plain integers on the hot path; families are built when somebody scrapes.

    gauges: a callable for what is read at that moment, name -> value or model -> value.
    """

    def __init__(self, gauges: Callable[[], dict[str, Any]]) -> None:
        self._gauges = gauges
        self.requests: dict[tuple[str, str, str], int] = {}
        self.seconds: dict[tuple[str, str], _Buckets] = {}
        self.first_token: dict[tuple[str, str], _Buckets] = {}
        self.tokens: dict[tuple[str, str], int] = {}
        self.cost_nano: dict[str, int] = {}
        self.upstream: dict[tuple[str, str], int] = {}
        self.retries = 0
        self.refused: dict[str, int] = {}
        self.feedback: dict[tuple[str, str, str], int] = {}

    def finished(self, model: str, service_type: str, outcome: str, seconds: float) -> None:
        key = (model, service_type, outcome)
        if key not in self.requests and len(self.requests) >= MAX_SERIES:
            model, service_type = "other", "other"
            key = (model, service_type, outcome)
        self.requests[key] = self.requests.get(key, 0) + 1
        pair = (model, service_type)
        buckets = self.seconds.get(pair)
        if buckets is None:
            buckets = self.seconds[pair] = _Buckets()
        buckets.add(seconds)

    def first(self, model: str, service_type: str, seconds: float) -> None:
        buckets = self.first_token.get((model, service_type))
        if buckets is None:
            buckets = self.first_token[model, service_type] = _Buckets()
        buckets.add(seconds)

    def called(self, model: str, outcome: str) -> None:
        self.upstream[model, outcome] = self.upstream.get((model, outcome), 0) + 1

    def spent(self, model: str, in_tokens: int, out_tokens: int, cost_nano: int) -> None:
        tokens = self.tokens
        tokens[model, "in"] = tokens.get((model, "in"), 0) + in_tokens
        tokens[model, "out"] = tokens.get((model, "out"), 0) + out_tokens
        self.cost_nano[model] = self.cost_nano.get(model, 0) + cost_nano

    def refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        for name, text, table in (
            ("request_seconds", "Time from a request to the end of its answer.", self.seconds),
            ("first_token_seconds", "Time to a stream's first event.", self.first_token),
        ):
            family = HistogramMetricFamily(
                f"intentd_proxy_{name}", text, labels=("model", "service_type")
            )
            for pair, buckets in table.items():
                family.add_metric(pair, buckets.rows(), buckets.total)
            yield family
        for name, value in self._gauges().items():
            text = _GAUGES[name]
            if isinstance(value, dict):
                gauge = GaugeMetricFamily(f"intentd_proxy_{name}", text, labels=("model",))
                for model, number in value.items():
                    gauge.add_metric((model,), number)
            else:
                gauge = GaugeMetricFamily(f"intentd_proxy_{name}", text, value=value)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        for name, text, labels, table in (
            ("requests", "Requests, by how they ended.", ("model", "service_type", "outcome"),
             self.requests),
            ("tokens", "Tokens booked, by direction.", ("model", "direction"), self.tokens),
            ("upstream_calls", "Calls to providers, by outcome.", ("model", "outcome"),
             self.upstream),
            ("feedback", "Answers rated by users, or regenerated.",
             ("model", "service_type", "rating"), self.feedback),
        ):  # fmt: skip
            family = CounterMetricFamily(f"intentd_proxy_{name}", text, labels=labels)
            for values, count in table.items():
                family.add_metric(values, count)
            yield family
        cost = CounterMetricFamily(
            "intentd_proxy_cost_dollars", "Money booked, estimates included.", labels=("model",)
        )
        for model, nano in self.cost_nano.items():
            cost.add_metric((model,), nano / 1e9)
        yield cost
        refused = CounterMetricFamily(
            "intentd_proxy_refused", "Requests refused before any call.", labels=("reason",)
        )
        for reason, count in self.refused.items():
            refused.add_metric((reason,), count)
        yield refused
        yield CounterMetricFamily(
            "intentd_proxy_retries", "Calls made again after a failure.", value=self.retries
        )


_GAUGES: Final = {
    "active_requests": "Requests being worked on.",
    "open_reservations": "Budget reservations not settled yet.",
    "model_available": "1 while the model may be asked, 0 while it cools down.",
    "model_calls": "Calls to the model under way.",
    "dropped_records": "Entries of the request log lost while the disk was away.",
}
