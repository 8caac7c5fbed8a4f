"""The controller's own metrics."""

from __future__ import annotations

from intentd.daemons.kit.metrics import Metrics


class ControllerMetrics:
    """Declared once a process, on the kit's registry."""

    def __init__(self, metrics: Metrics) -> None:
        self.members = metrics.gauge(
            "controller_members", "Members in the link's table, by state.", ("state",)
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
