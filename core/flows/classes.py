"""Size classes from a sample of flow sizes: Algorithm 1 and job-share weights (numpy).

Sections 2.3.4 and 2.3.5 of the dissertation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from intentd.core.errors import InputError
from intentd.core.flows.boost import solve_gamma
from intentd.core.flows.policies import MAX_LOAD, SizeSample, make_domain_policy
from intentd.core.flows.policy import MAX_CLASSES, DomainPolicy

Array = NDArray[np.float64]
C2_LIMIT: Final = 1.0
MAX_SAMPLES: Final = 50_000_000
_FIRST_BLOCK: Final = 4096


@dataclass(frozen=True, slots=True)
class ClassFit:
    """Classes of a sample, smallest sizes first.

    thresholds_bytes: a class takes size <= threshold, the last is inf. weights: share of the
    sample's flows in each class, sums to 1. c2: squared coefficient of variation in each.
    """

    thresholds_bytes: tuple[float, ...]
    weights: tuple[float, ...]
    c2: tuple[float, ...]
    samples: int


def sorted_sample(sizes_bytes: ArrayLike) -> Array:
    """A checked, ascending copy. Raises InputError: empty, too many, negative, NaN, infinite."""
    sizes = np.array(sizes_bytes, dtype=np.float64).ravel()
    if not 1 <= sizes.size <= MAX_SAMPLES:
        raise InputError("sizes_bytes", f"{sizes.size} sizes", f"1 to {MAX_SAMPLES} sizes")
    sizes.sort()
    if not (math.isfinite(sizes[-1]) and sizes[0] >= 0):  # NaN sorts last
        worst = sizes[-1] if not math.isfinite(sizes[-1]) else sizes[0]
        raise InputError("sizes_bytes", float(worst), "finite sizes >= 0")
    return sizes


def _first_close(sizes: Array, start: int) -> int | None:
    """Least i with C^2(sizes[start:i]) >= 1 (population variance), or None.

    C^2 >= 1 is k * sum(x^2) >= 2 * sum(x)^2 for k values. Blocks double, so that a segment
    costs in proportion to its length; sums start at the segment, so nothing cancels.
    """
    count, block = 0, _FIRST_BLOCK
    total = squares = 0.0
    while start + count < sizes.size:
        part = sizes[start + count : start + count + block]
        sums = np.cumsum(part)
        sums += total
        sums2 = np.cumsum(part * part)
        sums2 += squares
        ranks = np.arange(count + 1, count + part.size + 1, dtype=np.float64)
        closes = (ranks * sums2 >= (1.0 + C2_LIMIT) * sums * sums) & (sums > 0.0)
        first = int(closes.argmax())
        if closes[first]:
            return start + count + first + 1
        total, squares = float(sums[-1]), float(sums2[-1])
        count += part.size
        block *= 2
    return None


def class_thresholds(ordered: Array) -> tuple[float, ...]:
    """Algorithm 1 of the dissertation on an ascending sample: bytes, the last inf.

    A class closes with the first flow that brings C^2 of the running segment to 1 or more; that
    flow's size is its threshold. Departures from the listing, both only where it leaves flows
    without a class or a class without flows: a sample that ends exactly where a class closes
    has that class end at infinity (the listing would return no infinity at all), and so has
    the last class when all flows after it have its threshold's very size (an atom, which
    `size <= threshold` gives to it). O(n) after the sort.
    """
    thresholds: list[float] = []
    start = 0
    while start < ordered.size:
        close = _first_close(ordered, start)
        if close is None:
            break
        thresholds.append(float(ordered[close - 1]))
        start = close
    if thresholds and thresholds[-1] >= ordered[-1]:
        thresholds.pop()
    # Every class spans more than a factor 2 in size, so that 2^63 bytes hold fewer than 64.
    return (*thresholds[: MAX_CLASSES - 1], math.inf)


def job_shares(ordered: Array, thresholds_bytes: Sequence[float]) -> tuple[float, ...]:
    """Share of the flows in each class: the weights of 2D.

    Job shares, not the time average of N_k/N of a virtual PS: that average is the *byte* share,
    and as a weight it makes the median of data mining 27,000 to 39,000 times worse (see
    docs/adr/weights-are-job-shares.md).
    """
    ends = np.searchsorted(ordered, np.asarray(thresholds_bytes), side="right")
    counts = np.diff(ends, prepend=0)
    return tuple(float(n) / ordered.size for n in counts)


def class_c2(ordered: Array, thresholds_bytes: Sequence[float]) -> tuple[float, ...]:
    """Squared coefficient of variation inside each class; 0 for an empty one."""
    ends = np.searchsorted(ordered, np.asarray(thresholds_bytes), side="right")
    values = []
    start = 0
    for end in ends:
        part = ordered[start:end]
        mean = float(part.mean()) if part.size else 0.0
        values.append(float(part.var()) / mean**2 if mean > 0 else 0.0)
        start = int(end)
    return tuple(values)


def fit_classes(
    sizes_bytes: ArrayLike, thresholds_bytes: Sequence[float] | None = None
) -> ClassFit:
    """Classes of a sample by Algorithm 1, or its shares and C^2 under given thresholds.

    Raises InputError for a bad sample and for given thresholds that do not rise to infinity.
    """
    ordered = sorted_sample(sizes_bytes)
    if thresholds_bytes is None:
        limits = class_thresholds(ordered)
    else:
        limits = tuple(float(limit) for limit in thresholds_bytes)
        if not limits or limits[-1] != math.inf:
            raise InputError("thresholds_bytes", limits[-1:], "a last threshold of infinity")
        if any(b <= a for a, b in pairwise(limits)) or limits[0] < 0:
            raise InputError("thresholds_bytes", limits, "thresholds >= 0 that rise")
    return ClassFit(limits, job_shares(ordered, limits), class_c2(ordered, limits), ordered.size)


def drop_empty_classes(fit: ClassFit) -> ClassFit:
    """Without the classes no flow of the sample fell into (a policy's weights are > 0).

    Their sizes go to the next larger class, or to the last one left.
    """
    keep = [i for i, weight in enumerate(fit.weights) if weight > 0]
    limits = [fit.thresholds_bytes[i] for i in keep]
    limits[-1] = math.inf
    return ClassFit(
        tuple(limits),
        tuple(fit.weights[i] for i in keep),
        tuple(fit.c2[i] for i in keep),
        fit.samples,
    )


def class_gammas(
    ordered: Array, thresholds_bytes: Sequence[float], *, load: float, rate_bps: float
) -> tuple[float | None, ...]:
    """Gamma of each class (boost.py) from a sample and the load of the link."""
    load = min(load, MAX_LOAD)
    seconds = ordered * (8.0 / rate_bps)
    per_s = load / float(seconds.mean())
    gammas: list[float | None] = []
    start = 0
    for end in np.searchsorted(ordered, np.asarray(thresholds_bytes), side="right"):
        part = seconds[start:end]
        start = int(end)
        if not part.size:
            gammas.append(None)
            continue
        own_per_s = per_s * part.size / seconds.size

        def excess(gamma: float, part: Array = part) -> float:
            return float(np.expm1(gamma * part).mean())

        mean = float(part.mean())
        gammas.append(
            solve_gamma(
                excess,
                rate_per_s=own_per_s,
                mean_s=mean,
                largest_s=float(part[-1]),
                capacity=1.0 - load + own_per_s * mean,
            )
        )
    return tuple(gammas)


def policy_from_sample(
    name: str,
    sizes_bytes: ArrayLike,
    *,
    domain: str,
    rate_bps: float,
    load: float,
    thresholds_bytes: Sequence[float] | None = None,
    workload: str = "",
    sequencing: str = "local",
    max_wait_s: float = 30.0,
) -> DomainPolicy:
    """make_domain_policy with classes, weights and gammas computed from a sample.

    thresholds_bytes: instead of Algorithm 1's (the "published" preset); classes that no flow of
    the sample fell into are dropped.
    """
    ordered = sorted_sample(sizes_bytes)
    fit = drop_empty_classes(fit_classes(ordered, thresholds_bytes))
    gammas = None
    if name == "2d-boost":
        gammas = class_gammas(ordered, fit.thresholds_bytes, load=load, rate_bps=rate_bps)
    return make_domain_policy(
        name,
        domain=domain,
        rate_bps=rate_bps,
        sizes=SizeSample(ordered.tolist()),
        load=load,
        thresholds_bytes=fit.thresholds_bytes,
        weights=fit.weights,
        gammas_per_s=gammas,
        workload=workload,
        sequencing=sequencing,
        max_wait_s=max_wait_s,
    )
