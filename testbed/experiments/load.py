"""2D, PS and FIFO as the load grows (dissertation, section 2.6.3, figure 2.10)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from intentd.testbed.experiments.options import Options
from intentd.testbed.experiments.overall import one_trace
from intentd.testbed.lab import Lab
from intentd.testbed.playing import Progress
from intentd.testbed.policies import scaled_workload
from intentd.testbed.results import Results, Series, machine_facts, over_seeds

WORKLOADS: Final = ("data-mining",)
POLICIES: Final = ("2d", "ps", "fifo")
LOADS: Final = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DURATION_S: Final = 35.0
SEEDS: Final = 3
SHOWN: Final = ("p50", "p99")


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    """Every run lasts as long as at 80 % load, so low loads have fewer flows."""
    results = Results(
        "load",
        "2D, PS and FIFO from low to high load",
        "The load is the share of the bottleneck's payload that arrives. At low load nothing "
        "waits and the policies agree; what differs then is what asking for a turn costs.",
        machine=machine_facts(),
        published=["load"],
    )
    workloads = options.workloads or WORKLOADS
    policies = options.policies or POLICIES
    loads = options.loads or LOADS
    seeds = options.seed_range(SEEDS)
    duration_s = options.duration_s or DURATION_S
    results.options = options.to_plain() | {
        "workloads": workloads,
        "policies": policies,
        "loads": loads,
        "seeds": list(seeds),
        "duration_s": duration_s,
    }
    results.notes += options.notes()
    async with Lab(options.setup(), directory, progress) as lab:
        for name in workloads:
            source = scaled_workload(name, options.scale)
            for load in loads:
                for seed in seeds:
                    await one_trace(lab, results, source, policies, load, duration_s, seed, options)
    results.series = [
        line
        for name in dict.fromkeys(run.workload for run in results.runs)
        for line in _series(results, name)
    ]
    return results


def _series(results: Results, workload: str) -> list[Series]:
    loads = list(dict.fromkeys(run.load for run in results.select(workload)))
    found = []
    for metric in SHOWN:
        lines: dict[str, list[list[float]]] = {}
        for label in results.labels(workload):
            for load in loads:
                row = over_seeds(results.select(workload, load, label))
                if metric in row:
                    lines.setdefault(label, []).append([100 * load, 1e3 * row[metric][0]])
        found.append(Series(f"{workload}: {metric} by load", "load, %", f"{metric} FCT, ms", lines))
    return found
