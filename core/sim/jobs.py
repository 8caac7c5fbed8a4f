"""A GPU cluster in simulation: arrivals, failures and wrong estimates around the real allocator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.jobs import allocator
from intentd.core.jobs.allocator import JobTable, Outcome, Progress, Quotas
from intentd.core.jobs.metrics import Measured, summarised
from intentd.core.jobs.policy import FREE, Costs, JobsPolicy

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Failure:
    """GPUs that vanish at a time and come back after a repair."""

    at_s: float
    gpus: int
    repair_s: float

    def __post_init__(self) -> None:
        for name in ("at_s", "gpus", "repair_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"failure.{name}", value, "a finite number >= 0")


@dataclass(frozen=True, slots=True)
class Options:
    """What a simulation takes besides jobs, policy and GPUs.

    predictions: share of the jobs whose finish is predicted at arrival (1 all, 0 none), chosen by
    seed. error_percent: sizes are known within +- this, uniformly, by seed (figure 3.10).
    artifact: as the authors' simulator computes: contention averaged over events and a linear
    fair share, leases that a prediction starts without. review_every: predict all active jobs
    anew after every so many arrivals (what a live predictor sees anyway).
    backend: "" is the best one there is.
    """

    predictions: float = 1.0
    error_percent: float = 0.0
    seed: int = 0
    artifact: bool = False
    costs: Costs = FREE
    failures: tuple[Failure, ...] = ()
    review_every: int = 0
    backend: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.predictions <= 1:
            raise InputError("predictions", self.predictions, "a share from 0 to 1")
        if not 0 <= self.error_percent < 100:
            raise InputError(
                "error_percent", self.error_percent, "a percentage from 0 to below 100"
            )


@dataclass(frozen=True, slots=True)
class Result:
    """A finished simulation."""

    jobs: JobTable
    policy: JobsPolicy
    gpus: float
    outcome: Outcome
    measured: Measured

    @property
    def makespan_s(self) -> float:
        return float(self.outcome.finish_s.max() - self.jobs.submit_s[0])

    def summary(self) -> dict[str, Any]:
        """The figures of the command, errors in percent, unfairness as a percentage too."""
        seen, errors = self.measured, np.abs(self.measured.error_percent)
        known = np.isfinite(errors).any()

        def of(values: Array, percentile: float | None = None) -> float | None:
            value = summarised(values, percentile)
            return value if math.isfinite(value) else None

        return {
            "jobs": len(self.jobs),
            "avg_jct_s": of(seen.jct_s),
            "p50_jct_s": of(seen.jct_s, 50),
            "p90_jct_s": of(seen.jct_s, 90),
            "p99_jct_s": of(seen.jct_s, 99),
            "avg_pred_err": of(errors) if known else None,
            "p99_pred_err": of(errors, 99) if known else None,
            "signed_pred_err": of(seen.error_percent) if known else None,
            "avg_unfairness": of(100 * seen.unfairness),
            "p99_unfairness": of(100 * seen.unfairness, 99),
            "makespan_s": self.makespan_s,
            "preemptions": int(self.outcome.preemptions.sum()),
            "resizes": int(self.outcome.resizes.sum()),
        }


def with_error(jobs: JobTable, error_percent: float, seed: int) -> JobTable:
    """The same jobs with sizes estimated wrongly by a factor uniform in 1 +- error (fig. 3.10)."""
    if error_percent == 0:
        return jobs
    width = error_percent / 100.0
    factor = 1.0 + np.random.default_rng(seed).uniform(-width, width, len(jobs))
    return replace(jobs, estimate=jobs.estimate * factor)


def capacity_changes(failures: Sequence[Failure]) -> Array:
    """(2 m, 2): time and change in GPUs, in time order."""
    rows = [(f.at_s, -float(f.gpus)) for f in failures]
    rows += [(f.at_s + f.repair_s, float(f.gpus)) for f in failures]
    return np.array(sorted(rows), dtype=np.float64).reshape(-1, 2)


def simulate(
    jobs: JobTable, policy: JobsPolicy, gpus: float, options: Options | None = None
) -> Result:
    """Runs all jobs to their end. Raises InputError if some job can never run."""
    options = options or Options()
    check_fits(jobs, gpus)
    jobs = with_error(jobs, options.error_percent, options.seed)
    chosen = np.ones(len(jobs), dtype=np.uint8)
    if options.predictions < 1:
        draw = np.random.default_rng(options.seed + 1).uniform(size=len(jobs))
        chosen = (draw < options.predictions).astype(np.uint8)
    outcome = allocator.run(
        allocator.PLAY,
        jobs,
        policy,
        gpus,
        costs=options.costs,
        failures=capacity_changes(options.failures),
        predict=chosen,
        artifact=options.artifact,
        seed=options.seed,
        review_every=options.review_every,
        backend=options.backend,
        now_s=min(0.0, float(jobs.submit_s[0])),
    )
    if not outcome.complete:
        waiting = int(np.isnan(outcome.finish_s).sum())
        raise InputError("gpus", gpus, f"enough GPUs: {waiting} jobs would wait for ever")
    return Result(jobs, policy, gpus, outcome, Measured.of(jobs, outcome))


def check_fits(jobs: JobTable, gpus: float) -> None:
    """Refuses an empty table, no GPUs, and jobs whose minimum the cluster can never give."""
    if len(jobs) == 0:
        raise InputError("jobs", [], "at least one job")
    if not (math.isfinite(gpus) and gpus >= 1):
        raise InputError("gpus", gpus, "a finite number of GPUs >= 1")
    over = np.nonzero(jobs.smallest > gpus)[0]
    if over.size:
        at = int(over[0])
        raise InputError(f"jobs[{at}].min_gpus", jobs.smallest[at].item(), f"at most {gpus:g}")


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal GPUs: a type, its nodes' size, and how many there are."""

    gpu_type: str
    gpus: int
    node_gpus: int = 0


def simulate_pools(
    tables: Sequence[JobTable], policy: JobsPolicy, pools: Sequence[Pool]
) -> tuple[NDArray[np.int64], list[Outcome]]:
    """Several GPU types (sections 3.3.3 and 3.7): a pool each, with the policy's W for its type.

    tables: the same jobs with the speeds of each pool; a job whose smallest allocation exceeds a
    pool, or whose speed there is 0, does not use it. On arrival a job goes to the pool that
    predicts the earliest finish, and stays. Returns each job's pool, and each pool's outcome
    (over the jobs it got, in arrival order).
    """
    n = len(tables[0])
    chosen = np.full(n, -1, dtype=np.int64)
    members: list[list[int]] = [[] for _ in pools]
    for j in range(n):
        best, best_at = -1, math.inf
        for index, (table, pool) in enumerate(zip(tables, pools, strict=True)):
            usable = table.speeds[table.table[j], table.largest[j]] > 0
            if not usable or table.smallest[j] > pool.gpus:
                continue
            here = table.take([*members[index], j])
            flags = np.zeros(len(here), dtype=np.uint8)
            flags[-1] = 1
            own = policy.for_type(pool.gpu_type)
            seen = allocator.run(allocator.PLAY, here, own, pool.gpus, predict=flags)
            if seen.predicted_s[-1] < best_at:
                best, best_at = index, float(seen.predicted_s[-1])
        if best < 0:
            raise InputError(f"jobs[{j}].min_gpus", tables[0].smallest[j].item(), "a pool it fits")
        chosen[j] = best
        members[best].append(j)
    outcomes = [
        simulate(table.take(own), policy.for_type(pool.gpu_type), pool.gpus).outcome
        for table, pool, own in zip(tables, pools, members, strict=True)
        if own
    ]
    return chosen, outcomes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment: what a prediction starts from. jobs: the active ones."""

    jobs: JobTable
    progress: Progress
    now_s: float
    gpus: float
    policy: JobsPolicy
    costs: Costs = FREE
    quotas: Quotas | None = None

    def play_out(self) -> Array:
        """Absolute finish time of each job if nothing else arrives."""
        return allocator.play_out(
            self.jobs,
            self.policy,
            self.gpus,
            now_s=self.now_s,
            progress=self.progress,
            costs=self.costs,
            quotas=self.quotas,
        )

    def with_job(self, candidate: JobTable, owner: int = -1) -> Snapshot:
        """The same moment with one more job that has just arrived (same speed tables).

        owner: index of its quota.
        """

        def joined(name: str) -> Any:
            return np.concatenate([getattr(self.jobs, name), getattr(candidate, name)])

        both = JobTable(
            submit_s=joined("submit_s"),
            work_gpu_s=joined("work_gpu_s"),
            smallest=joined("smallest"),
            largest=joined("largest"),
            table=joined("table"),
            speeds=candidate.speeds,
            estimate=joined("estimate"),
            efficiency=candidate.efficiency,
        )
        new = Progress.fresh(candidate)
        new.contention[:] = float(len(both))
        rows = {
            name: np.concatenate([getattr(self.progress, name), getattr(new, name)])
            for name in Progress.__slots__
        }
        quotas = self.quotas
        if quotas is not None:
            owners = np.append(quotas.owner, np.int32(owner)).astype(np.int32)
            quotas = replace(quotas, owner=owners)
        return replace(self, jobs=both, progress=Progress(**rows), quotas=quotas)
