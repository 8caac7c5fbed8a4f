"""The chapter's testbed: elastic jobs on a real Ray with 16 simulated GPUs, beside a simulation.

    python -m benchmarks.ray_testbed --json [--runs N] [--policies pcs-jct,afs] [--together N]

Each run gives one policy 50 jobs that take a minute and more even on all the GPUs they can use
(processes that sleep as long as the work takes on the GPUs they were given), then simulates the
same arrivals with the costs measured in the run, and compares every finish. Pooled over the runs:
error of the finish against the simulation, decision to effect, idle capacity. Beside the
published testbed figures (3.4-3.6): prediction error, JCT and unfairness of each policy.

A run takes about 25 minutes; ``--jobs`` and ``--scale`` make small ones for a look.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ray_figures import Figures, RunRecord
from benchmarks.ray_lab import OVER, Lab, say
from intentd.core.jobs.allocator import JobTable, job_table
from intentd.core.jobs.metrics import parse_objectives
from intentd.core.jobs.policy import JobsPolicy, make
from intentd.core.jobs.search_space import Evaluator, WfqSpace, nondominated
from intentd.core.jobs.workloads import WORKLOADS, sample

Array = NDArray[np.float64]
GPUS = 16
MOST_GPUS = 4
LEAST_S, MOST_S = 60.0, 300.0
LOAD = 1.0
SEARCH = 300  # evaluations of the search for the PCS points
SETTINGS = """policy = "fifo"
[ray]
lease_s = 20
lost_after_s = 30
[costs]
start_s = 0.05
preempt_s = 0.05
hold_growth_s = 0
"""
POLICIES = ("pcs-jct", "pcs-pred", "pcs-balanced", "afs", "srsf", "themis", "fifo")


def workload(jobs: int, seed: int, scale: float = 1.0) -> JobTable:
    """Workload-1 made smaller: durations and trials keep the shape of its CDFs. A job takes from
    60 to 300 s (times scale) on the 1 to 4 GPUs it can use."""
    rng = np.random.default_rng(seed)
    source = WORKLOADS["workload-1"]
    longest = source.service_s[-1][0]
    fastest = np.maximum(LEAST_S, sample(source.service_s, rng, jobs) / longest * MOST_S) * scale
    trials = np.minimum(sample(source.trials, rng, jobs), 20.0)
    most = np.maximum(1, np.ceil(trials / 20.0 * MOST_GPUS)).astype(np.int64)
    work = fastest * most
    gap = work.mean() / (LOAD * GPUS)
    submit = np.concatenate([[0.0], np.cumsum(rng.exponential(gap, jobs))[:-1]])
    speeds = np.arange(MOST_GPUS + 1, dtype=np.float64)[None, :]
    rows = np.zeros(jobs, dtype=np.int32)
    return job_table(submit, work, most, rows, speeds, smallest=1.0)


def points(scale: float) -> dict[str, JobsPolicy]:
    """Three points of a small search on histories that no run uses: least JCT, least error, and
    the one nearest to both."""
    histories = tuple(workload(400, 1000 + seed, scale) for seed in range(3))
    space = WfqSpace(np.concatenate([history.sizes_gpu_s for history in histories]))
    evaluate = Evaluator(histories, GPUS, parse_objectives("jct:avg,prederr:avg"))
    rng = np.random.default_rng(7)
    tried = [rng.uniform(space.lower, space.upper) for _ in range(SEARCH)]
    policies = [space.policy(x) for x in tried]
    values = np.array([evaluate(policy) for policy in policies])
    front = nondominated(values)
    best = values[front]
    spread = best.max(axis=0) - best.min(axis=0) + 1e-12
    middle = np.argmin((((best - best.min(axis=0)) / spread) ** 2).sum(axis=1))
    chosen = {
        "pcs-jct": best[:, 0].argmin(),
        "pcs-pred": best[:, 1].argmin(),
        "pcs-balanced": middle,
    }
    return {name: policies[front[at]] for name, at in chosen.items()}


def policy_named(name: str, pcs: dict[str, JobsPolicy]) -> JobsPolicy:
    return replace(pcs[name] if name in pcs else make(name), integral=True)


async def run(name: str, policy: JobsPolicy, jobs: JobTable, seed: int) -> RunRecord:
    """One policy on one fresh cluster, to the last job's end."""
    lab = Lab({"pcs": GPUS}, SETTINGS, policy)
    label = f"{name}, seed {seed}"
    try:
        await lab.start()
        say(f"{label}: {len(jobs)} jobs arrive over {jobs.submit_s[-1]:.0f} s")
        began = asyncio.get_running_loop().time()
        predicted: dict[int, float] = {}
        names: dict[int, str] = {}
        for at in range(len(jobs)):
            due = began + float(jobs.submit_s[at])
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            work, most = float(jobs.work_gpu_s[at]), int(jobs.largest[at])
            made = await lab.submit(f"job{at}", work, max_gpus=most, retries=20)
            names[made["job"]] = f"job{at}"
            predicted[made["job"]] = float(made["predicted"]["p50_s"])
            if at % 10 == 9:
                say(f"{label}: {at + 1} jobs came")
        await lab.until(lambda rows: all(row["state"] in OVER for row in rows), 7200)
        rows = {row["job"]: row for row in await lab.jobs()}
        wrong = [job for job, row in rows.items() if row["state"] != "finished"]
        if wrong:
            raise SystemExit(f"{label}: jobs {wrong} did not finish")
        events = (await lab.ask("jobs.events", limit=10_000))["events"]
        status = await lab.ask("status")
        say(f"{label}: done")
        return RunRecord(
            name,
            seed,
            policy,
            jobs,
            submitted_s=[rows[job]["submitted_s"] for job in names],
            ended_s=[rows[job]["ended_s"] for job in names],
            predicted_s=[predicted[job] for job in names],
            lost=sum("lost" in event["text"] or "retry" in event["text"] for event in events),
            events=events,
            noted={job: lab.runs(label) for job, label in names.items()},
            effect_s=status["detail"]["ray"]["effect_s"],
        )
    finally:
        lab.end(signal.SIGTERM)
        lab.close()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    pcs = points(arguments.scale)
    wanted = [name for name in arguments.policies.split(",") if name]
    for name in wanted:
        if name not in POLICIES:
            raise SystemExit(f"--policies {name}: one of {', '.join(POLICIES)}")
    # every policy gets the same arrivals of a seed
    plan = [(name, arguments.seed + number) for number in range(arguments.runs) for name in wanted]
    figures = Figures(GPUS)
    free = asyncio.Semaphore(arguments.together)

    async def one(name: str, seed: int) -> None:
        async with free:
            jobs = workload(arguments.jobs, seed, arguments.scale)
            record = await run(name, policy_named(name, pcs), jobs, seed)
            if arguments.records:
                path = Path(arguments.records) / f"{name}-{seed}.pickle"
                path.write_bytes(pickle.dumps(record))
            say(json.dumps(figures.add(record)))

    async with asyncio.TaskGroup() as tasks:
        for name, seed in plan:
            tasks.create_task(one(name, seed))
    return figures.result(math.nan if arguments.scale != 1 else 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=2, help="seeds; each runs every policy")
    parser.add_argument("--policies", default="pcs-jct", help=", ".join(POLICIES))
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of durations; below 1: a look")
    parser.add_argument("--records", default="", help="directory that keeps what was measured")
    parser.add_argument("--again", default="", help="figures of such a directory, no new runs")
    parser.add_argument("--together", type=int, default=1, help="clusters at a time")
    arguments = parser.parse_args()
    if arguments.again:
        figures = Figures(GPUS)
        for path in sorted(Path(arguments.again).glob("*.pickle")):
            figures.add(pickle.loads(path.read_bytes()))
        result = figures.result(1.0)
    else:
        result = asyncio.run(measure(arguments))
    print(json.dumps(result) if arguments.json else json.dumps(result, indent=2))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
