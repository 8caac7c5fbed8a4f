"""The workload changes twice while the controller learns (dissertation, section 2.6.3, figures 2.9a
and 2.9b)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, Lab, Scenario
from intentd.testbed.metrics import METRICS, completion_metrics
from intentd.testbed.playing import Progress
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.results import Check, Results, Series, Table, keep, machine_facts
from intentd.testbed.traffic.records import read_records
from intentd.testbed.traffic.trace import TraceFlow, Workload, poisson

WORKLOADS: Final = ("data-mining", "web-search", "cache")
LOAD: Final = 0.8
DURATION_S: Final = 180.0  # of all three together; a third holds about 6,000 flows
SEEDS: Final = 3
DYNAMIC, AGGREGATE = "dynamic", "aggregate"
DETECTED_WITHIN: Final = 500
RIGHT_WITHIN: Final = 3000
_LOOK_S: Final = 0.25


def sequence(
    sources: Sequence[Workload], *, load: float, rate_bps: float, duration_s: float, seed: int
) -> list[TraceFlow]:
    """One workload after the other, each for an equal time."""
    part_s = duration_s / len(sources)
    return [
        flow
        for index, source in enumerate(sources)
        for flow in poisson(
            source,
            load=load,
            rate_bps=rate_bps,
            duration_s=part_s,
            seed=seed,
            start_s=index * part_s,
        )
    ]


class Watch:
    """Notes, while a run goes on, which classes the agent runs and what the controller noticed."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.seen: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Until cancelled."""
        suite = self._lab.suite
        assert suite is not None
        agent = suite.member("agent", self._lab.clients[0])
        while True:
            state = await suite.domain_state(agent)
            learned = await suite.learned()
            if state is not None:
                self.seen.append(
                    {
                        "clock": time.monotonic(),
                        "classes": len(state["classes"]),
                        "number": state["policy"]["number"],
                        "changes": learned.get("changes", 0),
                    }
                )
            await asyncio.sleep(_LOOK_S)


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    """*dynamic*: the live controller; *static*: classes of the first workload; *aggregate*: classes
    of all of them together."""
    names = options.workloads or WORKLOADS
    load = options.loads[0] if options.loads else LOAD
    duration_s = options.duration_s or DURATION_S
    seeds = options.seed_range(SEEDS)
    sources = [scaled_workload(name, options.scale) for name in names]
    static = f"static ({sources[0].name})"
    results = Results(
        "cluster_reuse",
        f"Cluster reuse: {', then '.join(source.name for source in sources)}",
        "The workload changes while the flows go on. 'dynamic': the controller starts with one "
        "class and learns from the agents' reports. 'static': classes of the first workload, "
        "computed before. 'aggregate': classes of all workloads together, computed before.",
        options=options.to_plain()
        | {"workloads": names, "load": load, "duration_s": duration_s, "seeds": list(seeds)},
        machine=machine_facts(),
        notes=options.notes(),
        published=["cluster_reuse"],
    )
    truth = [
        len(policy_for("2d", [source], domain=DOMAIN, rate_bps=options.rate_bps, load=load).classes)
        for source in sources
    ]
    for seed in seeds:
        trace = sequence(
            sources, load=load, rate_bps=options.rate_bps, duration_s=duration_s, seed=seed
        )
        await _dynamic(options, directory, progress, results, sources, trace, truth, load, seed)
        async with Lab(options.setup(), directory, progress) as lab:
            for label, learned_from in ((static, sources[:1]), (AGGREGATE, sources)):
                policy = policy_for(
                    "2d", learned_from, domain=DOMAIN, rate_bps=options.rate_bps, load=load
                )
                run = await lab.run(
                    Scenario(label, "sequence", load, seed, trace, policy, simulate=False)
                )
                keep(results, run, directory)
    results.tables.append(_per_part(results, directory, sources, duration_s))
    return results


async def _dynamic(
    options: Options,
    directory: Path,
    progress: Progress,
    results: Results,
    sources: Sequence[Workload],
    trace: Sequence[TraceFlow],
    truth: Sequence[int],
    load: float,
    seed: int,
) -> None:
    """One run with the live controller; every run starts with one that knows nothing."""
    async with Lab(replace(options.setup(), learning=True), directory, progress) as lab:
        watch = Watch(lab)
        watching = asyncio.create_task(watch.run(), name="watch")
        try:
            run = await lab.run(
                Scenario(DYNAMIC, "sequence", load, seed, trace, None, simulate=False)
            )
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        assert lab.played is not None
        start = lab.played.start_s
    keep(results, run, directory)
    seen = [row | {"at_s": row["clock"] - start} for row in watch.seen]
    part_s = trace[-1].arrival_s / len(sources)
    _judge(results, sources, trace, truth, seen, part_s, seed)
    count = [[row["at_s"], row["classes"]] for row in seen]
    true = [[index * part_s, classes] for index, classes in enumerate(truth)]
    results.series.append(
        Series(
            f"Classes over time, seed {seed}",
            "time, s",
            "classes",
            {"controller": count, "true value": [*true, [trace[-1].arrival_s, truth[-1]]]},
            step=True,
        )
    )


def _judge(
    results: Results,
    sources: Sequence[Workload],
    trace: Sequence[TraceFlow],
    truth: Sequence[int],
    seen: Sequence[dict[str, Any]],
    part_s: float,
    seed: int,
) -> None:
    """After how many flows of a part the change was noticed and the class count was right."""
    arrivals = [flow.arrival_s for flow in trace]
    rows = []
    for index, source in enumerate(sources):
        begin, end = index * part_s, (index + 1) * part_s
        first = bisect_right(arrivals, begin)
        before = [row["changes"] for row in seen if row["at_s"] <= begin]
        noticed = right = None
        for row in seen:
            if not begin < row["at_s"] <= end:
                continue
            flows = bisect_right(arrivals, row["at_s"]) - first
            if noticed is None and row["changes"] > (before[-1] if before else 0):
                noticed = flows
            if row["classes"] != truth[index]:
                right = None
            elif right is None:
                right = flows
        rows.append([source.name, truth[index], noticed, right])
        if index > 0:
            results.checks.append(
                Check(
                    f"seed {seed}: flows until the change to {source.name} was noticed",
                    float("nan") if noticed is None else noticed,
                    "<=",
                    DETECTED_WITHIN,
                )
            )
        results.checks.append(
            Check(
                f"seed {seed}: flows until the class count of {source.name} stayed right",
                float("nan") if right is None else right,
                "<=",
                RIGHT_WITHIN,
            )
        )
    results.checks.append(
        Check(f"seed {seed}: flows lost or stalled", results.runs[-1].stalled, "<=", 0)
    )
    results.tables.append(
        Table(
            f"What the controller learned, seed {seed}",
            ["workload", "classes (true)", "flows until noticed", "flows until the count is right"],
            rows,
            "Counted in flows of the part; the state is looked at four times a second.",
        )
    )


def _per_part(
    results: Results, directory: Path, sources: Sequence[Workload], duration_s: float
) -> Table:
    """Completion times of each workload's part of the run, all seeds together."""
    part_s = duration_s / len(sources)
    rows: list[list[Any]] = []
    for index, source in enumerate(sources):
        for label in results.labels("sequence"):
            found = completion_metrics(
                record.fct_s
                for run in results.select(label=label)
                for record in read_records(directory / run.records)
                if index * part_s <= record.due_s < (index + 1) * part_s
            )
            rows.append([f"{source.name}, {label}", *(1e3 * found.get(m, 0.0) for m in METRICS)])
    return Table("Flow completion time by workload, ms", ["", *METRICS], rows)
