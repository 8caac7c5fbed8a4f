"""The metrics registry of one daemon, and the metrics every daemon has.

Names are prefixed ``intentd_`` and end in a unit (``_seconds``, ``_bytes``, ``_total``). Each
daemon declares its own in one module with a help sentence; tests make a fresh registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry

LAG_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Declares and renders metrics of one registry; a name may be declared once."""

    content_type: Final = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.loop_lag = self.histogram(
            "loop_lag_seconds", "How late the event loop ran its timer.", buckets=LAG_BUCKETS_S
        )
        self.reloads = self.counter(
            "reloads_total", "Configuration reloads, by outcome.", ("outcome",)
        )
        self.generation = self.gauge(
            "config_generation", "Number of the configuration this daemon runs."
        )
        self.errors = self.counter(
            "errors_total", "Errors that were handled and logged, by place.", ("place",)
        )
        self.link_messages = self.counter(
            "link_messages_total", "Control messages, by direction and type.", ("direction", "type")
        )
        self.link_dropped = self.counter(
            "link_dropped_total", "Control messages dropped, by reason.", ("reason",)
        )
        self.link_connected = self.gauge(
            "link_connected", "1 while the controller answers this member."
        )
        self.link_policy = self.gauge(
            "policy_number", "Number of the policy this member runs.", ("application",)
        )
        self.admin_requests = self.counter(
            "admin_requests_total", "Requests on the admin socket, by outcome.", ("outcome",)
        )
        self.ready = self.gauge("ready", "1 while the daemon is ready.")

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"intentd_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"intentd_{name}", text, labels, registry=self.registry)

    def histogram(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = LAG_BUCKETS_S,
    ) -> Histogram:
        return Histogram(
            f"intentd_{name}", text, labels, registry=self.registry, buckets=tuple(buckets)
        )

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
