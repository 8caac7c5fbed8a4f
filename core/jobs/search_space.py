"""What the preference solver searches: parametrisations of WFQ and their evaluation.

Two spaces. ``wfq`` is the chapter's (T, W, zeta) with the relaxation step delta as a fourth
variable. ``direct`` sets thresholds and weights themselves: more variables, better points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError, PolicyError
from intentd.core.jobs.allocator import JobTable
from intentd.core.jobs.metrics import Measured, Objective
from intentd.core.jobs.policy import FREE, Costs, JobsPolicy, wfq
from intentd.core.sim.jobs import Failure, Options, simulate

Array = NDArray[np.float64]
SPACES: Final = ("wfq", "direct")
MAX_W: Final = 3.0
DIRECT_CLASSES: Final = 6


class Space(Protocol):
    """A box of real variables and the policy each point means."""

    name: str
    lower: Array
    upper: Array

    def policy(self, x: Array) -> JobsPolicy: ...

    def seeds(self) -> list[Array]:
        """Points every search should start from: the extremes of section 3.3.1."""
        ...


class WfqSpace:
    """(T, W, zeta, delta) over a sample of sizes; the box is the artifact's."""

    name = "wfq"

    def __init__(self, sizes: Array, integral: bool = True) -> None:
        self.sizes = np.sort(sizes)
        counts = np.arange(1, len(sizes) + 1)
        mean = np.cumsum(self.sizes) / counts
        variation = np.cumsum(self.sizes**2) / counts / mean**2 - 1
        self.integral = integral
        self.lower = np.array([0.001, -MAX_W, 0.0, 0.01])
        self.upper = np.array([float(variation.max()) + 1.0, MAX_W, 1.0, 0.9])

    def policy(self, x: Array) -> JobsPolicy:
        T, W, zeta, delta = (float(value) for value in x)  # noqa: N806  # the chapter's symbols
        return wfq(self.sizes, T=T, W=W, zeta=zeta, delta=delta, integral=self.integral)

    def seeds(self) -> list[Array]:
        return [np.array([self.upper[0], 0.0, 0.0, 0.1])]  # one class, no cap: FIFO


class DirectSpace:
    """Thresholds and weights themselves, up to DIRECT_CLASSES classes.

    Variables: the number of classes; the gaps between cuts as shares of the log range of sizes
    (sizes are heavy-tailed, so that equal steps are ratios); one log weight a class, added to the
    class's share of the offered work, because what matters is a class's share against its load;
    zeta; delta.
    """

    name = "direct"

    def __init__(self, sizes: Array, integral: bool = True, classes: int = DIRECT_CLASSES) -> None:
        self.sizes = np.sort(sizes)
        self.integral = integral
        self.classes = classes
        low, high = np.log(self.sizes[0]), np.log(self.sizes[-1])
        self._low, self._span = float(low), float(max(high - low, 1e-9))
        self._work = np.cumsum(self.sizes)
        cuts = classes - 1
        self.lower = np.array([1.0, *[0.0] * cuts, *[-6.0] * classes, 0.0, 0.01])
        self.upper = np.array([classes + 0.999, *[1.0] * cuts, *[6.0] * classes, 1.0, 0.9])

    def policy(self, x: Array) -> JobsPolicy:
        count = int(x[0])
        picked = np.linspace(0, self.classes - 2, count - 1).round().astype(int)
        cuts = np.sort(x[1 : self.classes])[picked]
        limits: list[float] = []
        for value in np.exp(self._low + self._span * cuts).tolist():
            if not limits or value > limits[-1] * (1 + 1e-9):
                limits.append(value)
        limits.append(math.inf)
        weights = self._loads(limits) * np.exp(x[self.classes : self.classes + len(limits)])
        return JobsPolicy(
            "wfq",
            tuple(limits),
            tuple(np.maximum(weights / weights.max(), 1e-9).tolist()),
            zeta=float(x[-2]),
            delta=float(x[-1]),
            integral=self.integral,
            origin={"space": self.name},
        )

    def _loads(self, limits: Sequence[float]) -> Array:
        """Share of the offered work in each class, none below a thousandth."""
        ends = np.searchsorted(self.sizes, limits, side="right")
        totals = np.concatenate([[0.0], self._work])[ends]
        share = np.diff(totals, prepend=0.0) / self._work[-1]
        return np.asarray(np.maximum(share, 1e-3))

    def point(self, policy: JobsPolicy) -> Array:
        """The nearest point to a policy of at most as many classes (for a warm start)."""
        limits = [float(value) for value in policy.thresholds_gpu_s[:-1]]
        weights = np.array(policy.weights)
        while len(limits) > self.classes - 1:  # join the two neighbours closest in ratio
            at = int(np.argmin(np.diff(np.log(limits))))
            limits.pop(at)
            weights = np.concatenate(
                [weights[:at], [weights[at] + weights[at + 1]], weights[at + 2 :]]
            )
        x = np.zeros(len(self.lower))
        x[0] = len(limits) + 1.5
        if limits:
            places = np.clip((np.log(limits) - self._low) / self._span, 0.0, 1.0)
            slots = np.linspace(0, self.classes - 2, len(limits)).round().astype(int)
            x[1 : self.classes] = np.interp(np.arange(self.classes - 1), slots, places)
        ratio = np.log(weights / self._loads([*limits, math.inf]))
        ratio -= ratio.mean()
        x[self.classes : self.classes + len(ratio)] = ratio
        x[-2:] = policy.zeta, policy.delta
        return np.clip(x, self.lower, self.upper)

    def seeds(self) -> list[Array]:
        """FIFO, and a sweep of the chapter's own parametrisation."""
        points = [self.point(JobsPolicy("wfq", zeta=0.0, integral=self.integral))]
        chapter = WfqSpace(self.sizes, self.integral)
        for level in (0.05, 0.2, 0.5, 1.0, 2.0):
            limit = min(level, float(chapter.upper[0]))
            for steep in (-1.0, 0.0, 0.7, 1.5):
                for zeta in (0.0, 0.7):
                    x = np.array([limit, steep, zeta, 0.1])
                    points.append(self.point(chapter.policy(x)))
        return points


def make_space(name: str, sizes: Array, *, integral: bool = True) -> WfqSpace | DirectSpace:
    if name not in SPACES:
        raise InputError("space", name, f"one of {', '.join(SPACES)}")
    return WfqSpace(sizes, integral) if name == "wfq" else DirectSpace(sizes, integral)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Objectives of a policy, averaged over histories. Pure; sent to worker processes whole.

    predictions: share of the jobs predicted (histories of many thousand jobs need no more).
    """

    histories: tuple[JobTable, ...]
    gpus: float
    objectives: tuple[Objective, ...]
    costs: Costs = FREE
    predictions: float = 1.0
    artifact: bool = False
    failures: tuple[Failure, ...] = ()

    def __call__(self, policy: JobsPolicy) -> tuple[float, ...]:
        """One value an objective; infinite where the policy cannot be made."""
        totals = np.zeros(len(self.objectives))
        for index, history in enumerate(self.histories):
            totals += self.values(policy, history, index)
        return tuple((totals / len(self.histories)).tolist())

    def values(self, policy: JobsPolicy, history: JobTable, seed: int = 0) -> Array:
        options = Options(
            predictions=self.predictions,
            seed=seed,
            costs=self.costs,
            artifact=self.artifact,
            failures=self.failures,
        )
        measured: Measured = simulate(history, policy, self.gpus, options).measured
        return np.array([objective.of(measured) for objective in self.objectives])


def evaluate_point(evaluate: Evaluator, make: Callable[[Array], JobsPolicy], x: Array) -> Array:
    """Objectives of one point; a point that means no valid policy is infinitely bad."""
    try:
        return np.array(evaluate(make(x)))
    except PolicyError:
        return np.full(len(evaluate.objectives), math.inf)


def nondominated(values: Array) -> NDArray[np.int64]:
    """Indices of the rows no other row beats, the first of equals; smaller is better."""
    order = np.lexsort(values.T[::-1])
    kept: list[int] = []
    front = np.empty_like(values)  # the rows of kept
    best = math.inf
    for i in order.tolist():
        row = values[i]
        if not np.isfinite(row).all():
            continue
        if len(row) == 2:  # sorted by the first, so that the second alone decides
            if row[1] >= best:
                continue
            best = float(row[1])
        elif (front[: len(kept)] <= row).all(axis=1).any():
            continue
        front[len(kept)] = row
        kept.append(i)
    return np.array(kept, dtype=np.int64)


def hypervolume(values: Array, reference: Sequence[float]) -> float:
    """Area dominated by two-objective rows up to a reference point."""
    if values.ndim != 2 or values.shape[1] != 2:
        raise InputError("objectives", values.shape, "two objectives")
    inside = values[np.all(values < np.asarray(reference), axis=1)]
    if len(inside) == 0:
        return 0.0
    front = inside[nondominated(inside)]
    front = front[np.argsort(front[:, 0])]
    right = np.append(front[1:, 0], reference[0])
    return float(np.sum((right - front[:, 0]) * (reference[1] - front[:, 1])))
