"""Workloads on which constants may be chosen: none of the four traces, nothing derived from them.

Workload-1 and -3, the artifact's ``afs`` and ``themis2`` CDFs, Alibaba's tasks, Pollux's job lists,
and generated sessions of users who submit like jobs several times; steady and in bursts, at .5 to 2
times the capacity.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.pcs_published import GPUS
from intentd.core.jobs import traces
from intentd.core.jobs.allocator import JobTable, job_table
from intentd.core.jobs.policy import JobsPolicy, make, wfq
from intentd.core.jobs.workloads import sample, synthetic

Array = NDArray[np.float64]


def workloads(data: Path) -> dict[str, JobTable]:
    """data: the directory of the PCS data; net/gpu is beside it."""
    text = (data.parent / "net/gpu/alibaba_gpu2023_tasks.csv").read_text(encoding="utf-8")
    tasks = traces.read_alibaba(text)
    count = len(tasks)

    def part(first: float, last: float, load: float) -> JobTable:
        return at_load(tasks.take(slice(int(first * count), int(last * count))), load)

    def drawn(name: str, jobs: int, load: float, seed: int) -> JobTable:
        return synthetic(name, jobs=jobs, load=load, gpus=GPUS, seed=seed)

    return {
        "workload-1 .75": drawn("workload-1", 2000, 0.75, 1),
        "workload-1 in bursts 1.1": shaken(drawn("workload-1", 2000, 1.1, 2), 1.1, 2),
        "workload-3 in bursts .9": shaken(drawn("workload-3", 2500, 0.9, 3), 0.9, 3),
        "workload-3 1.5": drawn("workload-3", 2500, 1.5, 4),
        "alibaba .6": part(0, 0.4, 0.6),
        "alibaba 1": part(0.3, 0.7, 1.0),
        "alibaba 2": part(0.6, 1, 2.0),
        "pollux user .9": pollux(data.parent / "net/gpu", "user", 0.9, 5),
        "pollux tuned 1.3": pollux(data.parent / "net/gpu", "tuned", 1.3, 6),
        "afs .9": from_cdfs(data / "workload_cdfs", "afs", 2500, 0.9, 7),
        "themis2 1.2": from_cdfs(data / "workload_cdfs", "themis2", 1500, 1.2, 8),
        "sessions .5": sessions(2000, 0.5, 9),
        "sessions .9": sessions(3000, 0.9, 10),
        "sessions 1.2": sessions(4000, 1.2, 11),
        "sessions 2": sessions(3000, 2.0, 12),
    }


def policies(jobs: JobTable) -> dict[str, JobsPolicy]:
    """SRSF, and points of WFQ other than those of the coverage benchmark."""
    sizes = jobs.sizes_gpu_s
    return {
        "srsf": make("srsf"),
        "wfq-a": wfq(sizes, T=1, W=0.8, zeta=0.6, delta=0.1),
        "wfq-b": wfq(sizes, T=0.3, W=0.5, zeta=0.4, delta=0.2),
        "wfq-c": wfq(sizes, T=3, W=0.4, zeta=0.2, delta=0.1),
    }


def at_load(jobs: JobTable, load: float) -> JobTable:
    """The same jobs nearer together or farther apart, offering a share of the capacity."""
    since = jobs.submit_s - jobs.submit_s[0]
    return replace(jobs, submit_s=since * (jobs.load(GPUS) / load))


def bursty(gaps: Array, rng: np.random.Generator, sigma: float = 0.9, memory: int = 80) -> Array:
    """Gaps whose logarithm wanders with a memory of so many arrivals."""
    wander = np.zeros(len(gaps))
    keep = np.exp(-1 / memory)
    for at in range(1, len(gaps)):
        wander[at] = keep * wander[at - 1] + np.sqrt(1 - keep**2) * rng.normal()
    return np.asarray(gaps * np.exp(sigma * wander))


def shaken(jobs: JobTable, load: float, seed: int) -> JobTable:
    """The same jobs in bursts."""
    rng = np.random.default_rng(seed)
    gaps = bursty(np.diff(jobs.submit_s, prepend=0.0) + 1, rng)
    return at_load(replace(jobs, submit_s=np.cumsum(gaps)), load)


def sessions(count: int, load: float, seed: int) -> JobTable:
    """Heavy tails; users submit like jobs a few times in a row; speeds by Amdahl's law."""
    rng = np.random.default_rng(seed)
    work: list[float] = []
    largest: list[int] = []
    rows: list[int] = []
    gaps: list[float] = []
    while len(work) < count:
        several = int(rng.geometric(0.35))
        size = min(float(np.exp(rng.normal(8.5, 2.4))), 3e6)
        gpus, row = int(rng.choice([1, 1, 1, 2, 4, 8, 16])), int(rng.integers(0, 4))
        for turn in range(several):
            work.append(max(size * float(np.exp(rng.normal(0, 0.3))), 10.0))
            largest.append(gpus)
            rows.append(row)
            gaps.append(rng.exponential(1.0) if turn == 0 else rng.exponential(0.1))
    serial = np.array([0, 0.02, 0.08, 0.2])[:, None]
    speeds = np.zeros((4, 17))
    speeds[:, 1:] = 1 / (serial + (1 - serial) / np.arange(1.0, 17))
    times = np.cumsum(bursty(np.array(gaps), rng))
    return at_load(job_table(times, work, largest, rows, speeds).take(slice(0, count)), load)


def from_cdfs(where: Path, name: str, count: int, load: float, seed: int) -> JobTable:
    """Linear jobs by the artifact's CDFs, in bursts."""
    rng = np.random.default_rng(seed)

    def drawn(quantity: str) -> Array:
        path = where / f"cdf-{quantity}-{name}.csv"
        with path.open(encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        return sample(tuple((float(value), float(share)) for value, share in rows), rng, count)

    work = np.maximum(drawn("app-service-times"), 10)
    gpus = np.maximum(np.floor(drawn("max-gpus-per-job")), 1)
    gpus = np.minimum(gpus * np.maximum(np.floor(drawn("num-jobs-per-app")), 1), GPUS)
    times = np.cumsum(rng.exponential(1, count))
    zeros = np.zeros(count, dtype=np.int64)
    table = job_table(times, work, gpus.astype(np.int64), zeros, np.arange(GPUS + 1.0)[None, :])
    return shaken(table, load, seed + 1)


def pollux(where: Path, kind: str, load: float, seed: int) -> JobTable:
    """The five lists of one kind one after another, sizes spread around their categories'."""
    measured = {
        name: (where / f"pollux_scaling_{name}.csv").read_text(encoding="utf-8")
        for name in ("bert", "cifar10", "deepspeech2", "imagenet")
    }
    parts = [
        traces.read_pollux((where / f"pollux_{kind}_{n}.csv").read_text("utf-8"), measured)
        for n in range(1, 6)
    ]
    rng = np.random.default_rng(seed)
    width = max(part.speeds.shape[1] for part in parts)
    times: list[Array] = []
    rows: list[Array] = []
    table: list[int] = []
    begin = 0.0
    for part in parts:
        times.append(part.submit_s - part.submit_s[0] + begin)
        begin = float(times[-1][-1]) + 200
        table += (part.table + len(rows)).tolist()
        rows += [np.concatenate([row, np.full(width - len(row), row[-1])]) for row in part.speeds]
    work = np.concatenate([part.work_gpu_s for part in parts])
    work = work * np.exp(rng.normal(0, 0.7, len(work)))
    largest = np.concatenate([part.largest for part in parts])
    return at_load(job_table(np.concatenate(times), work, largest, table, np.array(rows)), load)
