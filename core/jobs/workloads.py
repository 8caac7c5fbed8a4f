"""Synthetic workloads: the chapter's workload-1 and workload-3 from their CDFs.

The points are those of the PCS artifact (github.com/abdullahfsm/PCS, simulation/workloads, commit
62a6ca3; MIT licence, Copyright (c) 2024 Abdullah Bin Faisal): themis1 is workload-1, gavel
("continuous-multiple") is workload-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError
from intentd.core.jobs.allocator import JobTable, job_table

Array = NDArray[np.float64]
Cdf = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Piecewise-linear CDFs as (value, cumulative share) points.

    service_s: GPU seconds of a whole job. trials: trials a job consists of. trial_gpus: GPUs a
    trial can use; a job's largest useful allocation is the sum over its trials.
    """

    service_s: Cdf
    trials: Cdf
    trial_gpus: Cdf


WORKLOADS: Final = {
    "workload-1": Synthetic(
        service_s=(
            (3600, 0), (9216, 0.01), (40284, 0.11), (108864, 0.28), (297072, 0.35), (447552, 0.45),
            (1028304, 0.53), (1291464, 0.74), (1696176, 0.88), (2176452, 0.96), (2625444, 1),
        ),
        trials=((1, 0), (20, 0.23), (22, 0.35), (56, 0.55), (60, 0.69), (90, 1)),
        trial_gpus=((1, 0), (1, 0.75), (2, 0.98), (3, 1)),
    ),
    "workload-3": Synthetic(
        service_s=((30 * 60, 0), (1000 * 60, 0.8), (10000 * 60, 1)),
        trials=((1, 0), (1, 1)),
        trial_gpus=((1, 0), (1, 0.7), (2, 0.9), (4, 0.95), (8, 1)),
    ),
}  # fmt: skip


def sample(cdf: Cdf, rng: np.random.Generator, count: int) -> Array:
    """Inverse-transform draws, linear between the points."""
    values, shares = np.array(cdf, dtype=np.float64).T
    return np.asarray(np.interp(rng.uniform(size=count), shares, values))


def synthetic(
    name: str, *, jobs: int, load: float, gpus: float, seed: int, smallest: float = 1.0
) -> JobTable:
    """Jobs of a named workload with exponential gaps: mean size over (load x GPUs).

    Linear scaling up to the sum of the trials' GPUs, at most the cluster. As published, whole
    seconds and whole GPUs.
    """
    if name not in WORKLOADS:
        raise InputError("workload", name, f"one of {', '.join(WORKLOADS)}")
    if not 1 <= jobs <= 1_000_000:
        raise InputError("jobs", jobs, "1 to 1000000 jobs")
    if not (math.isfinite(load) and load > 0):
        raise InputError("load", load, "a finite number > 0")
    if not (math.isfinite(gpus) and gpus >= 1):
        raise InputError("gpus", gpus, "a finite number of GPUs >= 1")
    workload = WORKLOADS[name]
    rng = np.random.default_rng(seed)
    service = np.floor(sample(workload.service_s, rng, jobs))
    trials = np.floor(sample(workload.trials, rng, jobs)).astype(np.int64)
    pool = np.floor(sample(workload.trial_gpus, rng, 100)).astype(np.int64)
    service = np.maximum(np.floor(service / trials), 1.0) * trials
    largest = np.array([rng.choice(pool, count).sum() for count in trials], dtype=np.int64)
    gap = service.mean() / (load * gpus)
    gaps = np.floor(np.maximum(rng.exponential(gap, jobs), 0.01))
    submit = np.concatenate([[0.0], np.cumsum(gaps)[:-1]])
    top = int(largest.max())
    speeds = np.arange(top + 1, dtype=np.float64)[None, :]
    return job_table(
        submit, service, largest, np.zeros(jobs, dtype=np.int32), speeds, smallest=smallest
    )


def resampled(
    history: JobTable, jobs: int, seed: int, *, gap_scale: float = 1.0, block: int = 50
) -> JobTable:
    """Another history like this one, for training: blocks of consecutive jobs with their gaps.

    Blocks keep bursts and the size mix of a moment, which independent draws destroy; the mean
    arrival rate is the history's (times gap_scale).
    """
    if len(history) == 0:
        raise InputError("history", 0, "at least one job")
    rng = np.random.default_rng(seed)
    n = len(history)
    size = min(block, n)
    starts = rng.integers(0, n - size + 1, -(-jobs // size))
    picked = (starts[:, None] + np.arange(size)[None, :]).ravel()[:jobs]
    gaps = np.diff(history.submit_s, prepend=history.submit_s[0])
    if n > 1:
        gaps[0] = gaps[1:].mean()
    times = np.cumsum(gaps[picked]) * gap_scale
    table = history.take(picked)
    return JobTable(
        times - times[0],
        table.work_gpu_s,
        table.smallest,
        table.largest,
        table.table,
        table.speeds,
        table.estimate,
        table.efficiency,
    )
