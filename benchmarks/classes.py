"""Algorithm 1: how often 10,000 flow sizes give the right number of classes, how far the
thresholds of a million are from their limits, and how long a million take.

    python -m benchmarks.classes [--quick] [--seeds 500] --json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import Any

import numpy as np

from intentd.core.flows.classes import class_thresholds, fit_classes, sorted_sample
from intentd.core.flows.sampling import sample_sizes
from intentd.core.flows.workloads import WORKLOADS

# Thresholds in the limit of many samples, bytes (the last class is open).
LIMITS = {
    "data-mining": (5698, 64296, 1887902, 20692074, 511176249),
    "web-search": (275569, 19768499),
    "cache": (5890280,),
    "hadoop": (6768, 66937, 11753234),
    "uniform": (),
}
COUNT_BAR = 0.99
LIMIT_BAR = 0.10
SECONDS_BAR = 0.3
MILLION = 1_000_000


def study(name: str, seeds: int, sizes: tuple[int, ...] = (3_000, 10_000)) -> dict[str, Any]:
    cdf = WORKLOADS[name].cdf
    limits = LIMITS[name]
    right = {}
    for count in sizes:
        hits = 0
        for seed in range(seeds):
            sample = sorted_sample(sample_sizes(cdf, count, np.random.default_rng(seed)))
            hits += len(class_thresholds(sample)) == len(limits) + 1
        right[str(count)] = hits / seeds
    million = sample_sizes(cdf, MILLION, np.random.default_rng(seeds))
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        fit = fit_classes(million)
        taken.append(time.perf_counter() - started)
    found = [limit for limit in fit.thresholds_bytes if limit != math.inf]
    off = [a / b - 1.0 for a, b in zip(found, limits, strict=False)]
    same = len(found) == len(limits)
    return {
        "right_count": right,
        "thresholds_1e6": found,
        "limits": list(limits),
        "worst_off": max((abs(value) for value in off), default=0.0),
        "seconds_1e6": min(taken),
        "holds": right["10000"] >= COUNT_BAR
        and same
        and all(abs(value) <= LIMIT_BAR for value in off)
        and min(taken) < SECONDS_BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="50 seeds")
    parser.add_argument("--seeds", type=int, default=500)
    arguments = parser.parse_args()
    seeds = 50 if arguments.quick else arguments.seeds
    result: dict[str, Any] = {}
    for name in LIMITS:
        print(f"{name}: {seeds} seeds", file=sys.stderr, flush=True)
        result[name] = study(name, seeds)
    if arguments.json:
        print(json.dumps({"seeds": seeds, "workloads": result}))
        return
    for name, row in result.items():
        print(
            f"{name:<12} right count {row['right_count']}, thresholds at 10^6 off by at most "
            f"{row['worst_off']:.1%}, 10^6 in {row['seconds_1e6'] * 1e3:.0f} ms"
            f"{'' if row['holds'] else '  MISSED'}"
        )


if __name__ == "__main__":
    main()
