"""Decisions and predictions of the GPU scheduler: its books alone, and through its doors.

python -m benchmarks.gpu_books --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from intentd.core.jobs.job import Job, Start, Stop
from intentd.core.jobs.ledger import Ledger, Rules
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import NAMES, JobsPolicy, make, wfq
from intentd.core.jobs.predictor import Predictor
from intentd.core.jobs.spec import JobSpec, spec_from_plain
from intentd.daemons.gpu.scheduler import PREDICTED_JOBS, Scheduler
from intentd.daemons.gpu.service import Caller, Service
from intentd.daemons.gpu.store import JobStore
from intentd.daemons.kit.clock import SystemClock

ROUNDS = 60
SERVED = 100


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = 1000 * np.array(seconds)
    return {
        name: round(float(np.percentile(values, p)), 3)
        for name, p in (("p50_ms", 50), ("p99_ms", 99))
    }


def named(policy: str) -> JobsPolicy:
    """A policy by its name; WFQ as (T, W, zeta, delta) cut it for the sizes of ``measure``."""
    if policy != "wfq":
        return make(policy)
    rng = random.Random(0)
    sizes = [rng.lognormvariate(10, 1.5) for _ in range(1000)]
    return wfq(sizes, T=0.5, W=0.7, zeta=0.5)


def measure(jobs: int, policy: str, gpus: int, seed: int) -> dict[str, object]:
    """One more job beside so many: its booking, the decision, its prediction."""
    rng = random.Random(seed)
    nodes = [Node(f"n{i}", 8) for i in range(gpus // 8)]
    books, predictor, now = Ledger(nodes, policy=named(policy)), Predictor(), 0.0
    spent: dict[str, list[float]] = {"submit": [], "decide": [], "predict": []}
    # processor time too: on a machine that others use, the wall clock measures them as well
    cpu: dict[str, list[float]] = {"decide_cpu": [], "predict_cpu": []}
    for number in range(jobs + ROUNDS):
        now += 1.0
        most = rng.choice((1, 2, 4, 8))
        plain = {
            "command": ["x"],
            "max_gpus": most,
            "size_gpu_s": rng.lognormvariate(10, 1.5),
        }
        began = time.perf_counter()
        job = books.submit(spec_from_plain(plain), now)
        booked, booked_cpu = time.perf_counter(), time.thread_time()
        if number < jobs and number % 500:
            continue
        if jobs <= PREDICTED_JOBS:  # as in the daemon
            predictor.submit(*books.snapshot(now))
        predicted, predicted_cpu = time.perf_counter(), time.thread_time()
        orders = books.decide(now)
        decided, decided_cpu = time.perf_counter(), time.thread_time()
        for order in orders:
            if isinstance(order, Start):
                books.started(order.job, order.epoch, now)
            else:
                books.exited(order.job, order.epoch, 0, now)
        books.take_dirty(), books.take_events()
        if number >= jobs:
            spent["submit"].append(booked - began)
            spent["predict"].append(predicted - booked)
            spent["decide"].append(decided - predicted)
            cpu["decide_cpu"].append(decided_cpu - predicted_cpu)
            cpu["predict_cpu"].append(predicted_cpu - booked_cpu)
            assert job.id == number + 1
    return {"jobs": jobs, "policy": policy, "gpus": gpus} | {
        name: percentiles(values) for name, values in (spent | cpu).items()
    }


class Nobody:
    """An executor under which nothing ever ends."""

    def start(self, order: Start, job: Job) -> None: ...

    def stop(self, order: Stop) -> None: ...

    def recover(self, job: Job) -> None: ...

    def poll(self) -> None: ...

    def forget(self, job: int) -> None: ...

    def output(self, job: int) -> Path | None:
        return None

    async def close(self) -> None: ...


async def served(jobs: int, policy: str, gpus: int, seed: int, where: Path) -> dict[str, object]:
    """As the daemon does it, with a disk: submissions one by one beside so many queued jobs, lists
    of 100, what-ifs, and how long the loop stood still."""
    rng = random.Random(seed)
    nodes = [Node(f"n{i}", 8) for i in range(gpus // 8)]
    rules = Rules(quotas={"quoted": 16}, max_jobs=100_000)
    ledger = Ledger(nodes, policy=make(policy), rules=rules)
    scheduler = Scheduler(ledger, JobStore(where / "db"), Predictor(), SystemClock())
    scheduler.executor = Nobody()
    service = Service(scheduler, {})
    running = asyncio.ensure_future(scheduler.run())
    lag: list[float] = []
    ticking = asyncio.ensure_future(_tick(lag))

    def spec() -> JobSpec:
        return spec_from_plain(
            {
                "command": ["x"],
                "max_gpus": rng.choice((1, 2, 4, 8)),
                "size_gpu_s": rng.lognormvariate(10, 1.5),
                "owner": rng.choice(("quoted", "free", "free")),
                "labels": {"team": rng.choice("ab")},
            }
        )

    before = resident_mb()
    for _ in range(0, jobs, 500):
        await scheduler.submit([spec() for _ in range(500)])
    spent: dict[str, list[float]] = {"submit": [], "list": [], "by_label": [], "decide": []}
    lag.clear()
    for _ in range(SERVED):
        began = time.perf_counter()
        await scheduler.submit([spec()])
        submitted = time.perf_counter()
        await service.list_jobs({}, Caller("", trusted=True))
        listed = time.perf_counter()
        await service.list_jobs({"label": "team=a"}, Caller("", trusted=True))
        spent["submit"].append(submitted - began)
        spent["list"].append(listed - submitted)
        spent["by_label"].append(time.perf_counter() - listed)
        spent["decide"].append(scheduler.decide_s)
        await asyncio.sleep(0.02)
    ticking.cancel()
    running.cancel()
    await asyncio.gather(running, ticking, return_exceptions=True)
    scheduler.store.store.close()
    return {
        "queued": jobs,
        "policy": policy,
        "gpus": gpus,
        **{name: percentiles(values) for name, values in spent.items()},
        "loop_stood_still": percentiles(lag),
        "resident_mb": [round(before), round(resident_mb())],
    }


async def _tick(lag: list[float]) -> None:
    """How much later than asked the loop comes back, every 2 ms."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.002)
        lag.append(time.perf_counter() - began - 0.002)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    books, doors = [], []
    for jobs in (1000, 10_000):
        for policy in NAMES if jobs <= PREDICTED_JOBS else ("fifo", "srsf", "maxmin"):
            print(f"{jobs} jobs, {policy}", file=sys.stderr)
            books.append(measure(jobs, policy, 64, arguments.seed))
    for jobs in (1000, 10_000):
        print(f"{jobs} jobs through the scheduler", file=sys.stderr)
        with tempfile.TemporaryDirectory() as where:
            doors.append(asyncio.run(served(jobs, "fifo", 64, arguments.seed, Path(where))))
    found = {"books": books, "served": doors}
    print(json.dumps(found) if arguments.json else "\n".join(map(str, [*books, *doors])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
