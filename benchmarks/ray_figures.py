"""What became of the testbed's runs, in figures: finishes, costs, idle capacity, predictions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intentd.core.jobs.allocator import JobTable, job_table
from intentd.core.jobs.policy import Costs, JobsPolicy
from intentd.core.sim.jobs import Options, Result, simulate

Array = NDArray[np.float64]
BARS = {"median": 3.0, "p99": 15.0, "effect_ms": 20.0, "idle": 1.0}
# what the chapter's text says of its testbed (section 3.5.2, figures 3.4-3.6)
PUBLISHED = {
    "pcs-jct": "error within 20 % (average, p90); p90 JCT within 1.1 x AFS; unfairness <= 100 %",
    "pcs-pred": "worst error 150 %",
    "afs": "error >= 40 % average, >= 100 % p90; worst unfairness > 200 %",
    "srsf": "error >= 40 % average, >= 100 % p90 (Tiresias)",
    "themis": "worst unfairness < 50 %",
}
HOLDING = ("starting", "running", "checkpointing")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run. The lists are per job in order of arrival; noted: what each job wrote."""

    name: str
    seed: int
    policy: JobsPolicy
    jobs: JobTable
    submitted_s: list[float]
    ended_s: list[float]
    predicted_s: list[float]
    lost: int
    events: list[dict[str, Any]]
    noted: dict[int, list[tuple[str, int, float, float, int]]]
    effect_s: dict[str, Any]


def costs_of(record: RunRecord) -> Costs:
    """Measured: decision to first step; last step of a run to first step of the one that
    followed at once (a resize)."""
    decided: dict[tuple[int, int], float] = {}
    again: set[tuple[int, int]] = set()
    stopped: dict[int, float] = {}
    for event in record.events:
        key = (event["job"], event["epoch"])
        if event["state"] == "starting":
            decided[key] = event["at_s"]
            if event["at_s"] - stopped.get(event["job"], -1e9) < 0.5:
                again.add(key)
        elif event["state"] == "pending":
            stopped[event["job"]] = event["at_s"]
    starts, resizes = [], []
    for job, lines in record.noted.items():
        before = 0.0
        for kind, epoch, at_s, _, _ in lines:
            if kind == "start":
                starts.append(at_s - decided[(job, epoch)])
                if before and (job, epoch) in again:
                    resizes.append(at_s - before)
            elif kind == "stop":
                before = at_s
    start = float(np.median(starts))
    resize = float(np.median(resizes)) if resizes else start
    return Costs(start_s=start, resize_s=resize, preempt_s=max(0.0, resize - start))


def simulated(record: RunRecord, costs: Costs) -> Result:
    """The same arrivals, at the moments they really came."""
    jobs = record.jobs
    submit = np.array(record.submitted_s)
    table = job_table(
        submit - submit[0], jobs.work_gpu_s, jobs.largest, jobs.table, jobs.speeds, smallest=1.0
    )
    return simulate(table, record.policy, float(16), Options(costs=costs))


def idle_percent(record: RunRecord, gpus: int) -> tuple[float, float]:
    """Capacity that no run held while a job could have used it, in percent of GPU time: all of
    it, and without the moments in which a decision was being carried out (a run starting or
    saving), in which freed GPUs wait for those that are to share them."""
    changes: list[tuple[float, int, int, int, int]] = []  # time, job, usable, held, moving
    states: dict[int, tuple[int, int, int]] = {}
    most = dict(zip(record.noted, record.jobs.largest.tolist(), strict=True))
    for event in record.events:
        job, state = event["job"], event["state"]
        usable = 0 if state in ("finished", "failed", "cancelled") else most[job]
        held = states.get(job, (0, 0, 0))[1]
        if state == "starting":
            held = sum(int(part.rpartition(":")[2]) for part in event["text"][3:].split(", "))
        elif state not in HOLDING:
            held = 0
        states[job] = (usable, held, int(state in ("starting", "checkpointing")))
        changes.append((event["at_s"], job, *states[job]))
    now: dict[int, tuple[int, int, int]] = {}
    whole = beyond = 0.0
    for change, after in pairwise(changes):
        now[change[1]] = change[2:]
        length = after[0] - change[0]
        usable, held, moving = (sum(row[at] for row in now.values()) for at in range(3))
        idle = max(0, min(gpus, usable) - held) * length
        whole += idle
        beyond += 0.0 if moving else idle
    span = gpus * (changes[-1][0] - changes[0][0])
    return 100 * whole / span, 100 * beyond / span


def spread(values: Array) -> dict[str, float]:
    return {
        "avg": round(float(values.mean()), 2),
        "p50": round(float(np.percentile(values, 50)), 2),
        "p90": round(float(np.percentile(values, 90)), 2),
        "p99": round(float(np.percentile(values, 99)), 2),
        "max": round(float(values.max()), 2),
    }


class Figures:
    """Pools runs."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.rows: list[dict[str, Any]] = []
        self._finish: list[Array] = []
        self._by_policy: dict[str, list[dict[str, Array]]] = {}

    def add(self, record: RunRecord) -> dict[str, Any]:
        """The run's own figures."""
        costs = costs_of(record)
        ours = simulated(record, costs)
        submit, end = np.array(record.submitted_s), np.array(record.ended_s)
        jct = end - submit
        error = 100 * np.abs(jct - ours.measured.jct_s) / ours.measured.jct_s
        predicted = np.array(record.predicted_s) - submit
        whole, beyond = idle_percent(record, self.gpus)
        held = {
            "jct": jct,
            "error": 100 * np.abs(jct - predicted) / predicted,
            "unfairness": 100 * np.maximum(0.0, jct / ours.outcome.fair_s - 1),
            "simulated": np.abs(ours.measured.error_percent),
        }
        self._finish.append(error)
        self._by_policy.setdefault(record.name, []).append(held)
        self.rows.append(
            {
                "policy": record.name,
                "seed": record.seed,
                "jobs": len(jct),
                "makespan_s": round(float(end.max() - submit[0]), 1),
                "shortest_jct_s": round(float(jct.min()), 1),
                "runs": sum(row[0] == "start" for lines in record.noted.values() for row in lines),
                "lost": record.lost,
                "costs_s": {
                    "start": round(costs.start_s, 4),
                    "resize": round(costs.resize_s, 4),
                },
                "finish_error_percent": spread(error),
                "effect_s": record.effect_s,
                "idle_percent": {"all": round(whole, 3), "beyond_decisions": round(beyond, 3)},
            }
        )
        return self.rows[-1]

    def result(self, full: float) -> dict[str, Any]:
        """full: NaN if this was not the measurement the bars are for."""
        finish = spread(np.concatenate(self._finish))
        effects = [row["effect_s"]["start"]["p50"] for row in self.rows]
        idle = [row["idle_percent"]["beyond_decisions"] for row in self.rows]
        holds = {
            "finish median <= 3 %": finish["p50"] <= BARS["median"],
            "finish p99 <= 15 %": finish["p99"] <= BARS["p99"],
            "decision to effect p50 <= 20 ms": max(effects) <= BARS["effect_ms"] / 1000,
            "idle < 1 %": max(idle) < BARS["idle"],
        }
        policies = {}
        for name, parts in self._by_policy.items():
            pooled = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            policies[name] = {
                "jct_s": spread(pooled["jct"]),
                "pred_err_percent": spread(pooled["error"]),
                "pred_err_percent_simulated": spread(pooled["simulated"]),
                "unfairness_percent": spread(pooled["unfairness"]),
                "published": PUBLISHED.get(name, ""),
            }
        return {
            "runs": self.rows,
            "pooled": {
                "jobs": int(sum(len(part) for part in self._finish)),
                "finish_error_percent": finish,
                "decision_to_effect_p50_ms": round(1000 * float(np.median(effects)), 2),
                "idle_percent": round(float(np.mean(idle)), 3),
            },
            "policies": policies,
            "bars": holds,
            "holds": all(holds.values()) or full != full,
        }
