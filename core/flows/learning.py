"""What a controller learns about one domain: thresholds and weights of its recent flows.

Dissertation, sections 2.3.4, 2.3.5 and 2.4.3. The daemon and the simulation drive the same Learner:
sizes go in (`observe`), estimates that are worth a new policy come out (`decide`). Everything since
the last change of the workload is kept, up to a window: light tails settle within hundreds of
flows, heavy ones use the whole window.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from intentd.core.flows.change import BIN_COUNT, LOOK_BACK, Change, find_change, size_bins
from intentd.core.flows.classes import class_thresholds, job_shares, sorted_sample

Array = NDArray[np.float64]

CHECK_FLOWS: Final = 32  # flows between two looks for a change
MAX_CHECKS: Final = 64  # looks in one batch: larger batches are looked at in larger pieces
LEAST_WEIGHT: Final = 1e-3  # of a pinned class that no recent flow fell into


@dataclass(frozen=True, slots=True)
class LearnSettings:
    """How a Learner forgets and when it speaks; chosen by `benchmarks.cluster_reuse`.

    window_flows: newest flows kept. keep_flows: of these, kept whatever their age.
    max_age_s: age at which flows beyond keep_flows are forgotten.
    min_flows: flows of a workload before its first estimate is used.
    grow: a sample that grew by this factor since the last look is looked at again at once.
    moved: relative change of a threshold that matters. shifted: share of flows whose weight moved.
    persist_flows: flows over which a difference must last to count on a sample that did not grow.
    false_alarm, least_divergence: see find_change.
    """

    window_flows: int = 20_000
    keep_flows: int = 3_000
    max_age_s: float = 3600.0
    min_flows: int = 200
    grow: float = 1.25
    moved: float = 0.25
    shifted: float = 0.03
    persist_flows: int = 200
    false_alarm: float = 1e-7
    least_divergence: float = 0.03


@dataclass(frozen=True, slots=True)
class Estimate:
    """Thresholds (bytes, last is infinity) and job shares of a sample of ``flows`` flows."""

    thresholds_bytes: tuple[float, ...] = (math.inf,)
    weights: tuple[float, ...] = (1.0,)
    flows: int = 0

    @property
    def classes(self) -> int:
        return len(self.thresholds_bytes)


BOOTSTRAP: Final = Estimate()


@dataclass(frozen=True, slots=True)
class Decision:
    """An estimate worth a new policy, and why: "bootstrap" "change" "growth" or "moved"."""

    estimate: Estimate
    reason: str
    detail: str


@dataclass(slots=True)
class Learner:
    """The recent flows of one domain and the estimate in force.

    States of the estimate: *bootstrap* (one class) -> *settled*; a detected change of the workload
    drops the old flows and makes it *stale*: it stays in force until min_flows of the new workload
    are there, then it is settled again.
    """

    settings: LearnSettings = field(default_factory=LearnSettings)
    in_force: Estimate = BOOTSTRAP
    stale: bool = True
    observed: int = 0
    changes: int = 0
    last_change: Change | None = None
    last_change_s: float | None = None
    _sizes: Array = field(default_factory=lambda: np.empty(256))
    _total: Array = field(default_factory=lambda: np.zeros(BIN_COUNT))
    _start: int = 0
    _end: int = 0
    _marks: deque[tuple[float, int]] = field(default_factory=deque)
    _aged: int = 0  # of all observed, how many are older than max_age_s
    _unchecked: int = 0
    _looked_at: int = 0
    _least_flows: int = 0
    _differs_since: int | None = None

    def observe(self, sizes: Array, *, now: float) -> Change | None:
        """Take in sizes (bytes, oldest first). Returns a change of the workload if one shows."""
        found: Change | None = None
        sizes = np.asarray(sizes, dtype=np.float64)
        step = max(CHECK_FLOWS, len(sizes) // MAX_CHECKS)
        for first in range(0, len(sizes), step):
            piece = sizes[first : first + step]
            self._append(piece)
            self._unchecked += len(piece)
            if self._unchecked >= CHECK_FLOWS:
                self._unchecked = 0
                found = self._check(now) or found
        self._marks.append((now, self.observed))
        self._forget(now)
        return found

    @property
    def flows(self) -> int:
        """Flows in the window."""
        return self._end - self._start

    def sample(self) -> Array:
        """(flows,) sizes in the window, oldest first; a view."""
        return self._sizes[self._start : self._end]

    def estimate(self) -> Estimate:
        """Algorithm 1 and job shares of the window (not yet in force)."""
        if self.flows < self.settings.min_flows:
            return BOOTSTRAP
        ordered = sorted_sample(self.sample())
        thresholds = class_thresholds(ordered)
        return Estimate(thresholds, job_shares(ordered, thresholds), self.flows)

    def rates(self, thresholds_bytes: tuple[float, ...]) -> tuple[float, ...]:
        """Job share of each class in the window, at least LEAST_WEIGHT; they sum to 1."""
        if not self.flows:
            return (1.0 / len(thresholds_bytes),) * len(thresholds_bytes)
        shares = job_shares(sorted_sample(self.sample()), thresholds_bytes)
        raised = [max(share, LEAST_WEIGHT) for share in shares]
        return tuple(share / math.fsum(raised) for share in raised)

    def byte_shares(self, thresholds_bytes: tuple[float, ...]) -> tuple[float, ...]:
        """Share of the window's bytes in each class: load splits in these proportions."""
        sizes = self.sample()
        count = len(thresholds_bytes)
        if not len(sizes) or not sizes.sum():
            return (1.0 / count,) * count
        index = np.searchsorted(np.asarray(thresholds_bytes[:-1]), sizes, side="left")
        shares = np.bincount(index, weights=sizes, minlength=count) / sizes.sum()
        return tuple(float(share) for share in shares)

    def decide(self) -> Decision | None:
        """The next estimate to enforce, if it differs enough from the one in force.

        A new workload is believed at min_flows, a sample that grew by ``grow`` at once; on a
        sample of about the same size a difference must last persist_flows.
        """
        if self.flows < max(self._least_flows, self.settings.min_flows):
            return None
        candidate = self.estimate()
        detail = self._difference(candidate)
        if self.stale:
            reason = "bootstrap" if self.last_change is None else "change"
            self.stale = False
            return self._enforce(candidate, reason, detail or "same classes as before")
        if not detail:
            self._differs_since = None
            if self.flows >= self.settings.grow * self._looked_at:
                self._looked_at = self.flows
            return None
        if self.flows >= self.settings.grow * self._looked_at:
            return self._enforce(candidate, "growth", detail)
        if self._differs_since is None:
            self._differs_since = self.observed
        if self.observed - self._differs_since >= self.settings.persist_flows:
            return self._enforce(candidate, "moved", detail)
        return None

    def restore(self, estimate: Estimate) -> None:
        """Take an estimate as in force (a stored policy after a restart); flows are gathered anew.

        Nothing replaces it before as many flows were seen as it rests on (at most keep_flows).
        """
        self.in_force = estimate
        self.stale = estimate.flows == 0
        self._least_flows = min(estimate.flows, self.settings.keep_flows)

    def _enforce(self, candidate: Estimate, reason: str, detail: str) -> Decision:
        self.in_force = candidate
        self._looked_at = self.flows
        self._differs_since = None
        return Decision(candidate, reason, detail)

    def _difference(self, candidate: Estimate) -> str:
        """What matters in candidate against the estimate in force; empty if nothing does."""
        old = self.in_force
        if candidate.classes != old.classes:
            return f"{old.classes} -> {candidate.classes} classes"
        for index, (was, now) in enumerate(
            zip(old.thresholds_bytes[:-1], candidate.thresholds_bytes[:-1], strict=True)
        ):
            if not 1 / (1 + self.settings.moved) <= now / max(was, 1.0) <= 1 + self.settings.moved:
                return f"threshold {index}: {was:.0f} -> {now:.0f} bytes"
        shift = self.shifted(old.weights, candidate.weights)
        return f"weights: {100 * shift:.1f} % of the flows moved" if shift else ""

    def shifted(self, old: tuple[float, ...], new: tuple[float, ...]) -> float:
        """Share of the flows by which weights differ; 0 if that is less than what matters.

        Twice the noise of a sample of this size never matters.
        """
        shift = 0.5 * math.fsum(abs(a - b) for a, b in zip(old, new, strict=True))
        least = max(self.settings.shifted, 2.0 / math.sqrt(max(self.flows, 1)))
        return shift if shift > least else 0.0

    def _append(self, sizes: Array) -> None:
        if self._end + len(sizes) > len(self._sizes):
            kept = self._sizes[self._start : self._end]
            room = min(2 * (len(kept) + len(sizes)), self.settings.window_flows * 5 // 4)
            grown = np.empty(max(room, len(kept) + len(sizes), len(self._sizes)))
            grown[: len(kept)] = kept
            self._sizes, self._start, self._end = grown, 0, len(kept)
        self._sizes[self._end : self._end + len(sizes)] = sizes
        self._end += len(sizes)
        self.observed += len(sizes)
        self._total += np.bincount(size_bins(sizes), minlength=BIN_COUNT)
        self._drop_before(self._end - self.settings.window_flows)

    def _drop_before(self, start: int) -> None:
        """Forget the flows before index start."""
        if start > self._start:
            gone = size_bins(self._sizes[self._start : start])
            self._total -= np.bincount(gone, minlength=BIN_COUNT)
            self._start = start

    def _check(self, now: float) -> Change | None:
        change = find_change(
            self._total,
            size_bins(self.sample()[-LOOK_BACK:]),
            false_alarm=self.settings.false_alarm,
            least_divergence=self.settings.least_divergence,
        )
        if change is None:
            return None
        self._drop_before(self._end - change.flows)
        self.stale = True
        self.changes += 1
        self.last_change, self.last_change_s = change, now
        self._looked_at, self._least_flows, self._differs_since = 0, 0, None
        return change

    def _forget(self, now: float) -> None:
        """Drop flows beyond keep_flows that are older than max_age_s."""
        while self._marks and now - self._marks[0][0] > self.settings.max_age_s:
            self._aged = self._marks.popleft()[1]
        old = self._end - (self.observed - self._aged)
        self._drop_before(min(old, self._end - self.settings.keep_flows))
        while self._marks and self.observed - self._marks[0][1] >= self.flows:
            self._marks.popleft()
