"""Each workload under each policy (dissertation, section 2.6.2, figures 2.5 to 2.8)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Final

from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, Lab, Scenario
from intentd.testbed.playing import Progress
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.results import (
    Check,
    Results,
    Run,
    keep,
    machine_facts,
    paired,
)
from intentd.testbed.traffic.trace import Workload, poisson

WORKLOADS: Final = ("data-mining", "web-search", "cache", "uniform")
POLICIES: Final = ("2d", "2d-boost", "htb", "ps", "fifo", "np-sjf", "baraat", "aalo", "pias")
LOAD: Final = 0.8
DURATION_S: Final = 35.0  # at 1 Gb/s and 80 % load: 3,000 flows of every workload
SEEDS: Final = 5

# Kernel against simulator on the same trace, as fractions.
TWO_D_WITHIN: Final = 0.10
TWO_D_METRICS: Final = ("mean", "p90", "p95", "p99", "p995")
PS_AT_LEAST: Final = {"mean": 0.9, "p90": 0.9, "p95": 0.9, "p99": 0.8, "p995": 0.8}
BUSY_AT_LEAST: Final = 0.97
FLOOR_AT_MOST_S: Final = 0.5e-3


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    results = Results(
        "overall",
        "Every workload under every policy",
        "Request-response flows over TCP (cubic) through one bottleneck, Poisson arrivals; sizes "
        "drawn from the workload, scaled so that a run holds thousands of flows. Policies other "
        "than 2D run through the same gate, marks and classes with other parameters. 2D's classes "
        "come from Algorithm 1 on a sample of 10,000 flows that are not those of the run.",
        machine=machine_facts(),
        published=["overall"],
    )
    load = options.loads[0] if options.loads else LOAD
    seeds = options.seed_range(SEEDS)
    workloads = options.workloads or WORKLOADS
    policies = options.policies or POLICIES
    duration_s = options.duration_s or DURATION_S
    results.options = options.to_plain() | {
        "workloads": workloads,
        "policies": policies,
        "load": load,
        "duration_s": duration_s,
        "seeds": list(seeds),
    }
    results.notes += options.notes()
    async with Lab(options.setup(), directory, progress) as lab:
        for name in workloads:
            source = scaled_workload(name, options.scale)
            for seed in seeds:
                await one_trace(lab, results, source, policies, load, duration_s, seed, options)
    if options.namespaces:
        results.checks = checks(results)
    return results


async def one_trace(
    lab: Lab,
    results: Results,
    source: Workload,
    policies: tuple[str, ...],
    load: float,
    duration_s: float,
    seed: int,
    options: Options,
) -> None:
    """All policies on the same arrivals."""
    rate_bps = lab.setup.rate_bps
    trace = poisson(source, load=load, rate_bps=rate_bps, duration_s=duration_s, seed=seed)
    for name in policies:
        policy = policy_for(name, [source], domain=DOMAIN, rate_bps=rate_bps, load=load)
        if options.early_fin_bytes is not None:
            policy = replace(policy, early_fin_bytes=options.early_fin_bytes)
        run = await lab.run(Scenario(name, source.name, load, seed, trace, policy))
        keep(results, run, lab.directory)


def checks(results: Results) -> list[Check]:
    """The figures an overall run is held to, per workload, means over its seeds."""
    found: list[Check] = []
    for workload, load in results.groups():
        two_d = results.select(workload, load, "2d")
        if two_d:
            simulated = [run for run in two_d if run.simulator]
            if simulated:
                found += [
                    Check(
                        f"{workload}: 2D kernel against simulator at {name}, floor taken off",
                        abs(math.fsum(deviation(run, name) for run in simulated) / len(simulated)),
                        "<=",
                        TWO_D_WITHIN,
                    )
                    for name in TWO_D_METRICS
                ]
            found += _link_checks(workload, two_d)
        kernel = paired(results, workload, load, "ps", "2d", "kernel")
        simulator = paired(results, workload, load, "ps", "2d", "simulator")
        for name, bar in PS_AT_LEAST.items():
            if name in kernel and name in simulator:
                found.append(
                    Check(
                        f"{workload}: PS/2D at {name}, kernel over simulator",
                        kernel[name][0] / simulator[name][0],
                        ">=",
                        bar,
                    )
                )
        stalled = sum(run.stalled for run in results.select(workload, load))
        found.append(Check(f"{workload}: flows that never finished", stalled, "<=", 0))
    return found


def deviation(run: Run, metric: str) -> float:
    """Relative difference of kernel and simulator beyond the floor.

    A flow of a few hundred bytes takes microseconds in the simulator, and the path's own time on
    the kernel: the measured floor, as far as it is allowed, is no deviation.
    """
    kernel, simulator = run.kernel[metric], run.simulator[metric]
    floor = min(run.floor_s or 0.0, FLOOR_AT_MOST_S)
    excess = max(0.0, kernel - floor - simulator) if kernel > simulator else kernel - simulator
    return excess / simulator


def _link_checks(workload: str, runs: list[Run]) -> list[Check]:
    observed = math.fsum(run.busy_observed_s for run in runs if run.busy_share is not None)
    found = []
    if observed > 0:
        share = math.fsum(
            run.busy_share * run.busy_observed_s for run in runs if run.busy_share is not None
        )
        found.append(
            Check(
                f"{workload}: bottleneck busy while work waits",
                share / observed,
                ">=",
                BUSY_AT_LEAST,
            )
        )
    floors = [run.floor_s for run in runs if run.floor_s is not None]
    if floors:
        found.append(
            Check(
                f"{workload}: floor of small flows, s",
                math.fsum(floors) / len(floors),
                "<=",
                FLOOR_AT_MOST_S,
            )
        )
    return found
