"""Has the workload changed? A likelihood-ratio test on log-spaced histograms of flow sizes.

The newest m flows are compared with all those before them since the last change, for m = 64, 128,
... 2048: short windows see an abrupt change at once, long ones a small or gradual one. The
statistic is the two-sample likelihood ratio (Wilks' G) over octaves of size, merged until each
holds enough flows; under an unchanged workload it follows a chi-square law. It was preferred to
Kolmogorov-Smirnov because thresholds depend on rare large flows: a tail of 3 % of the flows moves
KS by .03 and G by its full weight (docs/adr, workload change).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bins = NDArray[np.uint8]

BIN_COUNT: Final = 128  # two bins an octave, 1 byte to 2**64 bytes
WINDOWS: Final = (64, 128, 256, 512, 1024, 2048)
LOOK_BACK: Final = 2 * WINDOWS[-1]
EXPECTED_LEAST: Final = 5.0  # flows a merged bin must expect of the newest m (Cochran's rule)
LEAST_SPLIT: Final = 16  # flows on either side of an estimated change
GUARD_FLOWS: Final = 8  # dropped behind an estimated change: the estimate is a few flows off


@dataclass(frozen=True, slots=True)
class Change:
    """flows: how many of the newest flows belong to the new workload. window: the m that saw it.

    divergence: nats a flow between the two samples. statistic, bound: G and what it exceeded.
    """

    flows: int
    window: int
    statistic: float
    bound: float
    divergence: float


def size_bins(sizes: Array) -> Bins:
    """(n,) bins of sizes in bytes; below 1 byte counts as 1."""
    octaves = np.log2(np.maximum(sizes, 1.0))
    return np.minimum((2.0 * octaves).astype(np.int64), BIN_COUNT - 1).astype(np.uint8)


def chi_square_bound(freedom: int, false_alarm: float) -> float:
    """The value a chi-square of ``freedom`` degrees exceeds with probability ``false_alarm``.

    Wilson and Hilferty's cube-root approximation; 1 % high at worst where it is used here.
    """
    z = _normal_deviate(false_alarm)
    part = 2.0 / (9.0 * freedom)
    return freedom * (1.0 - part + z * math.sqrt(part)) ** 3


def find_change(
    total: Array, recent: Bins, *, false_alarm: float, least_divergence: float
) -> Change | None:
    """The change between older and newest flows, or None.

    total: (BIN_COUNT,) flows in each bin since the last change, the newest included.
    recent: bins of the newest LOOK_BACK flows (fewer if there are fewer), oldest first.
    false_alarm: probability that one comparison of an unchanged workload fires.
    least_divergence: nats a flow; smaller differences are left to the window's forgetting.
    """
    flows = float(total.sum())
    for window in WINDOWS:
        older = flows - window
        if older < window:
            return None
        newest = np.bincount(recent[-window:], minlength=BIN_COUNT).astype(np.float64)
        groups = _merge(total, window / flows)
        count = int(groups[-1]) + 1
        if count < 2:
            continue
        new = np.bincount(groups, weights=newest, minlength=count).astype(np.float64)
        both = np.bincount(groups, weights=total, minlength=count).astype(np.float64)
        statistic = float(_likelihood_ratio(new, both - new))
        bound = chi_square_bound(count - 1, false_alarm)
        divergence = statistic / (2.0 * window * older / flows)
        if statistic > bound and divergence > least_divergence:
            since = _flows_since(groups[recent], both, window)
            return Change(since, window, statistic, bound, divergence)
    return None


def _merge(total: Array, share: float) -> NDArray[np.int64]:
    """(BIN_COUNT,) group of each bin: neighbours join until a group expects enough flows."""
    groups = np.zeros(BIN_COUNT, dtype=np.int64)
    least = EXPECTED_LEAST / share
    group, held, left = 0, 0.0, float(total.sum())
    for index in np.flatnonzero(total):
        if held >= least and left >= least:
            group, held = group + 1, 0.0
        groups[index:] = group
        held += total[index]
        left -= total[index]
    return groups


def _likelihood_ratio(new: Array, old: Array) -> Array:
    """(...,) Wilks' G of counts (..., groups) of two samples."""
    both = new + old
    n, m = new.sum(axis=-1, keepdims=True), old.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        a = np.where(new > 0, new * np.log(new * (n + m) / (n * both)), 0.0)
        b = np.where(old > 0, old * np.log(old * (n + m) / (m * both)), 0.0)
    return np.asarray(2.0 * (a + b).sum(axis=-1))


def _flows_since(recent: NDArray[np.int64], both: Array, window: int) -> int:
    """Newest flows that belong to the new workload: the split of largest likelihood ratio.

    recent: group of each of the newest flows, oldest first. both: (groups,) flows, all of them.
    Looks back at most two windows.
    """
    back = min(2 * window, len(recent), int(both.sum()) - LEAST_SPLIT)
    new = np.zeros((back, len(both)))
    new[np.arange(back), recent[::-1][:back]] = 1.0
    np.cumsum(new, axis=0, out=new)
    ratios = _likelihood_ratio(new, both - new)
    split = LEAST_SPLIT + int(np.argmax(ratios[LEAST_SPLIT - 1 :]))
    return max(1, split - GUARD_FLOWS)


@functools.lru_cache(maxsize=16)
def _normal_deviate(tail: float) -> float:
    """The value a standard normal exceeds with probability tail (in (0, .5)), by bisection."""
    low, high = 0.0, 38.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if 0.5 * math.erfc(middle / math.sqrt(2.0)) > tail:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
