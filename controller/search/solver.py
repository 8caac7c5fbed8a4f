"""The preference solver (dissertation, section 3.3.3): Pareto-optimal WFQ configurations.

An evolutionary algorithm of pymoo proposes points by ask and tell; a pool evaluates them on
resampled training histories; the front is taken from everything ever evaluated, not from the last
population; then it is measured on a test history the search never saw.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.spea2 import SPEA2
from pymoo.core.evaluator import Evaluator as PymooEvaluator
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.problems.static import StaticProblem

from intentd.controller.search.pool import Pool, open_pool
from intentd.core.errors import InputError
from intentd.core.jobs.allocator import JobTable
from intentd.core.jobs.metrics import Objective
from intentd.core.jobs.policy import FREE, Costs, JobsPolicy, from_plain, to_plain
from intentd.core.jobs.search_space import (
    DirectSpace,
    Evaluator,
    Space,
    make_space,
    nondominated,
)
from intentd.core.sim.failures import to_plain as failures_to_plain
from intentd.core.sim.jobs import Failure

Array = NDArray[np.float64]
ALGORITHMS: Final = ("spea2", "nsga2")
POPULATION: Final = 70  # and 105 offspring: the artifact's setting
OFFSPRING: Final = 105
BOTH: Final = "both"
FAR: Final = 1e12  # stands for infinity inside the library, which divides by ranges


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: after so many evaluations or seconds, whichever is first, looked at between
    batches; the first batch is always evaluated."""

    evaluations: int = 1000
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.evaluations <= 10_000_000:
            raise InputError("evaluations", self.evaluations, "1 to 10000000 evaluations")
        if self.seconds is not None and not self.seconds > 0:
            raise InputError("seconds", self.seconds, "a number of seconds > 0")


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One Pareto-optimal configuration: its policy, its point, its objectives on both sides."""

    policy: JobsPolicy
    x: tuple[float, ...]
    train: dict[str, float]
    test: dict[str, float]

    def to_plain(self) -> dict[str, Any]:
        return {
            "config": to_plain(self.policy),
            "x": list(self.x),
            "train": self.train,
            "test": self.test,
        }


@dataclass(slots=True)
class Search:
    """What a search found and all it takes to run it again."""

    front: list[FrontPoint]
    evaluations: int
    wall_s: float
    settings: dict[str, Any]
    cancelled: bool = False
    values: Array = field(default_factory=lambda: np.zeros((0, 2)))  # everything evaluated
    points: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def to_plain(self) -> dict[str, Any]:
        return {
            "front": [point.to_plain() for point in self.front],
            "evaluations": self.evaluations,
            "wall_s": self.wall_s,
            "cancelled": self.cancelled,
            "settings": self.settings,
        }


# done, total, objectives of the best so far -> go on?
Progress = Callable[[int, int, Array], bool]


class PreferenceSolver:
    """The interface of section 3.3.2: SetPreference, UpdateParetoFront (SetWFQConfig: the
    controller, ``jobs_app``).

    gpus: the cluster. train, test: histories; the objectives are averaged over the training ones.
    judge: histories by which a new point replaces one of a warm start (the training ones if none).
    """

    def __init__(
        self,
        gpus: float,
        train: Sequence[JobTable],
        test: Sequence[JobTable] = (),
        *,
        costs: Costs = FREE,
        integral: bool = True,
        predictions: float = 1.0,
        judge: Sequence[JobTable] = (),
        failures: Sequence[Failure] = (),
    ) -> None:
        if not train:
            raise InputError("history", 0, "at least one training history")
        self.gpus, self.train, self.test = gpus, tuple(train), tuple(test)
        self.judge = tuple(judge) or self.train
        self.costs, self.integral, self.predictions = costs, integral, predictions
        self.failures = tuple(failures)
        self.objectives: tuple[Objective, ...] = (Objective("jct"), Objective("prederr"))
        self.front: list[FrontPoint] = []

    def set_preference(self, objectives: Sequence[Objective]) -> None:
        """SetPreference: two or more (metric, measure) pairs."""
        if len(objectives) < 2:
            raise InputError("objectives", len(objectives), "two or more")
        self.objectives = tuple(objectives)

    def update_pareto_front(
        self,
        *,
        algorithm: str = "spea2",
        space: str = "direct",
        budget: Budget | None = None,
        seed: int = 1,
        workers: int | None = None,
        ray: str | None = None,
        warm: Sequence[JobsPolicy] = (),
        progress: Progress | None = None,
    ) -> Search:
        """UpdateParetoFront: searches, keeps the front, returns it with its story.

        warm: configurations to start from, such as the last front; they are candidates of the new
        one as they are. space: "both" searches ``wfq`` with half of the budget and ``direct`` from
        there with the rest. progress: called after each batch; returning False cancels, and what
        was found so far is returned.
        """
        if algorithm not in ALGORITHMS:
            raise InputError("algorithm", algorithm, f"one of {', '.join(ALGORITHMS)}")
        begin = time.perf_counter()
        budget = budget or Budget()
        if space == BOTH:
            return self._both(algorithm, budget, seed, workers, ray, warm, progress)
        sizes = np.concatenate([history.sizes_gpu_s for history in self.train])
        chosen = make_space(space, sizes, integral=self.integral)
        sides = [side for side in (self.train, self.test) if side]
        evaluators = [
            Evaluator(
                side,
                self.gpus,
                self.objectives,
                self.costs,
                self.predictions,
                failures=self.failures,
            )
            for side in (*sides, *((history,) for history in self.judge))
        ]
        pool = open_pool(evaluators, chosen, workers=workers, ray=ray)
        try:
            points, values, cancelled = _evolve(
                _algorithm(algorithm, seed), chosen, len(self.objectives), pool, budget,
                starts=_starts(chosen, warm), seed=seed, progress=progress, begin=begin,
            )  # fmt: skip
            self.front = self._measured(chosen, points, values, warm, pool)
        finally:
            pool.close()
        settings = {
            "algorithm": algorithm,
            "space": space,
            "objectives": [objective.name for objective in self.objectives],
            "gpus": self.gpus,
            "evaluations": budget.evaluations,
            "seconds": budget.seconds,
            "seed": seed,
            "workers": workers,
            "ray": ray,
            "warm": [to_plain(policy) for policy in warm],
            "population": POPULATION,
            "offspring": OFFSPRING,
            "integral": self.integral,
            "predictions": self.predictions,
            "costs": {name: getattr(self.costs, name) for name in Costs.__slots__},
            "failures": failures_to_plain(self.failures),
            "train": [len(history) for history in self.train],
            "test": [len(history) for history in self.test],
        }
        wall_s = time.perf_counter() - begin
        return Search(self.front, len(values), wall_s, settings, cancelled, values, points)

    def _both(
        self,
        algorithm: str,
        budget: Budget,
        seed: int,
        workers: int | None,
        ray: str | None,
        warm: Sequence[JobsPolicy],
        progress: Progress | None,
    ) -> Search:
        """(T, W, zeta, delta) first, from where thresholds and weights go on."""
        begin, total = time.perf_counter(), budget.evaluations
        done = 0

        def onward(more: int, _total: int, values: Array) -> bool:
            return progress is None or progress(done + more, total, values)

        def part(space: str, evaluations: int, share: float, start: Sequence[JobsPolicy]) -> Search:
            seconds = None if budget.seconds is None else share * budget.seconds
            return self.update_pareto_front(
                algorithm=algorithm, space=space, budget=Budget(evaluations, seconds), seed=seed,
                workers=workers, ray=ray, warm=start, progress=onward,
            )  # fmt: skip

        first = part("wfq", max(1, total // 2), 0.5, warm)
        done = first.evaluations
        result = first
        if not first.cancelled and done < total:
            result = part("direct", total - done, 0.5, [point.policy for point in first.front])
            result.evaluations += done
        result.wall_s = time.perf_counter() - begin
        result.settings |= {"space": BOTH, "evaluations": total, "seconds": budget.seconds}
        result.settings["warm"] = [to_plain(policy) for policy in warm]
        return result

    def _measured(
        self, space: Space, points: Array, values: Array, warm: Sequence[JobsPolicy], pool: Pool
    ) -> list[FrontPoint]:
        """The front of what was evaluated, and the warm configurations that stand beside it.

        Two searches' points mostly differ by less than resampling a history moves them, so that
        choosing by their means fits the sample: a point gives way to one of the other group only
        where that is better in every one of the histories kept for it.
        """
        names = [objective.name for objective in self.objectives]
        best = nondominated(values)
        found = [space.policy(points[index]) for index in best]
        places = [tuple(points[index].tolist()) for index in best]
        means = [values[index] for index in best]
        known = [policy for policy in warm if self._fits(policy)]
        if known:
            first = 2 if self.test else 1
            each = [pool.map([*found, *known], first + at) for at in range(len(self.judge))]
            kept = _unbeaten(np.array(each), len(found))
            means = [*means, *pool.map(known)]
            found, places = [*found, *known], [*places, *[()] * len(known)]
            found = [found[at] for at in kept]
            places = [places[at] for at in kept]
            means = [means[at] for at in kept]
        tests: list[Array] = [np.zeros(0)] * len(found)
        if self.test:
            tests = pool.map(found, 1)
        return [
            FrontPoint(
                policy,
                place,
                dict(zip(names, mean.tolist(), strict=True)),
                dict(zip(names, test.tolist(), strict=True)) if self.test else {},
            )
            for policy, place, mean, test in zip(found, places, means, tests, strict=True)
        ]

    def _fits(self, policy: JobsPolicy) -> bool:
        return policy.name == "wfq" and policy.integral == self.integral


def _unbeaten(values: Array, first: int) -> list[int]:
    """Of two groups, the first so many and the others: who is not dominated by one of the other
    group in every history. values: (histories, candidates, objectives)."""
    finite = [bool(np.isfinite(values[:, at]).all()) for at in range(values.shape[1])]
    kept = []
    for at in range(values.shape[1]):
        mine = values[:, at : at + 1]
        below = np.any(values < mine, axis=(0, 2))
        beats: list[bool] = np.logical_and(np.all(values <= mine, axis=(0, 2)), below).tolist()
        others = slice(first, None) if at < first else slice(0, first)
        if finite[at] and not any(beats[others]):
            kept.append(at)
    return kept


def _algorithm(name: str, seed: int) -> Any:
    operators = {
        "crossover": SBX(prob=1.0, eta=20),
        "mutation": PM(eta=20),
        "n_offsprings": OFFSPRING,
        "pop_size": POPULATION,
    }
    return SPEA2(**operators) if name == "spea2" else NSGA2(**operators)


def _starts(space: Space, warm: Sequence[JobsPolicy]) -> list[Array]:
    """Points of the first population that are not random: warm configurations, then extremes."""
    starts: list[Array] = []
    for policy in warm:
        if isinstance(space, DirectSpace) and policy.name == "wfq":
            starts.append(space.point(policy))
        elif {"T", "W"} <= set(policy.origin) and not isinstance(policy.origin["W"], dict):
            x = np.array([policy.origin["T"], policy.origin["W"], policy.zeta, policy.delta])
            starts.append(np.clip(x, space.lower, space.upper))
    return [*starts, *space.seeds()][:POPULATION]


def _evolve(
    algorithm: Any,
    space: Space,
    objectives: int,
    pool: Pool,
    budget: Budget,
    *,
    starts: list[Array],
    seed: int,
    progress: Progress | None,
    begin: float,
) -> tuple[Array, Array, bool]:
    """Every evaluated point with its values, and whether the search was cancelled."""
    problem = Problem(n_var=len(space.lower), n_obj=objectives, xl=space.lower, xu=space.upper)
    rng = np.random.default_rng(seed)
    count = min(POPULATION, budget.evaluations)
    random = rng.uniform(space.lower, space.upper, (max(0, count - len(starts)), len(space.lower)))
    first = np.array([*starts[:count], *random])
    algorithm.initialization.sampling = Population.new("X", first)
    algorithm.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
    points: list[Array] = []
    values: list[Array] = []
    cancelled = False
    while len(values) < budget.evaluations:
        if values and budget.seconds is not None and time.perf_counter() - begin > budget.seconds:
            break
        asked = algorithm.ask()
        proposed = np.asarray(asked.get("X"), dtype=np.float64)
        room = budget.evaluations - len(values)
        results = pool.map(list(proposed[:room]))
        points.extend(proposed[:room])
        values.extend(results)
        known = np.nan_to_num(np.array(results), posinf=FAR, nan=FAR)
        if len(known) < len(proposed):  # the last, cut batch: the algorithm need not learn of it
            break
        PymooEvaluator().eval(StaticProblem(problem, F=known), asked)
        with np.errstate(invalid="ignore", divide="ignore"):  # a front of no extent is normalised
            algorithm.tell(infills=asked)
        if progress is not None and not progress(len(values), budget.evaluations, np.array(values)):
            cancelled = True
            break
    return np.array(points), np.array(values), cancelled


def read_front(plain: object, where: str = "front") -> list[FrontPoint]:
    """The front of a search document (untrusted). Raises InputError."""
    rows = plain.get("front") if isinstance(plain, dict) else None
    if not isinstance(rows, list):
        raise InputError(where, type(plain).__name__, 'a search result with a list "front"')
    front: list[FrontPoint] = []
    for index, row in enumerate(rows):
        at = f"{where}[{index}]"
        if not isinstance(row, dict) or not isinstance(row.get("train"), dict):
            raise InputError(at, row, "a point with config, train and test")
        policy = from_plain(row.get("config"), f"{at}.config")
        point = row.get("x", [])
        if not isinstance(point, list):
            raise InputError(f"{at}.x", point, "a list of numbers")
        x = tuple(_figure(value, f"{at}.x[{n}]") for n, value in enumerate(point))
        train = _figures(row["train"], f"{at}.train")
        test = _figures(row.get("test") or {}, f"{at}.test")
        if list(train) != list(front[0].train if front else train) or len(train) < 2:
            raise InputError(f"{at}.train", list(train), "two or more objectives, as other points")
        if test and set(test) != set(train):
            raise InputError(f"{at}.test", list(test), "the objectives of train")
        front.append(FrontPoint(policy, x, train, test))
    return front


def _figures(value: object, where: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise InputError(where, value, "a table of objectives")
    return {str(name): _figure(figure, f"{where}.{name}") for name, figure in value.items()}


def _figure(value: object, where: str) -> float:
    """null stands for infinity, which JSON lacks."""
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(where, value, "a number")
    if not abs(value) <= sys.float_info.max:
        raise InputError(where, value, "a finite number")
    return float(value)
