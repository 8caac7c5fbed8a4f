"""Gamma-boost: an order of grants inside a class that knows sizes and stays tail-safe.

A flow is served by the key `arrival - b(size)` with ``b(s) = -ln(1 - exp(-g s)) / g``: short flows
are moved ahead by a bounded amount of time. g is the decay rate of the class's busy period, the
root of ``lambda_k (E[exp(g S)] - 1) = c_k g`` where c_k is the capacity the other classes leave
(Yu and Scully, "Strongly Tail-Optimal Scheduling in the Light-Tailed M/G/1", SIGMETRICS 2024,
applied to each class of 2D with its residual capacity). Sizes are seconds of the full link.
Non-preemptive: only the order in which waiting flows start changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from intentd.core.flows.policy import ClassPolicy
from intentd.core.flows.workloads import SizeCdf

MAX_EXPONENT: Final = 600.0  # exp() of more would overflow; no root lies beyond in practice
_STEPS: Final = 200


def boost_s(size_s: float, gamma_per_s: float) -> float:
    """b(s) in seconds, >= 0; size_s seconds of the full link, gamma > 0.

    A flow without bytes would be boosted without limit; it counts as one nanosecond.
    """
    x = gamma_per_s * max(size_s, 1e-9)
    # ln(1 - exp(-x)) loses digits at either end: expm1 keeps them for small x, log1p for large.
    if x < 0.6931471805599453:
        return -math.log(-math.expm1(-x)) / gamma_per_s
    return -math.log1p(-math.exp(-x)) / gamma_per_s


def queue_key(cls: ClassPolicy, *, rate_bps: float, arrived: float, size_bytes: float) -> float:
    """Place of a waiting flow in its class's queue: the smallest key starts first, ties by arrival.

    The one home of the class's order, for the gate and for the turn protocol alike.
    """
    if cls.order == "fifo":
        return arrived
    if cls.order == "sjf":
        return float(size_bytes)
    return arrived - boost_s(size_bytes * 8.0 / rate_bps, cls.boost_gamma_per_s)


def solve_gamma(
    excess: Callable[[float], float],
    *,
    rate_per_s: float,
    mean_s: float,
    largest_s: float,
    capacity: float,
) -> float | None:
    """The g > 0 with ``rate (E[exp(g S)] - 1) = capacity g``; None where there is none.

    excess: g -> E[exp(g S)] - 1 of the class's sizes. capacity: share of the link the class may
    count on. None when the class has no flows or does not fit its capacity (its queue would
    have no decay rate); the class then keeps FIFO.
    """
    if not (rate_per_s > 0 and mean_s > 0 and largest_s > 0):
        return None
    if not rate_per_s * mean_s < capacity:
        return None

    def surplus(gamma: float) -> float:  # falls from 0 at first, then rises through the root
        return rate_per_s * excess(gamma) - capacity * gamma

    top = MAX_EXPONENT / largest_s
    high = min(1.0 / largest_s, top)
    while surplus(high) <= 0.0:
        if high >= top:
            return None
        high = min(2.0 * high, top)
    low = 0.0
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if surplus(middle) > 0.0:
            high = middle
        else:
            low = middle
    return 0.5 * (low + high) if low > 0.0 else None


def _sample_excess(sizes_s: Sequence[float]) -> Callable[[float], float]:
    count = len(sizes_s)

    def excess(gamma: float) -> float:
        return math.fsum(math.expm1(gamma * size) for size in sizes_s) / count

    return excess


def gamma_of_sample(
    sizes_s: Sequence[float], *, rate_per_s: float, capacity: float
) -> float | None:
    """solve_gamma for a class known by a sample of its sizes (seconds of the full link)."""
    if not sizes_s:
        return None
    return solve_gamma(
        _sample_excess(sizes_s),
        rate_per_s=rate_per_s,
        mean_s=math.fsum(sizes_s) / len(sizes_s),
        largest_s=max(sizes_s),
        capacity=capacity,
    )


def _cdf_excess(pieces: Sequence[tuple[float, float, float]]) -> Callable[[float], float]:
    """Of a mixture of uniform pieces (low_s, high_s, probability), probabilities summing to 1."""

    def excess(gamma: float) -> float:
        terms = []
        for low, high, probability in pieces:
            x = gamma * (high - low)
            # phi = expm1(x)/x - 1, by its series where the quotient would cancel
            phi = x / 2 + x * x / 6 + x * x * x / 24 if x < 1e-4 else math.expm1(x) / x - 1.0
            terms.append(probability * (math.expm1(gamma * low) + math.exp(gamma * low) * phi))
        return math.fsum(terms)

    return excess


def gamma_of_cdf(
    cdf: SizeCdf,
    *,
    above_bytes: float,
    up_to_bytes: float,
    rate_bps: float,
    rate_per_s: float,
    capacity: float,
) -> float | None:
    """solve_gamma for the flows of a CDF with above < size <= up_to.

    rate_bps: the link; rate_per_s: arrivals a second in this class.
    """
    pieces = cdf.pieces(above_bytes, up_to_bytes)
    total = math.fsum(probability for _, _, probability in pieces)
    if total <= 0.0:
        return None
    scale = 8.0 / rate_bps
    scaled = [(low * scale, high * scale, p / total) for low, high, p in pieces]
    return solve_gamma(
        _cdf_excess(scaled),
        rate_per_s=rate_per_s,
        mean_s=math.fsum(p * (low + high) / 2.0 for low, high, p in scaled),
        largest_s=max(high for _, high, _ in scaled),
        capacity=capacity,
    )
