"""When a job will be done: P50 from the play-out, P90 calibrated online, and what-if.

The play-out (section 3.4) knows the present but not the future arrivals, so it errs towards too
early, by how much depends on policy, load and the job's size. The calibrator learns that from the
predictions it made: not only from jobs that ended, but from how far the unfinished ones have
slipped since, which is known at once. A job predicted to take p seconds that now is believed to
take J and has lived a seconds slips at s = (J - p) / a; if that goes on it takes p / (1 - s). The
bound is a local quantile of those factors (near in size, length and time) times a correction per
size class that moves after every hit and miss (adaptive conformal inference, Gibbs and Candes
2021), so that the share of jobs that keep their bound tends to the target whatever the workload
does. Coverage is counted and stated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from intentd.core.errors import InputError, StateError
from intentd.core.jobs.allocator import JobTable, Outcome
from intentd.core.sim.jobs import Snapshot

Array = NDArray[np.float64]
CLASSES: Final = 5
HELD: Final = 16384  # predictions kept for learning, at least
KEPT_ROWS: Final = 4096  # of these, kept over a restart
STRATIFIED: Final = 4000  # newest predictions whose verdicts say how the classes are covered
COMPARED: Final = 400  # newest predictions in which the median is compared with the play-out
COMPARED_EVERY: Final = 10  # ends after which it is


@dataclass(frozen=True, slots=True)
class Tuning:
    """How fast the calibrator learns. Chosen on workloads that are none of those reported
    (docs/jobs.md).

    window: predictions after which evidence has lost 63 % of its weight. near_size, near_length:
    e-foldings in size and predicted length after which it has. start: log factor before any
    evidence for the largest class; falls with the third power of the class, for large jobs are
    the ones that later arrivals delay. level: quantile of the local factors that is corrected.
    slip_max: no slip above this is extrapolated. settled: share of its life after which a job's
    slip counts as a result. least_life: share of its life before which its slip says nothing.
    step: of a class's correction per result, in units of the class's spread, which is least_unit
    or more; downwards a unit is at least the share ``shrink`` of the correction itself, so that
    bounds nobody misses halve in some thirty results. memory: verdicts of a class over which
    its coverage is taken; gain: how strongly its distance from the target moves the miss rate asked
    of the classes, at most to most_misses. nearer: the median replaces the play-out if its median
    error was below this share of the play-out's, in both halves of the newest predictions.
    """

    target: float = 0.9
    window: float = 350.0
    near_size: float = 0.5
    near_length: float = 0.7
    start: float = 1.0
    level: float = 0.85
    slip_max: float = 0.87
    settled: float = 0.5
    least_life: float = 0.1
    step: float = 0.25
    shrink: float = 0.2
    spread: float = 0.05
    least_unit: float = 0.005
    memory: float = 40.0
    gain: float = 4.0
    most_misses: float = 0.5
    nearer: float = 0.6


@dataclass(frozen=True, slots=True)
class Bounds:
    """A prediction's interval, in seconds from the moment it was made."""

    plain_s: float
    p50_s: float
    p90_s: float
    size_class: int
    coverage_percent: float  # of this class so far; NaN before the first result


class Calibrator:
    """Online P50 and P90 from plain predictions and what became of them.

    Call ``issue`` at a submission, ``review`` whenever the unfinished were played out anew,
    ``finished`` at an end. Memory is bounded: beyond twice HELD predictions the oldest are
    forgotten, whether they ended or not.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()
        rows = 2 * HELD
        self._submit, self._plain, self._believed = (np.zeros(rows) for _ in range(3))
        self._bound, self._size, self._length = (np.zeros(rows) for _ in range(3))
        self._base, self._median = np.ones(rows), np.ones(rows)
        self._done = np.zeros(rows, dtype=bool)
        self._counted = np.zeros(rows, dtype=bool)
        self._missed = np.zeros(rows, dtype=bool)
        self._class = np.zeros(rows, dtype=np.int64)
        self._keys: list[Hashable] = []
        self._row: dict[Hashable, int] = {}
        self._correction = self.tuning.start * np.linspace(0.0, 1.0, CLASSES) ** 3
        self._spread = np.full(CLASSES, self.tuning.spread)
        self._kept = np.zeros(CLASSES, dtype=np.int64)
        self._results = np.zeros(CLASSES, dtype=np.int64)
        self._median_helps, self._ended = False, 0

    def issue(self, key: Hashable, now_s: float, finish_s: float, size: float) -> Bounds:
        """Bounds of a new job whose play-out ends at finish_s. A key is used once."""
        if key in self._row:
            raise StateError(f"prediction of {key!r}: already issued")
        if not (math.isfinite(finish_s) and finish_s >= now_s and size > 0):
            raise InputError("prediction", finish_s, "a finite finish after now, and a size > 0")
        if len(self._keys) == 2 * HELD:
            self._forget()
        row = len(self._keys)
        plain = max(finish_s - now_s, 1e-9)
        factor, median, size_class = self._factors(now_s, plain, size)
        self._keys.append(key)
        self._row[key] = row
        self._submit[row], self._plain[row] = now_s, plain
        self._believed[row] = plain
        self._size[row], self._length[row] = math.log(size), math.log(plain)
        self._class[row], self._base[row], self._median[row] = size_class, factor, median
        self._done[row] = self._counted[row] = self._missed[row] = False
        bounds = self._bounds(plain, factor, median, size_class)
        self._bound[row] = bounds.p90_s
        return bounds

    def again(self, now_s: float, finish_s: float, size: float) -> Bounds:
        """Bounds for what is left of a job already predicted; not counted in the coverage."""
        plain = max(finish_s - now_s, 1e-9)
        return self._bounds(plain, *self._factors(now_s, plain, size))

    def review(self, now_s: float, finishes: Mapping[Hashable, float]) -> None:
        """What the unfinished jobs' play-outs say now (absolute seconds)."""
        rows, ends = [], []
        for key, finish_s in finishes.items():
            row = self._row.get(key)
            if row is not None and not self._done[row] and math.isfinite(finish_s):
                rows.append(row)
                ends.append(finish_s)
        self._reviewed(now_s, np.array(rows, dtype=np.int64), np.array(ends))

    def finished(self, key: Hashable, at_s: float) -> None:
        """The job ended."""
        row = self._row.get(key)
        if row is None or self._done[row]:
            return
        self._done[row] = True
        took = at_s - self._submit[row]
        self._believed[row] = took
        missed = bool(took > self._bound[row] * (1 + 1e-6))
        self._result(row, missed, took / self._plain[row])
        self._ended += 1
        if self._ended % COMPARED_EVERY == 0:
            self._compare_medians()

    def coverage(self) -> list[dict[str, float]]:
        """Per size class, smallest first: results so far and the share that kept its bound."""
        return [
            {
                "results": int(count),
                "kept_percent": 100.0 * float(kept) / count if count else math.nan,
            }
            for kept, count in zip(self._kept.tolist(), self._results.tolist(), strict=True)
        ]

    def state(self, rows: int = KEPT_ROWS) -> dict[str, Any]:
        """All it learned, of the newest predictions, as JSON-ready types; see ``restore``."""
        count = len(self._keys)
        first = max(0, count - rows)
        plain: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name in ("tuning", "_row"):
                continue
            if isinstance(value, np.ndarray):
                value = (value[first:count] if len(value) == 2 * HELD else value).tolist()
            elif isinstance(value, list):
                value = value[first:] if name == "_keys" else list(value)
            plain[name] = value
        return plain

    def restore(self, plain: object) -> bool:
        """Takes what ``state`` gave. False, and nothing changed, if it is another version's."""
        mine = set(vars(self)) - {"tuning", "_row"}
        if not isinstance(plain, Mapping) or set(plain) != mine:
            return False
        count = len(plain["_keys"])
        for name, kept in plain.items():
            value = getattr(self, name)
            if not isinstance(value, np.ndarray):
                setattr(self, name, list(kept) if isinstance(value, list) else type(value)(kept))
            elif len(value) == 2 * HELD:
                value[:count] = kept
            else:
                value[:] = kept
        self._row = {key: row for row, key in enumerate(self._keys)}
        return True

    def _bounds(self, plain: float, factor: float, median: float, size_class: int) -> Bounds:
        reach = max(1.0, factor * math.exp(float(self._correction[size_class])))
        middle = plain * (median if self._median_helps else 1.0)
        count = int(self._results[size_class])
        coverage = 100.0 * int(self._kept[size_class]) / count if count else math.nan
        return Bounds(plain, middle, max(plain * reach, middle), size_class, coverage)

    def _compare_medians(self) -> None:
        """The corrected median replaces the play-out only where it was clearly nearer lately: for
        the newest predictions with a verdict, by what is believed of them now. (The newest ends
        are of jobs that came long ago, perhaps before a burst was over.)"""
        count = len(self._keys)
        newest = np.arange(max(0, count - COMPARED), count)
        rows = newest[self._counted[newest]]
        helps = len(rows) >= COMPARED // 4
        for part in np.array_split(rows, 2) if helps else ():
            believed, plain = self._believed[part], self._plain[part]
            guess = plain * self._median[part]
            ours = float(np.median(np.abs(believed - guess) / guess))
            theirs = float(np.median(np.abs(believed - plain) / plain))
            helps = helps and ours < self.tuning.nearer * theirs
        self._median_helps = helps

    def _factors(self, now_s: float, plain: float, size: float) -> tuple[float, float, int]:
        """Local quantile and median of final over predicted length, and the size class."""
        tuning, count = self.tuning, len(self._keys)
        log_size = math.log(size)
        recent = self._size[max(0, count - 2000) : count]
        size_class = CLASSES // 2
        if count > 20:
            size_class = min(CLASSES - 1, int(CLASSES * np.mean(recent < log_size)))
        if count == 0:
            return 1.0, 1.0, size_class
        part = slice(max(0, count - int(4 * tuning.window)), count)
        believed, plain_then = self._believed[part], self._plain[part]
        lived = np.where(
            self._done[part], believed, np.minimum(now_s - self._submit[part], believed)
        )
        lived = np.maximum(lived, 1e-9)
        share = lived / np.maximum(believed, 1e-9)
        slip = (believed - plain_then) / lived
        distance = (
            np.abs(self._size[part] - log_size) / tuning.near_size
            + np.abs(self._length[part] - math.log(plain)) / tuning.near_length
            + np.arange(len(believed), 0, -1) / tuning.window
        )
        weight = np.exp(-distance) * share * (share > tuning.least_life)
        if weight.sum() <= 1e-12:
            return 1.0, 1.0, size_class
        slip = np.append(slip, 0.0)
        weight = np.append(weight, 0.05)  # a little belief in the play-out itself
        order = np.argsort(slip)
        total = np.cumsum(weight[order])
        at = np.searchsorted(total, np.array([tuning.level, 0.5]) * total[-1])
        level, middle = np.minimum(slip[order][np.minimum(at, len(slip) - 1)], tuning.slip_max)
        return 1 / (1 - float(level)), 1 / (1 - float(middle)), size_class

    def _reviewed(self, now_s: float, rows: NDArray[np.int64], ends_s: Array) -> None:
        submitted = self._submit[rows]
        believed = np.maximum(ends_s - submitted, now_s - submitted)
        self._believed[rows] = believed
        lived = np.maximum(np.minimum(now_s - submitted, believed), 1e-9)
        slip = np.minimum((believed - self._plain[rows]) / lived, self.tuning.slip_max)
        final = np.maximum(1 / (1 - slip), believed / self._plain[rows])
        bound = self._bound[rows] * (1 + 1e-6)
        over = believed > bound
        missed = over | (final * self._plain[rows] > bound)
        counted = self._counted[rows]
        settled = over | counted | (lived / believed > self.tuning.settled)
        changed = settled & ~(counted & (missed == self._missed[rows]))
        for at in np.nonzero(changed)[0].tolist():
            self._result(int(rows[at]), bool(missed[at]), float(final[at]))

    def _result(self, row: int, missed: bool, ratio: float) -> None:
        """Learns whether a bound held; where that was thought otherwise, unlearns it first."""
        tuning, size_class = self.tuning, int(self._class[row])
        correction = float(self._correction[size_class])
        unit = max(float(self._spread[size_class]), tuning.least_unit)
        if not missed:
            unit = max(unit, tuning.shrink * correction)
        if self._counted[row]:
            if missed == bool(self._missed[row]):
                return
            self._kept[size_class] += -1 if missed else 1
            correction += tuning.step * unit * (1 if missed else -1)
        else:
            self._results[size_class] += 1
            self._kept[size_class] += not missed
            off = abs(math.log(max(ratio, 1e-3) / self._base[row]))
            self._spread[size_class] += 0.03 * (off - self._spread[size_class])
            correction += tuning.step * unit * (missed - self._misses_allowed())
        self._counted[row], self._missed[row] = True, missed
        self._correction[size_class] = min(max(correction, -1.0), 2.0)

    def _misses_allowed(self) -> float:
        """Share of misses a class may have, so that all together have theirs.

        The coverage is the mean over the classes, which are fifths of the jobs, each by its newest
        verdicts: those of small jobs come at once, and would outweigh the others'.
        """
        tuning, count = self.tuning, len(self._keys)
        newest = slice(max(0, count - STRATIFIED), count)
        counted, classes = self._counted[newest], self._class[newest]
        kept = counted & ~self._missed[newest]
        coverage = 0.0
        for size_class in range(CLASSES):
            rows = np.nonzero(counted & (classes == size_class))[0][-int(tuning.memory) :]
            coverage += (float(kept[rows].sum()) + 4 * tuning.target) / (len(rows) + 4) / CLASSES
        allowed = 1 - tuning.target + tuning.gain * (coverage - tuning.target)
        return min(max(allowed, 0.01), tuning.most_misses)

    def _forget(self) -> None:
        for key in self._keys[:HELD]:
            del self._row[key]
        self._keys = self._keys[HELD:]
        for column in (
            *(self._submit, self._plain, self._believed, self._bound, self._size, self._length),
            *(self._base, self._median, self._done, self._counted, self._missed, self._class),
        ):
            column[:HELD] = column[HELD:]
        self._row = {key: row for row, key in enumerate(self._keys)}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a user is told, absolute seconds; cause: why it was (re-)issued."""

    job: Hashable
    at_s: float
    p50_s: float
    p90_s: float
    size_class: int
    coverage_percent: float
    cause: str


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A job that was not submitted: its prediction, and what it would do to the others.

    delays_s: job -> how much later (or earlier, negative) its play-out ends.
    """

    prediction: Prediction
    delays_s: dict[Hashable, float]


class Moved(NamedTuple):
    """A job whose play-out ends elsewhere than when it was last predicted."""

    job: Hashable
    finish_s: float
    size_gpu_s: float


@dataclass(slots=True)
class Predictor:
    """The daemon's predictor: play-out, calibration, and re-issue when something changed.

    tolerance: a prediction is re-issued when its P50 moved by more than this share of what is
    left, or by more than a minute where that is more.
    """

    calibrator: Calibrator = field(default_factory=Calibrator)
    tolerance: float = 0.02
    issued: dict[Hashable, Prediction] = field(default_factory=dict)
    _ends: dict[Hashable, float] = field(default_factory=dict)  # play-outs the issued ones rest on

    def submit(
        self, snapshot: Snapshot, keys: Sequence[Hashable], ends_s: Array | None = None
    ) -> Prediction:
        """The prediction of the job that just arrived: the last of the snapshot. ends_s: its
        play-out, where that was done elsewhere (it may take long: in a thread)."""
        finish = self._finishes(snapshot, keys) if ends_s is None else ends_s
        job, at = keys[-1], len(keys) - 1
        size = float(snapshot.jobs.sizes_gpu_s[at])
        self.calibrator.review(snapshot.now_s, dict(zip(keys[:-1], finish[:-1], strict=True)))
        bounds = self.calibrator.issue(job, snapshot.now_s, float(finish[at]), size)
        prediction = _absolute(job, snapshot.now_s, bounds, "submitted")
        self.issued[job], self._ends[job] = prediction, float(finish[at])
        return prediction

    def refresh(
        self,
        snapshot: Snapshot,
        keys: Sequence[Hashable],
        cause: str,
        anew: Collection[Hashable] = (),
    ) -> list[Prediction]:
        """Re-issues what changed, with the cause ("node n3 lost", "policy 1.7 applied", ...).
        anew: jobs whose prediction is re-issued however little it moved."""
        return self.reissue(snapshot.now_s, self.moved(snapshot, keys, anew), cause)

    def moved(
        self,
        snapshot: Snapshot,
        keys: Sequence[Hashable],
        anew: Collection[Hashable] = (),
        ends_s: Array | None = None,
    ) -> list[Moved]:
        """Plays the cluster out, learns from it, and says whose end moved since its prediction:
        what ``reissue`` takes, in pieces where a thousand at once would hold a loop up. ends_s: as
        in submit."""
        finish = self._finishes(snapshot, keys) if ends_s is None else ends_s
        now = snapshot.now_s
        self.calibrator.review(now, dict(zip(keys, finish, strict=True)))
        sizes = snapshot.jobs.sizes_gpu_s
        before = np.array([self._ends.get(job, math.nan) for job in keys])
        slack = np.maximum(60.0, self.tolerance * np.maximum(finish - now, 0.0))
        changed = ~(np.abs(finish - before) <= slack)
        return [
            Moved(job, float(finish[at]), float(sizes[at]))
            for at, job in enumerate(keys)
            if changed[at] or job in anew
        ]

    def reissue(self, now_s: float, moved: Sequence[Moved], cause: str) -> list[Prediction]:
        """New predictions of jobs whose play-out ends elsewhere now."""
        fresh = []
        for job, finish_s, size in moved:
            bounds = self.calibrator.again(now_s, finish_s, size)
            prediction = _absolute(job, now_s, bounds, cause)
            self.issued[job], self._ends[job] = prediction, finish_s
            fresh.append(prediction)
        return fresh

    def finished(self, job: Hashable, at_s: float) -> None:
        """The job ended, or was cancelled."""
        self.issued.pop(job, None)
        self._ends.pop(job, None)
        self.calibrator.finished(job, at_s)

    def what_if(
        self,
        snapshot: Snapshot,
        keys: Sequence[Hashable],
        candidate: JobTable,
        owner: int = -1,
        count: int = 1,
    ) -> WhatIf:
        """Plays the cluster out with and without one more job, or count of it at once, of which the
        last to end is predicted; nothing is recorded.

        candidate: one job, its speeds among the snapshot's tables (see allocator.table_of).
        owner: index of its owner's quota.
        """
        if len(candidate) != 1:
            raise InputError("candidate", len(candidate), "one job")
        joined = snapshot
        for _ in range(count):
            joined = joined.with_job(candidate, owner)
        after = joined.play_out()
        before = snapshot.play_out() if len(keys) else np.zeros(0)
        delays = dict(zip(keys, (after[:-count] - before).tolist(), strict=True))
        size = float(candidate.sizes_gpu_s[0])
        bounds = self.calibrator.again(snapshot.now_s, float(after[-count:].max()), size)
        return WhatIf(_absolute("", snapshot.now_s, bounds, "what if"), delays)

    @staticmethod
    def _finishes(snapshot: Snapshot, keys: Sequence[Hashable]) -> Array:
        if len(keys) != len(snapshot.jobs) or not keys:
            raise InputError("keys", len(keys), f"one key a job of the snapshot, {len(keys)}")
        return snapshot.play_out()


def _absolute(job: Hashable, now_s: float, bounds: Bounds, cause: str) -> Prediction:
    return Prediction(
        job,
        now_s,
        now_s + bounds.p50_s,
        now_s + bounds.p90_s,
        bounds.size_class,
        bounds.coverage_percent,
        cause,
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """Bounds an online calibrator gave the jobs of a finished run, absolute seconds.

    Every job counts: kept says whether it ended within its bound.
    """

    median_s: Array
    upper_s: Array
    kept: NDArray[np.bool_]
    size_class: NDArray[np.int64]
    submit_s: Array
    finish_s: Array
    predicted_s: Array

    @property
    def coverage_percent(self) -> float:
        return float(100.0 * self.kept.mean()) if len(self.kept) else math.nan

    @property
    def thirds_percent(self) -> list[float]:
        """Coverage of the first, second and last third of the arrivals."""
        return [float(100.0 * part.mean()) for part in np.array_split(self.kept, 3)]

    @property
    def widths(self) -> Array:
        """P90 over P50, as lengths."""
        return np.asarray((self.upper_s - self.submit_s) / (self.median_s - self.submit_s))

    @property
    def median_width(self) -> float:
        return float(np.median(self.widths)) if len(self.kept) else math.nan

    @property
    def interval_score(self) -> float:
        """Mean one-sided interval score relative to the plain length: width above it, plus ten
        times what a job overran its bound (Gneiting and Raftery 2007, for a 90 % bound)."""
        plain = self.predicted_s - self.submit_s
        over = np.maximum(self.finish_s - self.upper_s, 0.0)
        return float(np.mean((self.upper_s - self.predicted_s + 10.0 * over) / plain))

    def median_errors(self) -> tuple[float, float]:
        """Median absolute error in percent of P50 and of the plain prediction."""
        took = self.finish_s - self.submit_s
        return tuple(  # type: ignore[return-value]  # a pair
            float(np.median(100 * np.abs(took - guess) / guess))
            for guess in (self.median_s - self.submit_s, self.predicted_s - self.submit_s)
        )


def replay(jobs: JobTable, outcome: Outcome, tuning: Tuning | None = None) -> Replay:
    """Runs a calibrator over a finished simulation as it would have run online.

    It learns of ends when they happen and of slips at the simulation's reviews
    (Options.review_every), nothing earlier. Jobs that were not predicted are left out.
    """
    chosen = np.nonzero(np.isfinite(outcome.predicted_s))[0]
    submit, finish = jobs.submit_s[chosen], outcome.finish_s[chosen]
    predicted, sizes = outcome.predicted_s[chosen], jobs.sizes_gpu_s[chosen]
    calibrator = Calibrator(tuning)
    ends = chosen[np.argsort(finish, kind="stable")]
    every = len(jobs) // len(outcome.reviews_s) if len(outcome.reviews_s) else 0
    next_end = reviewed = 0
    given: list[Bounds] = []
    for at, job in enumerate(chosen.tolist()):
        now = float(submit[at])
        while next_end < len(ends) and outcome.finish_s[ends[next_end]] <= now:
            ended = int(ends[next_end])
            calibrator.finished(ended, float(outcome.finish_s[ended]))
            next_end += 1
        while reviewed < len(outcome.reviews_s) and (reviewed + 1) * every <= job:
            row = outcome.reviews_s[reviewed]
            _review(calibrator, row, float(jobs.submit_s[(reviewed + 1) * every - 1]))
            reviewed += 1
        given.append(calibrator.issue(job, now, float(predicted[at]), float(sizes[at])))
    upper = submit + np.array([bounds.p90_s for bounds in given])
    return Replay(
        submit + np.array([bounds.p50_s for bounds in given]),
        upper,
        finish <= upper + 1e-6 * (predicted - submit),
        np.array([bounds.size_class for bounds in given], dtype=np.int64),
        submit,
        finish,
        predicted,
    )


def _review(calibrator: Calibrator, row: Array, now_s: float) -> None:
    active: Iterable[int] = np.nonzero(np.isfinite(row))[0].tolist()
    calibrator.review(now_s, {job: float(row[job]) for job in active})
