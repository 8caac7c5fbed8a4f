"""The agent's metrics: read from the shell when scraped, so a flow costs nothing here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from intentd.agent.shell import GateShell

_COUNTERS: Final = {
    "flows_opened": "Flows that applications opened, also those outside all domains.",
    "app_errors": "Packets of applications that were answered with an ERROR.",
    "marks": "Sockets marked with a class.",
    "mark_failures": "Sockets that could not be marked.",
    "flows_without_domain": "Flows that no domain applies to; they start at once.",
    "flows_died_holding": "Flows whose application died or left while sending.",
    "early_announcements": "Announcements of an end with more left than the policy lets pass on.",
}
TC_STATES: Final = ("unshaped", "shaped", "foreign", "failed")


class AgentCollector(Collector):
    """tc_states: domain -> state of its shaper."""

    def __init__(self, shell: GateShell, tc_states: Callable[[], dict[str, str]]) -> None:
        self._shell = shell
        self._tc_states = tc_states

    def describe(self) -> Iterable[Metric]:
        return []  # names are checked when scraped, not by collecting at registration

    def collect(self) -> Iterable[Metric]:
        shell = self._shell
        counts = shell.counts
        values = {
            "flows_opened": counts.opened,
            "app_errors": counts.errors,
            "marks": counts.marks,
            "mark_failures": counts.mark_failures,
            "flows_without_domain": counts.no_domain,
            "flows_died_holding": counts.died_holding,
            "early_announcements": counts.early_announcements,
        }
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"intentd_agent_{name}", text, value=values[name])
        yield GaugeMetricFamily(
            "intentd_agent_applications", "Applications connected.", value=shell.connections()
        )
        yield from self._domains()
        yield self._tc()

    def _domains(self) -> Iterable[Metric]:
        arrivals = CounterMetricFamily(
            "intentd_agent_arrivals", "Flows that arrived at a domain's gate.", labels=["domain"]
        )
        arrived = CounterMetricFamily(
            "intentd_agent_arrived_bytes", "Bytes those flows announced.", labels=["domain"]
        )
        finished = CounterMetricFamily(
            "intentd_agent_finished", "Flows that finished.", labels=["domain"]
        )
        degraded = CounterMetricFamily(
            "intentd_agent_degraded_starts",
            "Flows that started outside the guaranteed order, by reason.",
            labels=["domain", "reason"],
        )
        handed_over = CounterMetricFamily(
            "intentd_agent_handed_over",
            "Flows that started in order while the last bytes of one before them left.",
            labels=["domain"],
        )
        demoted = CounterMetricFamily(
            "intentd_agent_demoted",
            "Flows that started in order and whose mark was withdrawn.",
            labels=["domain"],
        )
        labels = ["domain", "class"]
        waiting = GaugeMetricFamily("intentd_agent_waiting_flows", "Flows waiting.", labels=labels)
        active = GaugeMetricFamily("intentd_agent_active_flows", "Flows sending.", labels=labels)
        fct = SummaryMetricFamily(
            "intentd_agent_fct_seconds", "Completion time of flows.", labels=labels
        )
        wait = SummaryMetricFamily(
            "intentd_agent_wait_seconds", "Time flows waited for their turn.", labels=labels
        )
        handover = SummaryMetricFamily(
            "intentd_agent_handover_seconds",
            "From a flow's last byte to the first byte of the flow that waited for it.",
            labels=["domain"],
        )
        for name, domain in self._shell.domains.items():
            meter = domain.meter
            arrivals.add_metric([name], meter.arrivals)
            arrived.add_metric([name], meter.arrived_bytes)
            finished.add_metric([name], meter.finished)
            handed_over.add_metric([name], domain.gate.handed_over)
            demoted.add_metric([name], domain.gate.demoted)
            for reason, count in meter.degraded.items():
                degraded.add_metric([name, reason], count)
            for index, (queued, sending) in enumerate(
                zip(domain.gate.queue_lengths(), domain.gate.active(), strict=True)
            ):
                waiting.add_metric([name, str(index)], queued)
                active.add_metric([name, str(index)], sending)
            for family, table in ((fct, meter.fct), (wait, meter.wait)):
                for index, histogram in table.items():
                    family.add_metric([name, str(index)], histogram.count, histogram.sum)
            handover.add_metric([name], meter.handover.count, meter.handover.sum)
        yield from (arrivals, arrived, finished, degraded, handed_over, demoted)
        yield from (waiting, active, fct, wait, handover)

    def _tc(self) -> Metric:
        states = GaugeMetricFamily(
            "intentd_agent_tc_state",
            "1 for the state a domain's device is in.",
            labels=["domain", "state"],
        )
        for name, state in self._tc_states().items():
            for known in TC_STATES:
                states.add_metric([name, known], float(state == known))
        return states
