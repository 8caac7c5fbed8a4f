"""The GPU scheduler's simulator, predictor and search: time, and the published figures.

    python -m benchmarks.jobs [--quick] [--only speed,published,...] --json

Without the shared traces (INTENTD_DATA, or ../shared/data) the parts that need them are skipped
and say so. Each part prints its progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import pcs_development, pcs_fronts, pcs_published
from benchmarks.pcs_published import AFS_JCT_S, GPUS, POINTS, POLICIES, TRACES
from intentd.controller.search import histories
from intentd.controller.search.solver import Budget, PreferenceSolver
from intentd.core.jobs import allocator
from intentd.core.jobs.allocator import JobTable, Progress
from intentd.core.jobs.policy import JobsPolicy, make, wfq
from intentd.core.jobs.predictor import Predictor, replay
from intentd.core.jobs.search_space import hypervolume
from intentd.core.jobs.workloads import synthetic
from intentd.core.sim.jobs import Options, Snapshot, simulate

EVALUATIONS = 1000  # of a search, unless --evaluations says otherwise
CHOSEN = list(TRACES)  # unless --traces says otherwise
MODERATE = {"T": 0.5, "W": 0.7, "zeta": 0.5, "delta": 0.1}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load(name: str) -> JobTable:
    data = pcs_published.directory()
    assert data is not None
    return pcs_published.load(name, data)


def traces(quick: bool) -> list[str]:
    """The traces asked for; one of them is enough to see that a part works."""
    return CHOSEN[:1] if quick else CHOSEN


def best_of(action: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def speed(quick: bool) -> dict[str, Any]:
    """Seconds of a simulation with every job predicted, and of one prediction."""
    rounds = 3 if quick else 15
    found: dict[str, Any] = {}
    for jobs, gpus in ((1000, 64), (1024, 1024)):
        table = synthetic("workload-1", jobs=jobs, load=0.8, gpus=gpus, seed=1)
        for policy in (make("fifo"), make("srsf"), wfq(table.sizes_gpu_s, **MODERATE)):
            key = f"{jobs}_jobs_{gpus}_gpus_{policy.name}_s"
            found[key] = best_of(lambda p=policy, t=table, g=gpus: simulate(t, p, g), rounds)
            say(f"{key} {found[key]:.4f}")
    table = synthetic("workload-1", jobs=1000, load=0.8, gpus=64, seed=1)
    small = Options(predictions=0.05)
    fast = best_of(lambda: simulate(table, make("srsf"), 64, small), rounds)
    slow_options = Options(predictions=0.05, backend="reference")
    slow = best_of(lambda: simulate(table, make("srsf"), 64, slow_options), 1)
    found["reference_over_compiled"] = slow / fast
    waiting = synthetic("workload-1", jobs=1000, load=1e9, gpus=64, seed=1)
    snapshot = Snapshot(
        waiting, Progress.fresh(waiting), 0.0, 64, wfq(waiting.sizes_gpu_s, **MODERATE)
    )
    times = []
    for _ in range(20 if quick else 300):
        begin = time.perf_counter()
        snapshot.play_out()
        times.append(time.perf_counter() - begin)
    keys = list(range(len(waiting)))
    whole = []
    for turn in range(20 if quick else 300):  # what the daemon does at a submission
        predictor = Predictor()
        predictor.submit(snapshot, [*keys[:-1], f"new {turn}"])
        begin = time.perf_counter()
        predictor.submit(snapshot, [*keys[:-1], "another"])
        whole.append(time.perf_counter() - begin)
    found["submission_1000_active_p50_s"] = float(np.percentile(whole, 50))
    found["submission_1000_active_p99_s"] = float(np.percentile(whole, 99))
    found["prediction_1000_active_p50_s"] = float(np.percentile(times, 50))
    found["prediction_1000_active_p99_s"] = float(np.percentile(times, 99))
    found["bars"] = {"1000_64_s": 0.005, "1024_1024_s": 0.06, "prediction_p99_s": 0.01}
    found["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def sampling_error(errors: np.ndarray, taken: int = 5000) -> float:
    """Standard error, in percent of the mean, of the authors' sample of 5,000 predicted jobs."""
    share = min(1.0, taken / len(errors))
    return float(100 * errors.std() * np.sqrt((1 - share) / taken) / errors.mean())


def published(quick: bool) -> dict[str, Any]:
    """The artifact setting on the full traces beside the published figures."""
    found: dict[str, Any] = {}
    for name in traces(quick):
        jobs, known = load(name), POLICIES[name]
        rows: dict[str, Any] = {}
        mean = 1.0
        for policy in ("afs", "srsf", "fifo"):
            options = Options(predictions=float(policy != "fifo"), artifact=True)
            result = simulate(jobs, make(policy, integral=False), GPUS, options)
            jct = float(result.measured.jct_s.mean())
            mean = jct if policy == "afs" else mean
            wanted, average, tail = known[policy]
            value = jct if policy == "afs" else jct / mean
            wanted = AFS_JCT_S[name] if policy == "afs" else wanted
            rows[policy] = {"value": value, "off_percent": 100 * (value / wanted - 1)}
            if policy != "fifo":
                errors = np.abs(result.measured.error_percent)
                rows[policy]["pred_err"] = float(errors.mean())
                rows[policy]["pred_err_off_percent"] = 100 * (float(errors.mean()) / average - 1)
                rows[policy]["pred_err_p99"] = float(np.percentile(errors, 99))
                rows[policy]["pred_err_p99_published"] = tail
                rows[policy]["sampling_error_percent"] = sampling_error(errors)
            say(f"{name} {policy} {rows[policy]}")
        found[name] = rows
    return found


def search(quick: bool) -> dict[str, Any]:
    """1,000 evaluations on workload-1: wall time, and hypervolume of both parametrisations."""
    evaluations, seeds = (200, 1) if quick else (EVALUATIONS, 3)
    found = histories.of_workload("workload-1", jobs=1000, load=0.8, gpus=64, seed=100, samples=3)
    rows = []
    for seed in range(1, seeds + 1):
        row: dict[str, Any] = {"seed": seed}
        fronts: dict[str, dict[str, np.ndarray]] = {}
        for space in ("wfq", "direct"):
            solver = PreferenceSolver(64, found.train, found.test)
            result = solver.update_pareto_front(
                space=space, seed=seed, budget=Budget(evaluations), workers=2
            )
            row[f"{space}_wall_s"] = result.wall_s
            fronts[space] = {
                side: np.array([list(getattr(p, side).values()) for p in result.front])
                for side in ("train", "test")
            }
            say(f"seed {seed} {space}: {result.wall_s:.1f} s, {len(result.front)} points")
        for side in ("train", "test"):
            both = np.vstack([fronts[space][side] for space in fronts])
            low = both.min(axis=0)
            corner = (0.5 * float(low[0]), 10.0)  # 1.5 times the best JCT, 10 % error
            for space in fronts:
                area = hypervolume(fronts[space][side] - low * (1, 0), corner)
                row[f"{space}_{side}_hypervolume"] = area / (corner[0] * corner[1])
            gain = row[f"direct_{side}_hypervolume"] / row[f"wfq_{side}_hypervolume"]
            row[f"direct_{side}_gain_percent"] = 100 * (gain - 1)
        rows.append(row)
    return {"evaluations": evaluations, "runs": rows, "bars": {"wall_s": 20, "gain_percent": 1}}


def fronts(quick: bool) -> dict[str, Any]:
    """Second half of each trace: our front and that of (T, W, zeta, delta), same search, seeds."""
    found: dict[str, Any] = {}
    for name in traces(quick):
        jobs = load(name)
        # with many jobs waiting a prediction takes long: a third of 3,000 jobs tells enough
        share = 1.0 if len(jobs) < 1000 else 1 / 3
        seen = pcs_fronts.held_out(jobs, 150 if quick else EVALUATIONS, say, predictions=share)
        found[name] = seen
        short = {key: value for key, value in seen.items() if not isinstance(value, list)}
        say(f"{name}: {short}")
    return found


def full_fronts(quick: bool) -> dict[str, Any]:
    """The artifact setting, whole traces: does our front pass the published points?"""
    found: dict[str, Any] = {}
    for name in [name for name in traces(quick) if name in POINTS]:
        jobs = load(name)
        front = pcs_fronts.whole(jobs, 100 if quick else EVALUATIONS, say)
        passed = {str(point): front.passing(point) for point in POINTS[name]}
        found[name] = {
            "front": front.rows.tolist(),
            "points": {key: None if row is None else row.tolist() for key, row in passed.items()},
        }
        say(f"{name}: {found[name]['points']} ({front.wall_s:.0f} s)")
    return found


def bounds_of(jobs: JobTable, policies: dict[str, JobsPolicy], name: str) -> dict[str, Any]:
    """P90 online by each policy: coverage, width, score; P50 by its error."""
    found: dict[str, Any] = {}
    options = Options(review_every=max(1, len(jobs) // 250))
    for key, policy in policies.items():
        seen = replay(jobs, simulate(jobs, policy, GPUS, options).outcome)
        fitted, plain = seen.median_errors()
        row: dict[str, Any] = {
            "coverage_percent": seen.coverage_percent,
            "thirds_percent": seen.thirds_percent,
            "median_width": seen.median_width,
            "mean_width": float(seen.widths.mean()),
            "interval_score": seen.interval_score,
            "p50_median_error_percent": fitted,
            "plain_median_error_percent": plain,
        }
        narrow = row["coverage_percent"] <= 92 or row["median_width"] <= 1.02
        row["holds"] = bool(
            row["coverage_percent"] >= 88
            and min(row["thirds_percent"]) >= 85
            and narrow
            and fitted <= plain + 1e-9
        )
        found[f"{name}_{key}"] = row
        say(f"{name} {key} {row}")
    return found


def coverage(quick: bool) -> dict[str, Any]:
    """P90 of four traces by SRSF and points of WFQ."""
    points = {
        "wfq1": (0.5, 0.5, 0.5, 0.1),
        "wfq2": (2, 1.0, 0.7, 0.2),
        "wfq3": (0.2, 0.3, 0.3, 0.1),
    }
    found: dict[str, Any] = {}
    for name in CHOSEN[-1:] if quick else CHOSEN:
        jobs = load(name)
        policies = {"srsf": make("srsf")}
        for key, (t, w, zeta, delta) in points.items():
            policies[key] = wfq(jobs.sizes_gpu_s, T=t, W=w, zeta=zeta, delta=delta)
        found |= bounds_of(jobs, policies, name)
    return found


def development(quick: bool) -> dict[str, Any]:
    """The same on workloads that are not the four traces: where constants are to be chosen."""
    data = pcs_published.directory()
    assert data is not None
    found: dict[str, Any] = {}
    tables = pcs_development.workloads(data)
    for name in list(tables)[:2] if quick else tables:
        found |= bounds_of(tables[name], pcs_development.policies(tables[name]), name)
    rows = list(found.values())
    return {
        "rows": found,
        "held": sum(row["holds"] for row in rows),
        "of": len(rows),
        "covered_less": sum(row["coverage_percent"] < 88 for row in rows),
        "a_third_less": sum(min(row["thirds_percent"]) < 85 for row in rows),
        "geometric_mean_score": float(
            np.exp(np.mean(np.log([row["interval_score"] + 0.02 for row in rows]))) - 0.02
        ),
    }


def errors(quick: bool) -> dict[str, Any]:
    """Figure 3.10: sizes known within +- 10, 30, 60 percent."""
    rows: dict[str, Any] = {}
    seeds = range(1 if quick else 5)
    for percent in (0, 10, 20, 30, 40, 50, 60):
        values: dict[str, list[float]] = {"wfq": [], "fifo": [], "jct": []}
        for seed in seeds:
            jobs = synthetic("workload-1", jobs=1000, load=0.8, gpus=64, seed=seed)
            afs = simulate(jobs, make("afs"), 64, Options(predictions=0)).measured.jct_s.mean()
            options = Options(error_percent=percent, seed=seed)
            seen = simulate(jobs, wfq(jobs.sizes_gpu_s, **MODERATE), 64, options).measured
            values["wfq"].append(float(np.abs(seen.error_percent).mean()))
            values["jct"].append(float(seen.jct_s.mean() / afs))
            fifo = simulate(jobs, make("fifo"), 64, options).measured
            values["fifo"].append(float(np.abs(fifo.error_percent).mean()))
        rows[str(percent)] = {
            "wfq_pred_err": float(np.mean(values["wfq"])),
            "fifo_pred_err": float(np.mean(values["fifo"])),
            "wfq_jct_over_afs_without_error": float(np.mean(values["jct"])),
        }
        say(f"+-{percent} %: {rows[str(percent)]}")
    return rows


PARTS: dict[str, tuple[Callable[[bool], dict[str, Any]], bool]] = {
    "speed": (speed, False),
    "published": (published, True),
    "search": (search, False),
    "fronts": (fronts, True),
    "full_fronts": (full_fronts, True),
    "coverage": (coverage, True),
    "development": (development, True),
    "errors": (errors, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small versions of everything")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--evaluations", type=int, default=EVALUATIONS, help="of each search")
    parser.add_argument("--traces", default=",".join(TRACES), help="some of them")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    globals()["EVALUATIONS"] = options.evaluations
    globals()["CHOSEN"] = options.traces.split(",")
    names = options.only.split(",")
    if unknown := set(CHOSEN) - set(TRACES):
        parser.error(f"--traces: unknown traces {', '.join(sorted(unknown))}")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only: unknown parts {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {"compiled": allocator.compiled_kernel() is not None}
    for name in names:
        part, needs_traces = PARTS[name]
        if needs_traces and pcs_published.directory() is None:
            report[name] = {"skipped": "no traces (set INTENTD_DATA)"}
            continue
        say(f"== {name}")
        report[name] = part(options.quick)
    print(json.dumps(report) if options.json else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
