"""The scheduler's metrics: read when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """status: the daemon's ``detail``."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        return []  # names are checked when scraped, not by collecting at registration

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        if not status:
            return
        jobs = GaugeMetricFamily("intentd_jobs", "Unfinished jobs, by state.", labels=["state"])
        for state, count in status["jobs"].items():
            jobs.add_metric([state], count)
        yield jobs
        over = CounterMetricFamily(
            "intentd_job_events", "Submissions, starts and ends since the start.", labels=["kind"]
        )
        for kind, count in status["counts"].items():
            over.add_metric([kind], count)
        yield over
        gpus = GaugeMetricFamily("intentd_gpus", "GPUs, by what they do.", labels=["use"])
        for use, count in status["gpus"].items():
            gpus.add_metric([use], count)
        yield gpus
        kept = GaugeMetricFamily(
            "intentd_prediction_kept_percent",
            "Share of jobs that ended within their P90, by size class.",
            labels=["size_class"],
        )
        for index, row in enumerate(status["coverage"]):
            if row["results"]:
                kept.add_metric([str(index)], row["kept_percent"])
        yield kept
        yield GaugeMetricFamily(
            "intentd_job_decide_seconds", "Time of the last decision.", value=status["decide_s"]
        )
        yield GaugeMetricFamily(
            "intentd_job_predict_seconds",
            "Time of the predictions of the last submission.",
            value=status["predict_s"],
        )
        yield CounterMetricFamily(
            "intentd_job_stale_events",
            "Events of runs that are not the present ones.",
            value=status["stale_events"],
        )
