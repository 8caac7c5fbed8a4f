"""Decisions and predictions of the GPU scheduler's books, in one process, without a disk.

python -m benchmarks.gpu_books --json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import numpy as np

from intentd.core.jobs.job import Start
from intentd.core.jobs.ledger import Ledger
from intentd.core.jobs.placement import Node
from intentd.core.jobs.policy import make
from intentd.core.jobs.predictor import Predictor
from intentd.core.jobs.spec import spec_from_plain

ROUNDS = 30


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = 1000 * np.array(seconds)
    return {
        name: round(float(np.percentile(values, p)), 3)
        for name, p in (("p50_ms", 50), ("p99_ms", 99))
    }


def measure(jobs: int, policy: str, gpus: int, seed: int) -> dict[str, object]:
    """One more job beside so many: its booking, the decision, its prediction."""
    rng = random.Random(seed)
    nodes = [Node(f"n{i}", 8) for i in range(gpus // 8)]
    books, predictor, now = Ledger(nodes, policy=make(policy)), Predictor(), 0.0
    spent: dict[str, list[float]] = {"submit": [], "decide": [], "predict": []}
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
        booked = time.perf_counter()
        if number < jobs and number % 500:
            continue
        snapshot, keys = books.snapshot(now)
        predictor.submit(snapshot, keys)
        predicted = time.perf_counter()
        orders = books.decide(now)
        decided = time.perf_counter()
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
            assert job.id == number + 1
    return {"jobs": jobs, "policy": policy, "gpus": gpus} | {
        name: percentiles(values) for name, values in spent.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for jobs in (1000, 10_000):
        for policy in ("fifo", "srsf"):
            print(f"{jobs} jobs, {policy}", file=sys.stderr)
            rows.append(measure(jobs, policy, 64, arguments.seed))
    print(json.dumps(rows) if arguments.json else "\n".join(map(str, rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
