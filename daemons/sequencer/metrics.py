"""The sequencer's metrics: read from the core when scraped, so a request costs nothing here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class SequencerCollector(Collector):
    """status: the daemon's ``detail``."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        return []  # names are checked when scraped, not by collecting at registration

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        yield CounterMetricFamily(
            "intentd_turn_requests", "Ticket requests answered.", value=status["requests"]
        )
        yield CounterMetricFamily("intentd_turn_ids", "Ids given out.", value=status["ids"])
        yield GaugeMetricFamily("intentd_turn_epoch", "Epoch served.", value=status["epoch"])
        yield GaugeMetricFamily(
            "intentd_turn_recovering",
            "1 while holdings of the last epoch are collected.",
            value=status["recovering"],
        )
        messages = CounterMetricFamily(
            "intentd_turn_messages", "Messages and events of the turn protocol.", labels=["kind"]
        )
        for kind, count in status["counts"].items():
            messages.add_metric([kind], count)
        yield messages
        dropped = CounterMetricFamily(
            "intentd_fin_dropped", "FIN datagrams dropped, by reason.", labels=["reason"]
        )
        for reason, count in status["fin"]["dropped"].items():
            dropped.add_metric([reason], count)
        yield dropped
        members = GaugeMetricFamily(
            "intentd_turn_members", "Members registered, by domain.", labels=["domain"]
        )
        outstanding = GaugeMetricFamily(
            "intentd_turn_outstanding_ids",
            "Ids given out and not over.",
            labels=["domain", "class"],
        )
        for name, domain in status["domains"].items():
            members.add_metric([name], len(domain["members"]))
            for index, line in domain["classes"].items():
                outstanding.add_metric([name, index], line["outstanding"])
        yield members
        yield outstanding
