"""The controller's own metrics."""

from __future__ import annotations

from typing import Any

from intentd.daemons.kit.metrics import Metrics


class ControllerMetrics:
    """Declared once a process, on the kit's registry."""

    def __init__(self, metrics: Metrics) -> None:
        self.members = metrics.gauge(
            "controller_members", "Members in the link's table, by state.", ("state",)
        )
        self.leading = metrics.gauge(
            "controller_leading", "1 while this controller leads, 0 while it stands by."
        )
        self.issued = metrics.counter(
            "controller_policies_issued_total",
            "Policies issued, by application and author.",
            ("application", "author"),
        )
        self.refused = metrics.counter(
            "controller_policies_refused_total", "Policies a member refused.", ("application",)
        )
        self.bad_reports = metrics.counter(
            "controller_bad_reports_total", "Reports that did not validate."
        )
        self.changes = metrics.gauge(
            "controller_workload_changes",
            "Workload changes detected since start, by domain.",
            ("domain",),
        )
        self.classes = metrics.gauge(
            "controller_classes", "Classes of the policy in force, by domain.", ("domain",)
        )
        self.load = metrics.gauge(
            "controller_load_ratio", "Offered share of the link, by domain.", ("domain",)
        )
        self.held = metrics.gauge(
            "controller_policies_held", "1 while automatic policies are held.", ("application",)
        )
        self.known_jobs = metrics.gauge(
            "controller_known_jobs", "Jobs in the history, by scheduler.", ("scheduler",)
        )
        self.jobs_load = metrics.gauge(
            "controller_jobs_load_ratio", "Offered share of the GPUs, by scheduler.", ("scheduler",)
        )
        self.job_changes = metrics.gauge(
            "controller_job_workload_changes",
            "Changes of the job workload detected since start, by scheduler.",
            ("scheduler",),
        )
        self.searching = metrics.gauge("controller_pareto_searching", "1 while a search runs.")
        self.front_points = metrics.gauge(
            "controller_pareto_points", "Configurations on the present front."
        )

    def measure_jobs(self, told: dict[str, Any]) -> None:
        """told: JobsApplication.describe()."""
        self.searching.set(bool(told["search"]["searching"]))
        self.front_points.set(told["front"]["points"] if told["front"] else 0)
        for row in told["schedulers"]:
            self.known_jobs.labels(row["name"]).set(row["known_jobs"])
            self.jobs_load.labels(row["name"]).set(row["load"] or 0.0)
            self.job_changes.labels(row["name"]).set(row["changes"])
