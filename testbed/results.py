"""What an experiment hands back, and its form on disk: ``results.json``, ``metrics.csv``, records.

Everything is plain data, so that a report is drawn again from the directory alone.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from intentd.core.errors import InputError
from intentd.testbed.metrics import METRICS, mean_interval
from intentd.testbed.traffic.congestion import congestion_in_use

RESULTS_FILE: Final = "results.json"
METRICS_FILE: Final = "metrics.csv"


@dataclass(slots=True)
class Run:
    """One policy on one trace.

    label: the policy or variant as the report names it. kernel, simulator: METRICS in seconds.
    wait: arrival to turn. handover: last byte of a flow to the first of the next in its class.
    gate: "agent" (the host's agent) or "local" (the same gate in the client's process).
    busy_share: of the bottleneck while some flow waited, None where it was not measured.
    steal_share: of the processors' time, taken by this virtual machine's host; repeats: earlier
    tries thrown away for that. floor_s: mean of small flows that met nobody. records: file beside
    results.json.
    """

    label: str
    workload: str
    load: float
    seed: int
    gate: str
    rate_bps: float
    flows: int
    finished: int
    stalled: int
    kernel: dict[str, float]
    simulator: dict[str, float] = field(default_factory=dict)
    wait: dict[str, float] = field(default_factory=dict)
    handover: dict[str, float] = field(default_factory=dict)
    degraded: dict[str, int] = field(default_factory=dict)
    offered_load: float = 0.0
    busy_share: float | None = None
    busy_observed_s: float = 0.0
    floor_s: float | None = None
    thresholds: list[float | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    restarted: int = 0
    arrival_lag_s: float = 0.0
    steal_share: float = 0.0
    repeats: int = 0
    client_cpu_s: float = 0.0
    records: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Check:
    """A figure held against its bar. sense: ">=" or "<="."""

    figure: str
    value: float
    sense: str
    bar: float

    @property
    def holds(self) -> bool:
        return self.value >= self.bar if self.sense == ">=" else self.value <= self.bar


@dataclass(slots=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass(slots=True)
class Series:
    """Lines over x; step: values hold until the next point (class counts)."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[list[float]]]
    step: bool = False
    note: str = ""


@dataclass(slots=True)
class Results:
    """One experiment. published: keys of ``testbed.published`` that stand beside it."""

    experiment: str
    title: str
    about: str
    options: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    def labels(self, workload: str, load: float | None = None) -> list[str]:
        """Labels run on a workload, in the order they were run."""
        return list(dict.fromkeys(run.label for run in self.select(workload, load)))

    def groups(self) -> list[tuple[str, float]]:
        """(workload, load) pairs, in the order they were run."""
        return list(dict.fromkeys((run.workload, run.load) for run in self.runs))

    def select(
        self, workload: str | None = None, load: float | None = None, label: str | None = None
    ) -> list[Run]:
        return [
            run
            for run in self.runs
            if workload in (None, run.workload)
            and load in (None, run.load)
            and label in (None, run.label)
        ]


def machine_facts() -> dict[str, Any]:
    """Where this was measured; load is that of the last minute before."""
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count() or 0,
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "congestion_control": congestion_in_use(),
        "default_congestion_control": control.read_text().strip() if control.exists() else "",
    }


def save(results: Results, directory: Path) -> None:
    """Write results.json and metrics.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(_clean(asdict(results)), indent=1, allow_nan=False)
    temporary = directory / f".{RESULTS_FILE}.new"
    temporary.write_text(plain)
    temporary.replace(directory / RESULTS_FILE)
    with (directory / METRICS_FILE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["workload", "load", "label", "seed", "gate", "source", *METRICS])
        for run in results.runs:
            for source, values in (("kernel", run.kernel), ("simulator", run.simulator)):
                if values:
                    cells = [f"{values[name]:.9f}" for name in METRICS]
                    writer.writerow(
                        [run.workload, run.load, run.label, run.seed, run.gate, source, *cells]
                    )


def keep(results: Results, run: Run, directory: Path) -> None:
    """Add a run and save: what was measured outlives whatever fails after it."""
    results.runs.append(run)
    save(results, directory)


def load(directory: Path) -> Results:
    """Inverse of save. Raises InputError if the directory holds no results."""
    path = directory / RESULTS_FILE
    try:
        plain = json.loads(path.read_text())
        parts: dict[str, Any] = {
            "runs": [Run(**row) for row in plain.pop("runs")],
            "checks": [
                Check(**(row | {"value": math.nan if row["value"] is None else row["value"]}))
                for row in plain.pop("checks")
            ],
            "tables": [Table(**row) for row in plain.pop("tables")],
            "series": [Series(**row) for row in plain.pop("series")],
        }
        return Results(**plain, **parts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("directory", str(directory), f"results of an experiment ({error})") from (
            error
        )


def over_seeds(runs: Sequence[Run], source: str = "kernel") -> dict[str, tuple[float, float]]:
    """metric -> (mean over the runs, half its 95 % interval)."""
    values: list[dict[str, float]] = [getattr(run, source) for run in runs]
    return {
        name: mean_interval([row[name] for row in values])
        for name in METRICS
        if values and all(name in row for row in values)
    }


def paired(
    results: Results, workload: str, load_share: float, label: str, base: str, source: str
) -> dict[str, tuple[float, float]]:
    """metric -> (mean, half interval) of label / base, seed by seed: the traces are the same."""
    bases = {run.seed: getattr(run, source) for run in results.select(workload, load_share, base)}
    rows: list[dict[str, float]] = []
    for run in results.select(workload, load_share, label):
        below, above = bases.get(run.seed), getattr(run, source)
        if below and above:
            rows.append({name: above[name] / below[name] for name in METRICS if below[name] > 0})
    return {
        name: mean_interval([row[name] for row in rows])
        for name in METRICS
        if rows and all(name in row for row in rows)
    }


def kernel_over_simulator(runs: Iterable[Run]) -> dict[str, tuple[float, float]]:
    """metric -> (mean, half interval) of kernel / simulator, run by run on the same trace."""
    rows = [
        {name: run.kernel[name] / run.simulator[name] for name in METRICS}
        for run in runs
        if run.simulator and run.kernel
    ]
    return {name: mean_interval([row[name] for row in rows]) for name in METRICS if rows}


def _clean(value: Any) -> Any:
    """JSON has no nan and no infinity: both become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner) for inner in value]
    return value
