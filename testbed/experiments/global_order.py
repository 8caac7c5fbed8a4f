"""What global order through the sequencer costs and gains (dissertation, section 2.4.4).

Several client hosts ask one server. *shared gate*: all hosts use one agent, which orders perfectly
and needs no sequencer. *sequencer*: an agent each, tickets and FINs between them. *independent*: an
agent each, each ordering its own flows only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from intentd.core.flows.assemble import default_early_fin_bytes, default_local_below_bytes
from intentd.core.flows.policy import DomainPolicy
from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, Lab, Scenario
from intentd.testbed.metrics import completion_metrics
from intentd.testbed.playing import Progress
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.results import Check, Results, Table, keep, machine_facts, paired
from intentd.testbed.traffic.records import read_records
from intentd.testbed.traffic.trace import poisson

WORKLOADS: Final = ("web-search", "cache")
LOAD: Final = 0.8
DURATION_S: Final = 35.0
SEEDS: Final = 3
CLIENTS: Final = 4
SHARED, GLOBAL, INDEPENDENT = "shared gate", "sequencer", "independent gates"
MEAN_AT_MOST: Final = 1.08
P99_AT_MOST: Final = 1.05
SMALL_AT_MOST: Final = 1.10  # small flows with the sequencer against the shared gate, median


def ordered_globally(policy: DomainPolicy) -> DomainPolicy:
    """The same classes, tickets from the sequencer; flows under one BDP stay local."""
    classes = tuple(replace(cls, sequencing="global") for cls in policy.classes)
    return replace(
        policy,
        classes=classes,
        early_fin_bytes=default_early_fin_bytes(policy.rate_bps, "global"),
        local_below_bytes=default_local_below_bytes(policy.rate_bps),
    )


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    workloads = options.workloads or WORKLOADS
    load = options.loads[0] if options.loads else LOAD
    duration_s = options.duration_s or DURATION_S
    seeds = options.seed_range(SEEDS)
    results = Results(
        "global_order",
        f"Global order: {CLIENTS} client hosts, one server",
        "'shared gate': one agent for all hosts, the order every other way is held against. "
        "'sequencer': an agent on each host, order by tickets and broadcast FINs. 'independent "
        "gates': an agent on each host without any order between them.",
        options=options.to_plain()
        | {"workloads": workloads, "load": load, "duration_s": duration_s, "seeds": list(seeds)},
        machine=machine_facts(),
        notes=options.notes(),
    )
    for label in (SHARED, GLOBAL, INDEPENDENT):
        setup = replace(options.setup(), clients=CLIENTS, shared_gate=label == SHARED)
        async with Lab(setup, directory, progress) as lab:
            for name in workloads:
                source = scaled_workload(name, options.scale)
                policy = policy_for(
                    "2d", [source], domain=DOMAIN, rate_bps=options.rate_bps, load=load
                )
                if label == GLOBAL:
                    policy = ordered_globally(policy)
                for seed in seeds:
                    trace = poisson(
                        source,
                        load=load,
                        rate_bps=options.rate_bps,
                        duration_s=duration_s,
                        seed=seed,
                        hosts=CLIENTS,
                    )
                    run = await lab.run(
                        Scenario(
                            label,
                            source.name,
                            load,
                            seed,
                            trace,
                            policy,
                            simulate=label == SHARED,
                        )
                    )
                    keep(results, run, directory)
    _conclude(results, directory, default_local_below_bytes(options.rate_bps))
    return results


def _conclude(results: Results, directory: Path, bdp_bytes: int) -> None:
    rows = []
    for workload, load in results.groups():
        whole = paired(results, workload, load, GLOBAL, SHARED, "kernel")
        alone = paired(results, workload, load, INDEPENDENT, SHARED, "kernel")
        if not whole or not alone:
            continue
        results.checks += [
            Check(
                f"{workload}: sequencer over shared gate, mean",
                whole["mean"][0],
                "<=",
                MEAN_AT_MOST,
            ),
            Check(
                f"{workload}: sequencer over shared gate, p99", whole["p99"][0], "<=", P99_AT_MOST
            ),
            Check(
                f"{workload}: sequencer over independent gates, p99",
                whole["p99"][0] / alone["p99"][0],
                "<=",
                1.0,
            ),
        ]
        small = {
            label: completion_metrics(
                record.fct_s
                for run in results.select(workload, load, label)
                for record in read_records(directory / run.records)
                if record.size_bytes <= bdp_bytes
            )
            for label in (SHARED, GLOBAL, INDEPENDENT)
        }
        rows += [
            [f"{workload}, {label}", *(1e3 * found[name] for name in ("mean", "p50", "p99"))]
            for label, found in small.items()
            if found
        ]
        if small[SHARED] and small[GLOBAL]:
            results.checks.append(
                Check(
                    f"{workload}: flows under one BDP, sequencer over shared gate, median",
                    small[GLOBAL]["p50"] / small[SHARED]["p50"],
                    "<=",
                    SMALL_AT_MOST,
                )
            )
        if small[INDEPENDENT] and small[GLOBAL]:  # as many agents at work, and no order to pay for
            results.checks.append(
                Check(
                    f"{workload}: flows under one BDP, sequencer over independent gates, median",
                    small[GLOBAL]["p50"] / small[INDEPENDENT]["p50"],
                    "<=",
                    SMALL_AT_MOST,
                )
            )
    if rows:
        results.tables.append(
            Table(f"Flows up to {bdp_bytes} bytes (one BDP), ms", ["", "mean", "p50", "p99"], rows)
        )
