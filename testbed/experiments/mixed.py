"""Two workloads at once: classes for the mixture against those of either workload (section 2.6.3,
figure 2.9c)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from intentd.testbed.experiments.options import Options
from intentd.testbed.lab import DOMAIN, Lab, Scenario
from intentd.testbed.playing import Progress
from intentd.testbed.policies import policy_for, scaled_workload
from intentd.testbed.results import Results, keep, machine_facts
from intentd.testbed.traffic.trace import TraceFlow, Workload, merge, poisson

WORKLOADS: Final = ("cache", "data-mining")
LOAD: Final = 0.8
DURATION_S: Final = 35.0
SEEDS: Final = 3
# Policies of the mixture that run beside 2D.
POLICIES: Final = ("2d", "ps", "fifo")


def mixture(
    sources: list[Workload], *, load: float, rate_bps: float, duration_s: float, seed: int
) -> list[TraceFlow]:
    """Each workload offers an equal part of the load."""
    return merge(
        poisson(
            source,
            load=load / len(sources),
            rate_bps=rate_bps,
            duration_s=duration_s,
            seed=seed,
        )
        for source in sources
    )


async def run(options: Options, directory: Path, progress: Progress) -> Results:
    """2D with classes of the mixture, of each workload alone, and learned while the flows go on;
    PS and FIFO beside them."""
    workloads = options.workloads or WORKLOADS
    load = options.loads[0] if options.loads else LOAD
    policies = options.policies or POLICIES
    duration_s = options.duration_s or DURATION_S
    seeds = options.seed_range(SEEDS)
    sources = [scaled_workload(name, options.scale) for name in workloads]
    name = "+".join(source.name for source in sources)
    results = Results(
        "mixed",
        f"Two workloads at once: {name}",
        "Each workload offers an equal part of the load at the same time. '2d' has classes from a "
        "sample of the mixture, '2d (X)' those of workload X alone; '2d (controller)' starts with "
        "one class and learns during the run.",
        options=options.to_plain()
        | {"workloads": workloads, "load": load, "duration_s": duration_s, "seeds": list(seeds)},
        machine=machine_facts(),
        notes=options.notes(),
        published=["mixed"],
    )
    rate_bps = options.rate_bps

    async with Lab(options.setup(), directory, progress) as lab:
        for seed in seeds:
            trace = mixture(sources, load=load, rate_bps=rate_bps, duration_s=duration_s, seed=seed)
            variants = [(policy, policy, sources) for policy in policies]
            variants += [(f"2d ({source.name})", "2d", [source]) for source in sources]
            for label, policy, learned_from in variants:
                chosen = policy_for(
                    policy, learned_from, domain=DOMAIN, rate_bps=rate_bps, load=load
                )
                run = await lab.run(Scenario(label, name, load, seed, trace, chosen))
                keep(results, run, directory)
    if options.gate == "agent":
        for seed in seeds:
            trace = mixture(sources, load=load, rate_bps=rate_bps, duration_s=duration_s, seed=seed)
            # A controller that knows nothing yet: its first flows run with one class.
            async with Lab(replace(options.setup(), learning=True), directory, progress) as lab:
                run = await lab.run(Scenario("2d (controller)", name, load, seed, trace, None))
            keep(results, run, directory)
    return results
