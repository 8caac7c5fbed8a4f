"""Pareto fronts beside the published configurations: on whole traces, and on the held-out half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pcs_published import GPUS
from intentd.controller.search import histories
from intentd.controller.search.solver import Budget, PreferenceSolver
from intentd.core.jobs.allocator import JobTable
from intentd.core.jobs.metrics import parse_objectives
from intentd.core.jobs.policy import JobsPolicy, make
from intentd.core.jobs.search_space import Evaluator, hypervolume, nondominated
from intentd.core.sim.jobs import Options, simulate

Array = NDArray[np.float64]
WORKERS = 2
TAIL = parse_objectives("jct:avg,prederr:avg,prederr:p99")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WholeFront:
    """A front found on a whole trace, as the published configurations were.

    rows: JCT over AFS, average and p99 error in percent, exact, by JCT; policies: in that order.
    """

    rows: Array
    policies: list[JobsPolicy]
    wall_s: float

    def passing(self, point: tuple[float, float, float]) -> Array | None:
        """The row of least error with neither more JCT nor more average error than a point."""
        good = self.rows[(self.rows[:, 0] <= point[0]) & (self.rows[:, 1] <= point[1])]
        return good[np.argmin(good[:, 1])] if len(good) else None


def whole(jobs: JobTable, evaluations: int, say: Say) -> WholeFront:
    """Fractions of GPUs, half of the evaluations in (T, W, zeta, delta), then from there in
    ``direct``; up to 4 times AFS. Long traces are predicted in part while searching, for
    time (500 jobs); the front's points are then measured with 5,000."""
    base = float(
        simulate(jobs, make("afs", integral=False), GPUS, Options(predictions=0, artifact=True))
        .measured.jct_s.mean()
    )  # fmt: skip
    share = 1.0 if len(jobs) < 3000 else 500 / len(jobs)
    solver = PreferenceSolver(GPUS, (jobs,), integral=False, predictions=share)
    start = solver.update_pareto_front(
        space="wfq", budget=Budget(max(1, evaluations // 2)), workers=WORKERS
    )
    near = [p.policy for p in start.front if p.train["jct:avg"] / base < 4]
    result = solver.update_pareto_front(
        budget=Budget(max(1, evaluations - evaluations // 2)), workers=WORKERS,
        warm=near[:: max(1, len(near) // 60)],
    )  # fmt: skip
    wall_s = start.wall_s + result.wall_s
    found = [
        (p.train["jct:avg"], p.train["prederr:avg"], p.policy)
        for p in (*start.front, *result.front)
        if p.train["jct:avg"] / base < 4
    ] or [(p.train["jct:avg"], p.train["prederr:avg"], p.policy) for p in result.front]
    kept = nondominated(np.array([row[:2] for row in found])).tolist()
    kept = kept[:: max(1, len(kept) // 80)]
    exact = Evaluator((jobs,), GPUS, TAIL, artifact=True, predictions=min(1.0, 5000 / len(jobs)))
    rows = []
    for index in kept:
        jct, error, tail = exact(found[index][2])
        rows.append((jct / base, error, tail))
    say(f"front of {len(kept)} points, {wall_s:.0f} s of search")
    order = sorted(range(len(rows)), key=lambda index: rows[index])
    return WholeFront(
        np.array([rows[index] for index in order]),
        [found[kept[index]][2] for index in order],
        wall_s,
    )


def held_out(jobs: JobTable, evaluations: int, say: Say, *, predictions: float) -> dict[str, Any]:
    """Searched on resamples of the first half, measured on the second: ours beside the stand-ins
    (T, W, zeta, delta), same histories and seed. Ours goes on from the stand-ins in ``direct`` and
    keeps those of them that it does not beat in every one of eight further resamples of the first
    half (``--space both``).

    predictions: share of the jobs predicted while searching. dominated: of our points, by a
    stand-in in (average JCT, average error), of all and of those on the measured front; direct:
    the same without the stand-ins that were kept.
    """
    split = histories.of_trace(jobs, jobs=1000, seed=1, samples=3)
    tail = Evaluator(split.test, GPUS, TAIL, predictions=min(1.0, 1500 / len(split.test[0])))
    solver = PreferenceSolver(GPUS, split.train, predictions=predictions, judge=split.judge)
    known = solver.update_pareto_front(
        space="wfq", budget=Budget(evaluations), workers=WORKERS
    )  # fmt: skip
    stand_ins = _thinned([point.policy for point in known.front])
    say(f"stand-ins: {len(known.front)} points, {known.wall_s:.0f} s")
    result = solver.update_pareto_front(
        budget=Budget(evaluations), workers=WORKERS, warm=stand_ins
    )  # fmt: skip
    say(f"direct: {len(result.front)} points, {result.wall_s:.0f} s")
    kept = [point.policy for point in result.front if not point.x]
    theirs, mine, again = (
        np.array([tail(policy) for policy in policies]).reshape(-1, len(TAIL))
        for policies in (
            stand_ins,
            _thinned([point.policy for point in result.front if point.x]),
            kept,
        )
    )
    ours = np.vstack([mine, again])
    low = np.minimum(ours[:, :2].min(axis=0), theirs[:, :2].min(axis=0))
    high = np.maximum(ours[:, :2].max(axis=0), theirs[:, :2].max(axis=0))
    areas = {
        name: hypervolume((rows[:, :2] - low) / (high - low), (1.1, 1.1))
        for name, rows in (("stand_ins", theirs), ("direct", mine), ("ours", ours))
    }
    found: dict[str, Any] = {
        "predictions": predictions,
        "stand_ins_kept": len(kept),
        "stand_ins_points": len(theirs),
        "hypervolume": areas,
        "stand_ins": theirs[nondominated(theirs[:, :2])].tolist(),
    }
    for name, rows in (("ours", ours), ("direct", mine)):
        best = rows[nondominated(rows[:, :2])]
        found[name] = best.tolist()
        found[f"{name}_points"] = len(rows)
        found[f"{name}_dominated"] = sum(dominated(row, theirs) for row in rows)
        found[f"{name}_front_points"] = len(best)
        found[f"{name}_front_dominated"] = sum(dominated(row, theirs) for row in best)
    return found


def _thinned(policies: list[JobsPolicy]) -> list[JobsPolicy]:
    return policies[:: max(1, len(policies) // 40)]


def dominated(row: Array, others: Array) -> bool:
    """Is some other row at most as large in both of the first columns, and less in one?"""
    below = (others[:, :2] <= row[:2]).all(axis=1) & (others[:, :2] < row[:2]).any(axis=1)
    return bool(below.any())
